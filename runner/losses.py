r"""Losses: how far a prediction is from the labels, structure by structure.

Every term is a mean of ℓ_s over the structures that have the label. With N_s atoms in structure s,
and e the error function of a component (its square, unless the config says otherwise):

====================================  ==========================================================
`PerStructureSquaredError`            mean over components of e(ŷ − y); with `per_atom` of
                                      e((ŷ − y)/N_s)
`PerAtomToStructureSquaredError`      Σ_i Σ_k e(ŷ_ik − y_ik) / (K N_s), K components an atom
`TotalChargeError`                    e(Σ_i q̂_i − Q)
`DipoleMomentError`                   Σ_k e((Σ_i q̂_i r_i − μ)_k) / 3
====================================  ==========================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from runner.batches import Batch
from runner.config import AtomLossConfig, EnergyLossConfig, LossConfig, LossTermConfig, StageConfig

ErrorFunction = Callable[[Tensor, float], Tensor]


def _huber(difference: Tensor, delta: float) -> Tensor:
    return nn.functional.huber_loss(
        difference, torch.zeros_like(difference), reduction="none", delta=delta
    )


ERRORS: dict[str, ErrorFunction] = {
    "squared": lambda difference, _: difference.square(),
    "absolute": lambda difference, _: difference.abs(),
    "huber": _huber,
}


@dataclass(frozen=True)
class Sum:
    """A sum and how many things it is over, so that means stay exact over unequal batches."""

    total: Float[Tensor, ""]
    count: Float[Tensor, ""]

    @property
    def mean(self) -> Float[Tensor, ""]:
        """The mean; 0 of nothing, with zero gradient."""
        return self.total / self.count.clamp(min=1)


@dataclass(frozen=True)
class Whole:
    """What all processes have in their batches of one step.

    Attributes:
        counts: over how many structures, or atoms, the mean of every term is.
        n: how many processes there are.
    """

    counts: Mapping[str, Float[Tensor, ""]]
    n: int

    def part(self, sums: Mapping[str, Sum]) -> dict[str, Sum]:
        """One process's part of the means over all.

        The gradients of several processes are averaged: so each part is multiplied by their
        number, and divided by the count of all. The average is the gradient of the mean over all
        structures, however unevenly they are spread.
        """
        return {name: Sum(self.n * s.total, self.counts[name]) for name, s in sums.items()}


def over_processes(counts: Mapping[str, Float[Tensor, ""]]) -> Whole | None:
    """Sum counts over all processes, which all have to ask; none if this one is alone."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or not counts:
        return None
    summed = torch.stack(list(counts.values()))
    torch.distributed.all_reduce(summed)
    n = torch.distributed.get_world_size()
    return Whole(dict(zip(counts, summed.unbind(), strict=True)), n)


class PerStructureSquaredError(nn.Module):
    """Mean over components of the squared deviation of a structure's quantity."""

    def __init__(self, name: str, config: LossTermConfig) -> None:
        """Compare the quantity `name`."""
        super().__init__()
        self.name = name
        self.config = config
        self.per_atom = isinstance(config, EnergyLossConfig) and config.per_atom

    def forward(self, prediction: Mapping[str, Tensor], batch: Batch) -> Sum:
        """Σ_s ℓ_s over the structures that have the label, and their number."""
        difference = prediction[self.name] - batch.labels[self.name]
        components = _rows(difference)
        if self.per_atom:
            components = components / batch.n_atoms.unsqueeze(-1)
        components = _masked(components, batch.labelled.get(self.name))
        values = ERRORS[self.config.error](components, self.config.huber_delta).mean(dim=-1)
        return Sum(values.sum(), self.count(batch))

    def count(self, batch: Batch) -> Float[Tensor, ""]:
        """How many structures have the label."""
        return _count(batch.labelled.get(self.name), batch.n_atoms, batch.positions)


class PerAtomToStructureSquaredError(nn.Module):
    """Squared deviation of the atoms' quantity, per atom and component of the structure.

    With `reduction = "atom"` all atoms of the batch count alike, instead of all structures.
    """

    def __init__(self, name: str, config: LossTermConfig) -> None:
        """Compare the quantity `name`."""
        super().__init__()
        self.name = name
        self.config = config
        self.pooled = isinstance(config, AtomLossConfig) and config.reduction == "atom"

    def forward(self, prediction: Mapping[str, Tensor], batch: Batch) -> Sum:
        """Σ_s ℓ_s over the structures that have the label, and their number."""
        difference = prediction[self.name] - batch.labels[self.name]
        components = _rows(difference)
        mask = batch.labelled.get(self.name)
        atom_mask = None if mask is None else mask[batch.structure]
        components = _masked(components, atom_mask)
        values = ERRORS[self.config.error](components, self.config.huber_delta).mean(dim=-1)
        if not self.pooled:
            values = batch.sum_by_structure(values) / batch.n_atoms
        return Sum(values.sum(), self.count(batch))

    def count(self, batch: Batch) -> Float[Tensor, ""]:
        """How many structures, or their atoms, have the label."""
        mask = batch.labelled.get(self.name)
        if self.pooled:
            mask = None if mask is None else mask[batch.structure]
            return _count(mask, batch.structure, batch.positions)
        return _count(mask, batch.n_atoms, batch.positions)


class TotalChargeError(PerStructureSquaredError):
    """(Σ_i q̂_i − Q)²: the charges of the atoms sum to the structure's."""


class DipoleMomentError(PerStructureSquaredError):
    """‖Σ_i q̂_i r_i − μ‖² / 3, about the origin of the positions as given."""


LOSSES: dict[str, type[PerStructureSquaredError | PerAtomToStructureSquaredError]] = {
    "energy": PerStructureSquaredError,
    "forces": PerAtomToStructureSquaredError,
    "stress": PerStructureSquaredError,
    "total_charge": TotalChargeError,
    "dipole": DipoleMomentError,
    "quadrupole": PerStructureSquaredError,
    "charges": PerAtomToStructureSquaredError,
}


class Loss(nn.Module):
    """The weighted sum of all terms."""

    def __init__(self, config: LossConfig, stages: Sequence[StageConfig] = ()) -> None:
        """Build every term of the config; the weights change with the stages of the training."""
        super().__init__()
        self.config, self.stages = config, list(stages)
        self.terms = nn.ModuleDict(
            {name: LOSSES[name](name, term) for name, term in config.terms.items()}
        )

    def counts(self, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        """Over how many structures, or atoms, the mean of every term is; the labels tell."""
        terms: dict[str, Any] = dict(self.terms.items())
        return {name: term.count(batch) for name, term in terms.items()}

    def sums(self, prediction: Mapping[str, Tensor], batch: Batch) -> dict[str, Sum]:
        """Every term, unweighted, with what it was summed over."""
        return {name: term(prediction, batch) for name, term in self.terms.items()}

    def weights_at(self, epoch: int, step: float = 0.0) -> dict[str, float]:
        """The weights of the terms in an epoch, at a step, both counted from 0."""
        weights = {name: t.weight_at(epoch, step) for name, t in self.config.terms.items()}
        for stage in self.stages:
            if epoch >= stage.start:
                weights |= stage.weights
        return weights

    def weighted(self, means: Mapping[str, Tensor], weights: Mapping[str, Any]) -> Tensor:
        """Weighted sum of the terms' means; NaN of no term at all."""
        weighted = [weights[name] * mean for name, mean in means.items()]
        return torch.stack(weighted).sum() if weighted else torch.tensor(torch.nan)

    def forward(
        self, prediction: Mapping[str, Tensor], batch: Batch, epoch: int = 0
    ) -> dict[str, Tensor]:
        """Every term unweighted, by name, and their weighted sum as `total_loss`."""
        means = {name: term.mean for name, term in self.sums(prediction, batch).items()}
        return means | {"total_loss": self.weighted(means, self.weights_at(epoch))}


def _rows(difference: Float[Tensor, "n ..."]) -> Float[Tensor, "n components"]:
    """A row of components for each structure or atom, of which there may be none."""
    return difference.flatten(1) if difference.dim() > 1 else difference.unsqueeze(-1)


def _masked(
    components: Float[Tensor, "n components"], mask: Bool[Tensor, " n"] | None
) -> Float[Tensor, "n components"]:
    """Zero, also in the gradient, where there is no label."""
    return components if mask is None else torch.where(mask.unsqueeze(-1), components, 0.0)


def _count(mask: Bool[Tensor, " n"] | None, rows: Shaped[Tensor, " n"], like: Tensor) -> Tensor:
    """How many rows there are, or of them are not masked, as a number like another's."""
    if mask is None:
        return like.new_full((), rows.shape[0])
    return mask.sum().to(like.dtype)
