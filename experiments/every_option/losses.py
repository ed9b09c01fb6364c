"""A term of the loss and a metric of one's own, for the config beside this file."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics import Metric

from runner.batches import Batch
from runner.losses import Term


class Angle(Term):
    """One less the cosine of the angle between predicted and reference forces, mean over atoms."""

    labels = ("forces",)

    def __init__(self, softness: float = 1e-6) -> None:
        """Count forces shorter than the softness (eV/Å) less."""
        super().__init__()
        self.softness = softness

    def values(self, prediction: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """A number a structure."""
        pair = prediction["forces"], batch.labels["forces"]
        cosine = torch.cosine_similarity(*pair, dim=1, eps=self.softness)
        return batch.sum_by_structure(1 - cosine) / batch.n_atoms


class Within(Metric):
    """The share of components that are predicted to 0.05 of their unit."""

    within: Tensor
    count: Tensor

    def __init__(self) -> None:
        """Start from nothing."""
        super().__init__()
        for state in ("within", "count"):
            self.add_state(state, torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, reference: Tensor) -> None:
        """Add components."""
        self.within += ((predicted - reference).abs() < 0.05).sum()
        self.count += predicted.numel()

    def compute(self) -> Tensor:
        """One number."""
        return self.within / self.count
