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

With weights of sources and elements, ℓ_s and the e of an atom are multiplied by them; what the sum
is divided by stays the number of structures, or atoms, that have the label.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from ase.data import atomic_numbers
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from runner.batches import Batch
from runner.config import (
    AtomLossConfig,
    EnergyLossConfig,
    LossConfig,
    LossTermConfig,
    OwnLossConfig,
    StageConfig,
    TermConfig,
)
from runner.errors import ConfigError, RunError, did_you_mean
from runner.fields import LABELS
from runner.foreign import find_class

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


class Term(nn.Module):
    """One term of the loss: a number ℓ_s for every structure.

    A term of your own is a class derived from this one, with `values` and `labels`; its constructor
    takes what its table in the config says beside `name`, `weight` and `by_source`.

    Attributes:
        labels: what it compares with, as `runner.fields` names it; the mean is over the structures
            that have all of it.
        quantities: what the potential has to predict for it; the same as `labels`, unless given.
        by_source: what structures count, by the number of their source; the others count 1.
        own: the key of its table, of a class of the user's.
    """

    labels: tuple[str, ...] = ()
    quantities: tuple[str, ...] | None = None

    def __init__(self) -> None:
        """Nothing is needed."""
        super().__init__()
        self.by_source: dict[int, float] = {}
        self.own = ""

    def values(
        self, prediction: Mapping[str, Tensor], batch: Batch
    ) -> Float[Tensor, " n_structures"]:
        """ℓ_s of every structure; what it is for one without the labels, 0 in here, is ignored.

        Args:
            prediction: by name, with shapes and units of `runner.fields`.
            batch: with `labels` of the same names.
        """
        raise NotImplementedError

    def counts(self, batch: Batch) -> Float[Tensor, " n_structures"]:
        """How often each structure counts in the mean that the term is."""
        return torch.ones_like(batch.n_atoms, dtype=batch.positions.dtype)

    def forward(self, prediction: Mapping[str, Tensor], batch: Batch) -> Sum:
        """Σ_s ℓ_s over the structures that have the labels, and their number."""
        labelled = self._labelled(batch)
        known = batch if labelled is None else _known(batch, self.labels)
        values = self._values(prediction, known)
        if labelled is not None:  # also in the gradient
            values = torch.where(labelled, values, 0.0)
        if self.by_source:
            values = values * weights_of(batch.source, self.by_source, values)
        return Sum(values.sum(), self.count(batch))

    def _values(self, prediction: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Those of a class of the user's, if they are what they have to be."""
        if not self.own:
            return self.values(prediction, batch)
        remedy = "values(self, prediction, batch) gives a number for every structure"
        try:
            values = self.values(prediction, batch)
            shape = tuple(values.shape)
        except (TypeError, LookupError, AttributeError, ValueError, NameError) as error:
            what = f"{type(self).__qualname__} fails: {type(error).__name__}: {error}"
            raise RunError(what, where=self.own, remedy=remedy) from error
        n = batch.n_atoms.shape[0]
        if len(shape) != 1 or (isinstance(shape[0], int) and shape[0] != n):
            raise RunError(
                f"the values of {type(self).__qualname__} have the shape {shape}",
                where=self.own,
                allowed=f"(n_structures,), here ({n},)",
                remedy=remedy,
            )
        return values

    def count(self, batch: Batch) -> Float[Tensor, ""]:
        """How many structures have the labels, or what else is counted of them."""
        labelled, counts = self._labelled(batch), self.counts(batch)
        return counts.sum() if labelled is None else torch.where(labelled, counts, 0.0).sum()

    def _labelled(self, batch: Batch) -> Bool[Tensor, " n_structures"] | None:
        """Which structures have all labels; None if they all have."""
        masks = [batch.labelled[name] for name in self.labels if name in batch.labelled]
        return None if not masks else torch.stack(masks).all(dim=0)


class PerStructureSquaredError(Term):
    """Mean over components of the squared deviation of a structure's quantity."""

    def __init__(self, name: str, config: LossTermConfig) -> None:
        """Compare the quantity `name`."""
        super().__init__()
        self.name, self.config, self.labels = name, config, (name,)
        self.per_atom = isinstance(config, EnergyLossConfig) and config.per_atom

    def values(
        self, prediction: Mapping[str, Tensor], batch: Batch
    ) -> Float[Tensor, " n_structures"]:
        """Mean over components of e(ŷ − y)."""
        components = _rows(prediction[self.name] - batch.labels[self.name])
        if self.per_atom:
            components = components / batch.n_atoms.unsqueeze(-1)
        return ERRORS[self.config.error](components, self.config.huber_delta).mean(dim=-1)


class PerAtomToStructureSquaredError(Term):
    """Squared deviation of the atoms' quantity, per atom and component of the structure.

    With `reduction = "atom"` all atoms of the batch count alike, instead of all structures. The
    deviations of an element's atoms are multiplied by its weight, if it has one.
    """

    def __init__(self, name: str, config: AtomLossConfig) -> None:
        """Compare the quantity `name`."""
        super().__init__()
        self.name, self.config, self.labels = name, config, (name,)
        self.pooled = config.reduction == "atom"
        self.by_element = {atomic_numbers[symbol]: w for symbol, w in config.by_element.items()}

    def values(
        self, prediction: Mapping[str, Tensor], batch: Batch
    ) -> Float[Tensor, " n_structures"]:
        """Σ_i Σ_k w_i e(ŷ_ik − y_ik) / K over atoms and components, over N_s unless pooled."""
        components = _rows(prediction[self.name] - batch.labels[self.name])
        values = ERRORS[self.config.error](components, self.config.huber_delta).mean(dim=-1)
        if self.by_element:
            values = values * weights_of(batch.atomic_numbers, self.by_element, values)
        summed = batch.sum_by_structure(values)
        return summed if self.pooled else summed / batch.n_atoms

    def counts(self, batch: Batch) -> Float[Tensor, " n_structures"]:
        """1 of every structure, or its atoms."""
        return batch.n_atoms.to(batch.positions.dtype) if self.pooled else super().counts(batch)


class TotalChargeError(PerStructureSquaredError):
    """(Σ_i q̂_i − Q)²: the charges of the atoms sum to the structure's."""


class DipoleMomentError(PerStructureSquaredError):
    """‖Σ_i q̂_i r_i − μ‖² / 3, about the origin of the positions as given."""


LOSSES: dict[str, Callable[[str, Any], Term]] = {
    "energy": PerStructureSquaredError,
    "forces": PerAtomToStructureSquaredError,
    "stress": PerStructureSquaredError,
    "total_charge": TotalChargeError,
    "dipole": DipoleMomentError,
    "quadrupole": PerStructureSquaredError,
    "charges": PerAtomToStructureSquaredError,
    "spin_multiplicity": PerStructureSquaredError,
}


def build_term(name: str, config: TermConfig, sources: Sequence[str] = ()) -> Term:
    """A term of the loss.

    Args:
        name: of the quantity, or what the user calls it.
        config: its table, `[train.loss.<name>]` or `[train.loss.own.<name>]`.
        sources: names of the dataset's sources.

    Raises:
        ConfigError: a class of the user's cannot be found or built, or there is no such source.
    """
    where = f"train.loss.{name}"
    if isinstance(config, OwnLossConfig):
        where = f"train.loss.own.{name}"
        kind = find_class(config.name, Term, f"{where}.name")
        try:
            term = kind(**config.hyperparameters)
            term.by_source  # noqa: B018 - there once Term's own constructor has run
            term.own = where
        except (TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"{config.name} cannot be built: {error}",
                where=where,
                remedy="its constructor takes the keys of its table, but name, weight and "
                "by_source, and begins with super().__init__()",
            ) from error
        unknown = [n for n in (*term.labels, *(term.quantities or ())) if n not in LABELS]
        if unknown:
            raise ConfigError(
                f"{config.name} asks for {unknown[0]}, which is no quantity",
                where=where,
                allowed=", ".join(LABELS),
            )
    else:
        term = LOSSES[name](name, config)
    term.by_source = {
        number_of(source, sources, f"{where}.by_source"): weight
        for source, weight in config.by_source.items()
    }
    return term


def number_of(source: str, sources: Sequence[str], where: str) -> int:
    """The number of a source, by its name.

    Raises:
        ConfigError: there is none of this name.
    """
    if source not in sources:
        few = ", ".join(sources[:10]) + (f" and {len(sources) - 10} more" if sources[10:] else "")
        hint = did_you_mean(source, sources)
        raise ConfigError(
            "; ".join(filter(None, [f'there is no source "{source}"', hint])),
            where=where,
            allowed=few,
        )
    return list(sources).index(source)


class Loss(nn.Module):
    """The weighted sum of all terms."""

    def __init__(
        self,
        config: LossConfig,
        stages: Sequence[StageConfig] = (),
        sources: Sequence[str] = (),
    ) -> None:
        """Build every term of the config; the weights change with the stages of the training.

        Args:
            config: the `[train.loss]` table.
            stages: of the training.
            sources: names of the dataset's sources.

        Raises:
            ConfigError: a class of the user's cannot be found or built, or there is no such source.
        """
        super().__init__()
        self.config, self.stages = config, list(stages)
        self.terms = nn.ModuleDict(
            {name: build_term(name, term, sources) for name, term in config.terms.items()}
        )

    def term(self, name: str) -> Term:
        """One of them."""
        term = self.terms[name]
        assert isinstance(term, Term)
        return term

    @property
    def labels(self) -> list[str]:
        """What is compared with."""
        return list(dict.fromkeys(x for name in self.terms for x in self.term(name).labels))

    @property
    def quantities(self) -> set[str]:
        """What a potential has to predict."""
        return {quantity for name in self.terms for quantity in self.quantities_of(name)}

    def quantities_of(self, name: str) -> tuple[str, ...]:
        """What it has to predict for one of the terms."""
        term = self.term(name)
        return term.labels if term.quantities is None else term.quantities

    def counts(self, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        """Over how many structures, or atoms, the mean of every term is; the labels tell."""
        return {name: self.term(name).count(batch) for name in self.terms}

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


def weights_of(
    kinds: Int64[Tensor, " n"], values: Mapping[int, float], like: Float[Tensor, "..."]
) -> Float[Tensor, " n"]:
    """The weight of each row by its kind, such as its element; 1 of those without."""
    weights = torch.ones_like(kinds, dtype=like.dtype)
    for kind, value in values.items():
        weights = torch.where(kinds == kind, value, weights)
    return weights


def _known(batch: Batch, names: Sequence[str]) -> Batch:
    """The batch with 0 for labels that are missing, which a gradient can pass through."""
    labels = dict(batch.labels)
    for name in names:
        if (mask := batch.labelled.get(name)) is not None:
            rows = mask[batch.structure] if LABELS[name].per == "atom" else mask
            there = rows.reshape(-1, *[1] * (labels[name].dim() - 1))
            labels[name] = torch.where(there, labels[name], 0.0)
    return replace(batch, labels=labels)


def _rows(difference: Float[Tensor, "n ..."]) -> Float[Tensor, "n components"]:
    """A row of components for each structure or atom, of which there may be none."""
    return difference.flatten(1) if difference.dim() > 1 else difference.unsqueeze(-1)
