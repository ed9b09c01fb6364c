"""Metrics: errors over a whole split. An epoch's value comes from sums, never from batch means.

Over all components ŷ_k, y_k of a quantity, of all atoms or structures of a split that are labelled:

=============  ====================================================================
`mae`          Σ|ŷ − y| / n
`rmse`         √(Σ(ŷ − y)² / n)
`max_error`    max |ŷ − y|
`r2`           1 − Σ(ŷ − y)² / Σ(y − ȳ)²; left out where all y are the same
`cosine`       mean over vectors of ŷ·y / (‖ŷ‖ ‖y‖); vectors of no length left out
=============  ====================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ase.data import chemical_symbols
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from runner.batches import Batch
from runner.errors import ConfigError
from runner.fields import LABELS, Field, Per
from runner.foreign import find_class
from runner.losses import Loss, Sum

Columns = Mapping[str, Float[Tensor, " n_groups"]]
Value = tuple[Tensor, Tensor]

COLUMNS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "count": lambda _, y: y.new_full((len(y),), y.shape[1]),
    "absolute": lambda guess, y: (guess - y).abs().sum(dim=1),
    "squared": lambda guess, y: (guess - y).square().sum(dim=1),
    "reference": lambda _, y: y.sum(dim=1),
    "reference_squared": lambda _, y: y.square().sum(dim=1),
    "vectors": lambda _, y: (y != 0).any(dim=1).to(y.dtype),
    "cosines": lambda guess, y: nn.functional.cosine_similarity(guess, y, dim=1, eps=1e-30),
}
"""What is summed, of (predicted, reference) with a row of components an atom or structure."""


@dataclass(frozen=True)
class Measure:
    """One metric, made of sums.

    Attributes:
        columns: the sums that it needs beside `count`, and `largest`.
        value: of the sums, with what it was divided by: where that is 0, there is no value.
        has_unit: whether it has the quantity's unit.
    """

    columns: tuple[str, ...]
    value: Callable[[Columns], Value]
    has_unit: bool = True


def _r2(sums: Columns) -> Value:
    squares = sums["reference_squared"]
    variation = squares - sums["reference"].square() / sums["count"]
    variation = torch.where(variation > 1e-12 * squares, variation, 0.0)  # beyond rounding
    return 1 - sums["squared"] / variation, variation


METRICS: dict[str, Measure] = {
    "mae": Measure(("absolute",), lambda s: (s["absolute"] / s["count"], s["count"])),
    "rmse": Measure(("squared",), lambda s: ((s["squared"] / s["count"]).sqrt(), s["count"])),
    "max_error": Measure((), lambda s: (s["largest"], s["count"])),
    "r2": Measure(("squared", "reference", "reference_squared"), _r2, has_unit=False),
    "cosine": Measure(
        ("cosines", "vectors"), lambda s: (s["cosines"] / s["vectors"], s["vectors"]), False
    ),
}


class Errors(Metric):
    """Metrics of one quantity, over all its components and in groups of them, from sums."""

    sums: Tensor
    largest: Tensor

    def __init__(self, name: str, metrics: Sequence[str], groups: Sequence[str] = ("",)) -> None:
        """Start from nothing.

        Args:
            name: of the quantity; the names of the values begin with it.
            metrics: names from `METRICS`.
            groups: names of the groups; the names of their values end with them.
        """
        super().__init__()
        self.quantity, self.metrics, self.groups = name, list(metrics), list(groups)
        self.width = 3 if "cosine" in metrics else 1  # components of what is looked at together
        needed = {column for name in metrics for column in METRICS[name].columns}
        self.columns = ["count", *sorted(needed)]
        self.finds_largest = "max_error" in metrics
        empty = torch.zeros(len(groups), len(self.columns), dtype=torch.float64)
        self.add_state("sums", empty, dist_reduce_fx="sum")
        self.add_state("largest", empty[:, 0].clone(), dist_reduce_fx="max")

    def update(
        self,
        predicted: Float[Tensor, " n"],
        reference: Float[Tensor, " n"],
        groups: Int64[Tensor, " n_rows"] | None = None,
    ) -> None:
        """Add components.

        Args:
            predicted: one after the other.
            reference: of the same.
            groups: the group of each vector, tensor or number that they are components of.
        """
        if not len(reference):
            return
        width = self.width if groups is None else len(reference) // len(groups)
        guess, y = predicted.reshape(-1, width), reference.reshape(-1, width)
        columns = torch.stack([COLUMNS[name](guess, y) for name in self.columns], dim=1)
        if groups is None:
            self.sums += columns.sum(dim=0)
        else:
            self.sums.index_add_(0, groups, columns)
        if self.finds_largest:
            errors = (guess - y).abs().amax(dim=1)
            groups = torch.zeros_like(errors, dtype=torch.int64) if groups is None else groups
            self.largest.scatter_reduce_(0, groups, errors, "amax")

    def compute(self) -> dict[str, Tensor]:
        """Values by name, of what there is."""
        sums = dict(zip(self.columns, self.sums.unbind(1), strict=True))
        sums["largest"] = self.largest
        found: dict[str, Tensor] = {}
        for metric in self.metrics:
            values, divisors = METRICS[metric].value(sums)
            for row in torch.nonzero(sums["count"] > 0).flatten().tolist():
                if divisors[row] > 0 or divisors[row].isnan():
                    found[f"{self.quantity}_{metric}{self.groups[row]}"] = values[row]
        return found


class TermSums(Metric):
    """The mean of a loss term over all structures that have its label.

    torchmetrics' `MeanMetric` leaves out a NaN, which would hide that a training has failed.
    """

    total: Tensor
    count: Tensor
    whole: Tensor

    def __init__(self, name: str) -> None:
        """Start from nothing."""
        super().__init__()
        self.term = name
        for state in ("total", "count", "whole"):
            self.add_state(state, torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, total: Tensor, count: Tensor, whole: Tensor | float | None = None) -> None:
        """Add a batch.

        Args:
            total: sum of ℓ_s.
            count: structures, or atoms, that it is over.
            whole: how many there would be with every label there; as many, unless given.
        """
        self.total += total
        self.count += count
        self.whole += count if whole is None else whole

    def compute(self) -> dict[str, Tensor]:
        """Their ratio, if the label was there at all, and how much of it was."""
        found = {f"coverage/{self.term}": self.count / self.whole.clamp(min=1)}
        if self.count > 0:
            found[f"loss/{self.term}"] = self.total / self.count
        return found


def create_error_metrics(
    properties: Mapping[str, Sequence[str]] | Sequence[str], is_loss: bool = False
) -> dict[str, MetricCollection]:
    """One collection a quantity; sums in float64.

    Args:
        properties: metrics of each quantity, or the quantities alone, which means mae and rmse.
        is_loss: whether the quantities are terms of the loss: then the collection is their mean.

    Returns:
        Collections by quantity, whose values are named `energy_mae` (of a loss: `loss/energy`, with
        `coverage/energy`, the share of labels that were there). The energy has `energy_per_atom`
        beside it.

    Raises:
        ConfigError: a class of the user's cannot be found, or is no metric of two flat tensors.
    """
    members: dict[str, dict[str, Metric | MetricCollection]] = {}
    if is_loss:
        members = {name: {name: TermSums(name)} for name in properties}
    else:
        for name, metrics in _with_energy_per_atom(properties).items():
            members[name] = {name: Errors(name, [m for m in metrics if m in METRICS])}
            own = [m for m in metrics if m not in METRICS]
            members[name] |= {own_name(name, m): own_metric(m, name) for m in own}
    collections = {
        name: MetricCollection(metrics, compute_groups=False) for name, metrics in members.items()
    }
    for collection in collections.values():
        collection.set_dtype(torch.float64)
    return collections


def _with_energy_per_atom(
    properties: Mapping[str, Sequence[str]] | Sequence[str],
) -> dict[str, Sequence[str]]:
    """The metrics of every quantity; the energy's of the energy per atom too."""
    usual = dict.fromkeys(properties, ("mae", "rmse"))
    chosen = dict(properties) if isinstance(properties, Mapping) else usual
    return chosen | ({"energy_per_atom": chosen["energy"]} if "energy" in chosen else {})


def own_name(quantity: str, metric: str) -> str:
    """What the value of a metric of the user's is called: `forces_Class`."""
    return f"{quantity}_{metric.rpartition(':')[2]}"


def own_metric(metric: str, quantity: str) -> Metric:
    """A metric of the user's, or another of torchmetrics.

    Raises:
        ConfigError: it cannot be found, or is no metric of two flat tensors.
    """
    where = f"train.metrics.{quantity.removesuffix('_per_atom')}"
    kind: type[Metric] = find_class(metric, Metric, where, allowed=", ".join(METRICS))  # type: ignore[type-abstract]
    try:
        made = kind().set_dtype(torch.float64)
        made.update(*torch.tensor([[0.0, 1.0, 2.0], [0.5, 1.0, 4.0]], dtype=torch.float64))
        value = made.compute()
        if not isinstance(value, Tensor) or value.dim():
            raise TypeError(f"it gives {value!r} instead of one number")
    except Exception as error:  # whatever a class of somebody else's may do
        raise ConfigError(
            f"{metric} does not do as a metric: {error}",
            where=where,
            remedy="it has to be made without arguments, and updated with two tensors of one "
            "dimension, predicted and reference components; derive a class that is",
        ) from error
    made.reset()
    return made


def quantity_of(name: str) -> Field:
    """The quantity that `energy_per_atom`, or a value such as `forces_mae`, is of."""
    found = [label for label in LABELS if name == label or name.startswith(f"{label}_")]
    return LABELS[max(found, key=len)]


def has_unit(name: str) -> bool:
    """Whether a value such as `forces_mae` has the unit of its quantity."""
    metric = name.removeprefix(f"{quantity_of(name).name}_").removeprefix("per_atom_")
    measure = METRICS.get(metric.partition("_by_")[0])
    return measure is not None and measure.has_unit


@dataclass(frozen=True)
class Grouping:
    """Groups of structures, or of atoms, of which errors are measured apart.

    Attributes:
        by: what they have in common.
        names: of all groups that there may be.
        of: gives the number of the group of each structure of a batch, or each of its atoms.
        per: which of the two.
    """

    by: str
    names: list[str]
    of: Callable[[Batch], Tensor]
    per: Per = "structure"

    def fits(self, quantity: str) -> bool:
        """Whether the values of a quantity belong to such groups."""
        return self.per == "structure" or quantity_of(quantity).per == "atom"

    def errors(self, quantity: str, metrics: Sequence[str]) -> Errors:
        """The errors of a quantity in each group, by names such as `forces_mae_by_element/H`."""
        measured = [name for name in metrics if name in METRICS]
        return Errors(quantity, measured, [f"_by_{self.by}/{name}" for name in self.names])

    def rows(self, batch: Batch, per: Per) -> Int64[Tensor, " n"]:
        """The group of each structure of a batch, or of each atom."""
        groups = self.of(batch)
        return groups[batch.structure] if per == "atom" and self.per == "structure" else groups


LARGEST_CHARGE = 100
BATCHES_TOGETHER = 10  # are added to the sums at once, which is ten times as fast


def groupings(by: Sequence[str], sources: Sequence[str] = ()) -> list[Grouping]:
    """What errors are measured apart of.

    Args:
        by: names as in `train.metrics.by`.
        sources: names of the dataset's sources.
    """
    sizes = ["1", "2", *[f"{2 ** (n - 1) + 1}-{2**n}" for n in range(2, 40)]]
    charges = [f"{charge:+d}" for charge in range(-LARGEST_CHARGE, LARGEST_CHARGE + 1)]
    charges[LARGEST_CHARGE] = "0"
    known = (
        Grouping("element", chemical_symbols, lambda batch: batch.atomic_numbers, "atom"),
        Grouping("source", list(sources), lambda batch: batch.source),
        Grouping("size", sizes, lambda batch: batch.n_atoms.double().log2().ceil().long()),
        Grouping("charge", [*charges, "unknown"], _charge),
    )
    return [grouping for grouping in known if grouping.by in by]


def _charge(batch: Batch) -> Int64[Tensor, " n_structures"]:
    """Which of the charges each structure has; the last of all, if that is not known."""
    charge = batch.labels["total_charge"].round() + LARGEST_CHARGE
    known = (charge >= 0) & (charge <= 2 * LARGEST_CHARGE)
    return torch.where(known, charge, 2 * LARGEST_CHARGE + 1).long()


class SplitMetrics(nn.Module):
    """Losses and errors of one split."""

    def __init__(
        self,
        split: str,
        loss: Loss,
        measured: Mapping[str, Sequence[str]],
        groupings: Sequence[Grouping] = (),
    ) -> None:
        """Measure the terms of `loss`, and errors.

        Args:
            split: its name.
            loss: whose terms are measured.
            measured: the metrics of each quantity.
            groupings: of what errors are measured apart, beside those of all.
        """
        super().__init__()
        self.split, self.groupings = split, list(groupings)
        self._counts = {name: loss.term(name).counts for name in loss.terms}
        self.losses = create_error_metrics(list(loss.terms), is_loss=True)
        self.errors = create_error_metrics(measured)
        self.apart: dict[str, dict[str, Errors]] = {
            name: {
                grouping.by: grouping.errors(name, _with_energy_per_atom(measured)[name])
                for grouping in self.groupings
                if grouping.fits(name)
            }
            for name in self.errors
        }
        apart = [errors for found in self.apart.values() for errors in found.values()]
        self._waiting: list[dict[str, tuple[Tensor, ...]]] = []
        # so that they follow to a device
        self._registered = nn.ModuleList([*self.losses.values(), *self.errors.values(), *apart])
        for metric in self._by_name().values():
            metric._to_sync = False  # all at once, see `join`

    def update(
        self, sums: Mapping[str, Sum], prediction: Mapping[str, Tensor], batch: Batch
    ) -> None:
        """Add one batch."""
        found: dict[str, tuple[Tensor, ...]] = {}
        for name, term in sums.items():
            whole = self._counts[name](batch).sum() if batch.labelled else term.count
            found[name] = (term.total.detach(), term.count, whole)
        for name in self.errors:
            predicted, reference, there = labelled_components(name, prediction, batch)
            found[f"errors {name}"] = (predicted, reference)
            for grouping in self.groupings:
                if grouping.fits(name):
                    rows = grouping.rows(batch, quantity_of(name).per)
                    rows = rows if there is None else rows[there]
                    found[f"{name} by {grouping.by}"] = (predicted, reference, rows)
        self._waiting.append(found)
        if len(self._waiting) >= BATCHES_TOGETHER:
            self._add()

    def _add(self) -> None:
        """Add the batches that wait, at once."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        columns = {
            key: list(zip(*(found[key] for found in waiting), strict=True)) for key in waiting[0]
        }
        for name, collection in self.losses.items():
            collection.update(*(torch.stack(c).double().sum() for c in columns[name]))
        for name, collection in self.errors.items():
            predicted, reference = (torch.cat(c) for c in columns[f"errors {name}"])
            for metric in collection.values(copy_state=False):
                if isinstance(metric, Errors) or len(reference):
                    metric.update(predicted, reference)
            for by, errors in self.apart[name].items():
                rows = torch.cat(columns[f"{name} by {by}"][2])
                errors.update(predicted, reference, rows)

    def compute(self, loss: Loss, weights: Mapping[str, float]) -> dict[str, float]:
        """All values by their names in the logs, `val/energy_mae`; `total_loss` of the means.

        What no structure of the split is labelled for is left out. Of the terms of the training
        loss there are also `coverage`, the share of structures, or atoms, that had the label, and
        `share`, the part of the total that a term was with its weight.
        """
        self._add()
        terms: dict[str, Tensor] = {}
        for collection in self.losses.values():
            terms |= collection.compute()
        means = {n: terms[f"loss/{n}"] for n in self.losses if f"loss/{n}" in terms}
        found = {f"loss/{name}": mean for name, mean in means.items()}
        if means:
            total = found["loss/total_loss"] = loss.weighted(means, weights)
            if self.split == "train":
                found |= {name: value for name, value in terms.items() if name not in found}
                shares = {n: weights[n] * mean / total for n, mean in means.items() if total > 0}
                found |= {f"share/{name}": share for name, share in shares.items()}
        for name, collection in self.errors.items():
            for metric in (*collection.values(copy_state=False), *self.apart[name].values()):
                if isinstance(metric, Errors):
                    found |= metric.compute()
                elif metric.update_called:
                    found[own_name(name, type(metric).__name__)] = metric.compute()
        return {f"{self.split}/{name}": float(value) for name, value in found.items()}

    def state(self) -> dict[str, Any]:
        """What was added so far, as tensors and numbers; of several processes, this one's share."""
        sums = {
            name: {"updates": metric._update_count}
            | {key: _copied(getattr(metric, key), torch.device("cpu")) for key in metric._defaults}
            for name, metric in self._by_name().items()
        }
        return {"sums": sums, "waiting": list(self._waiting)}

    def join(self, gather: Callable[[Any], list[Any]]) -> None:
        """Have what several processes have added, in their order: the same in all of them.

        Args:
            gather: gives what each process has given to it.
        """
        self._add()
        states = gather(self.state()["sums"])
        for name, metric in self._by_name().items():
            parts = [state[name] for state in states]
            metric._update_count, metric._computed = sum(int(p["updates"]) for p in parts), None
            for key, reduction in metric._reductions.items():
                setattr(metric, key, _reduced([part[key] for part in parts], reduction, metric))

    def set_state(self, states: Mapping[str, Any]) -> None:
        """Go on from there, to the bit: what waits still waits."""
        device = next(iter(self._by_name().values())).device
        self._waiting = [
            {key: tuple(tensor.to(device) for tensor in found[key]) for key in found}
            for found in states["waiting"]
        ]
        metrics = self._by_name()
        for name, state in states["sums"].items():
            metric = metrics[name]
            for key in metric._defaults:
                setattr(metric, key, _copied(state[key], metric.device))
            metric._update_count, metric._computed = int(state["updates"]), None

    def _by_name(self) -> dict[str, Metric]:
        found: dict[str, Metric] = {f"loss {n}": self.losses[n][n] for n in self.losses}
        for name, collection in self.errors.items():
            found |= {f"errors {n}": m for n, m in collection.items()}
            found |= {f"{name} by {by}": errors for by, errors in self.apart[name].items()}
        return found

    def reset(self) -> None:
        """Forget what was added."""
        self._waiting = []
        for metric in self._by_name().values():
            metric.reset()


def _reduced(parts: Sequence[Any], reduction: Any, metric: Metric) -> Tensor | list[Tensor]:
    """A state of several processes as one, as torchmetrics has it."""
    if isinstance(parts[0], list):
        return [tensor.to(metric.device) for part in parts for tensor in part]
    stacked = torch.stack([part.to(metric.device) for part in parts])
    return stacked if reduction is None else reduction(stacked)


def _copied(state: Tensor | list[Tensor], device: torch.device) -> Tensor | list[Tensor]:
    """A state of a metric, a tensor or a list of them, elsewhere."""
    if isinstance(state, Tensor):
        return state.detach().clone().to(device)
    return [tensor.detach().clone().to(device) for tensor in state]


def labelled_components(
    name: str, prediction: Mapping[str, Tensor], batch: Batch
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Bool[Tensor, " n_rows"] | None]:
    """(predicted, reference) components of a quantity where it is labelled, flat, float64; where.

    `energy_per_atom` is the energy over the number of atoms. Where it is labelled is a mask of the
    atoms or structures, None of all.
    """
    source = name.removesuffix("_per_atom")
    predicted = prediction[source].detach().double()
    reference = batch.labels[source].double()
    if source != name:
        predicted, reference = predicted / batch.n_atoms, reference / batch.n_atoms
    mask = batch.labelled.get(source)
    rows = None
    if mask is not None:
        rows = mask[batch.structure] if LABELS[source].per == "atom" else mask
        predicted, reference = predicted[rows], reference[rows]
    return predicted.flatten(), reference.flatten(), rows
