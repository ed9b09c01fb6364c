"""Metrics: errors over a whole split. An epoch's value comes from sums, never from batch means."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torchmetrics import MeanAbsoluteError, MeanSquaredError, Metric, MetricCollection

from runner.batches import Batch
from runner.fields import LABELS
from runner.losses import Loss, Sum

METRICS: dict[str, Callable[[], Metric]] = {
    "mae": MeanAbsoluteError,
    "rmse": lambda: MeanSquaredError(squared=False),
}


class MeanOfSums(Metric):
    """The mean of a loss term over all structures that have its label.

    torchmetrics' `MeanMetric` leaves out a NaN, which would hide that a training has failed.
    """

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        """Start from nothing."""
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, total: Tensor, count: Tensor) -> None:
        """Add a batch's sum of ℓ_s and the number of structures in it."""
        self.total += total
        self.count += count

    def compute(self) -> Tensor:
        """Their ratio; NaN of nothing."""
        return self.total / self.count


def create_error_metrics(
    properties: Mapping[str, Sequence[str]] | Sequence[str], is_loss: bool = False
) -> dict[str, MetricCollection]:
    """One collection a quantity; sums in float64.

    Args:
        properties: metrics of each quantity, or the quantities alone, which means mae and rmse.
        is_loss: whether the quantities are terms of the loss: then the collection is their mean.

    Returns:
        Collections by quantity, whose values are named `energy_mae` (of a loss: `loss/energy`).
        The energy has `energy_per_atom` beside it.
    """
    if is_loss:
        collections = {
            name: MetricCollection({f"loss/{name}": MeanOfSums()}) for name in properties
        }
    else:
        chosen = dict(properties) if isinstance(properties, Mapping) else {}
        chosen = chosen or {name: ["mae", "rmse"] for name in properties}
        if "energy" in chosen:
            chosen["energy_per_atom"] = chosen["energy"]
        collections = {
            name: MetricCollection({f"{name}_{m}": METRICS[m]() for m in metrics})
            for name, metrics in chosen.items()
        }
    for collection in collections.values():
        collection.set_dtype(torch.float64)
    return collections


class SplitMetrics(nn.Module):
    """Losses and errors of one split."""

    def __init__(self, split: str, loss: Loss, measured: Mapping[str, Sequence[str]]) -> None:
        """Measure the terms of `loss`, and of each quantity the metrics named in `measured`."""
        super().__init__()
        self.split = split
        self.losses = create_error_metrics(list(loss.terms), is_loss=True)
        self.errors = create_error_metrics(measured)
        collections = [*self.losses.values(), *self.errors.values()]
        self._registered = nn.ModuleList(collections)  # so that they follow to a device
        for metric in self._by_name().values():
            metric._to_sync = False  # all at once, see `join`

    def update(
        self, sums: Mapping[str, Sum], prediction: Mapping[str, Tensor], batch: Batch
    ) -> None:
        """Add one batch."""
        for name, term in sums.items():
            self.losses[name].update(term.total.detach(), term.count)
        for name, collection in self.errors.items():
            predicted, reference = labelled_components(name, prediction, batch)
            if len(predicted):
                collection.update(predicted, reference)

    def compute(self, loss: Loss, weights: Mapping[str, float]) -> dict[str, float]:
        """All values by their names in the logs, `val/energy_mae`; `total_loss` of the means.

        What no structure of the split is labelled for is left out.
        """
        means = {name: self.losses[name].compute()[f"loss/{name}"] for name in self.losses}
        means = {name: mean for name, mean in means.items() if self._was_labelled(name)}
        values = {f"loss/{name}": mean for name, mean in means.items()}
        if means:
            values["loss/total_loss"] = loss.weighted(means, weights)
        for collection in self.errors.values():
            if any(metric.update_called for metric in collection.values()):
                values |= collection.compute()
        return {f"{self.split}/{name}": float(value) for name, value in values.items()}

    def _was_labelled(self, name: str) -> bool:
        """Whether any structure had the label of a term of the loss."""
        (metric,) = self.losses[name].values()
        assert isinstance(metric, MeanOfSums)
        return bool(metric.count > 0)

    def state(self) -> dict[str, dict[str, Tensor | int]]:
        """What was added so far, as tensors and numbers; of several processes, this one's share."""
        return {
            name: {"updates": metric._update_count}
            | {key: getattr(metric, key).clone() for key in metric._defaults}
            for name, metric in self._by_name().items()
        }

    def join(self, states: Sequence[Mapping[str, Mapping[str, Tensor | int]]]) -> None:
        """Have what several processes have added, in their order: the same in all of them."""
        if len(states) == 1:
            return
        for name, metric in self._by_name().items():
            parts = [state[name] for state in states]
            metric._update_count, metric._computed = sum(int(p["updates"]) for p in parts), None
            for key, reduction in metric._reductions.items():
                stacked = torch.stack([torch.as_tensor(part[key]) for part in parts])
                assert callable(reduction)  # sum, or max: never a list of all values
                setattr(metric, key, reduction(stacked).to(metric.device))

    def set_state(self, states: Mapping[str, Mapping[str, Tensor | int]]) -> None:
        """Go on from there."""
        metrics = self._by_name()
        for name, state in states.items():
            metric = metrics[name]
            for key in metric._defaults:
                setattr(metric, key, torch.as_tensor(state[key]).to(metric.device))
            metric._update_count, metric._computed = int(state["updates"]), None

    def _by_name(self) -> dict[str, Metric]:
        collections = [*self.losses.values(), *self.errors.values()]
        return {name: metric for found in collections for name, metric in found.items()}

    def reset(self) -> None:
        """Forget what was added."""
        for collection in (*self.losses.values(), *self.errors.values()):
            collection.reset()


def labelled_components(
    name: str, prediction: Mapping[str, Tensor], batch: Batch
) -> tuple[Tensor, Tensor]:
    """(predicted, reference) components of a quantity where it is labelled, flat, float64.

    `energy_per_atom` is the energy over the number of atoms.
    """
    source = name.removesuffix("_per_atom")
    predicted = prediction[source].detach().double()
    reference = batch.labels[source].double()
    if source != name:
        predicted, reference = predicted / batch.n_atoms, reference / batch.n_atoms
    mask = batch.labelled.get(source)
    if mask is not None:
        rows = mask[batch.structure] if LABELS[source].per == "atom" else mask
        predicted, reference = predicted[rows], reference[rows]
    return predicted.flatten(), reference.flatten()
