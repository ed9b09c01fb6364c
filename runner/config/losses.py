"""`[train.loss]` and `[train.metrics]`: what is minimised, and what is measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from runner.config.values import (
    Count,
    NonNegative,
    Positive,
    Section,
    reject,
    require_elements,
    shown,
)
from runner.errors import did_you_mean
from runner.fields import LABELS


class WeightSchedule(Section):
    """A weight that goes from `start` to `end` over the first epochs, or steps."""

    start: NonNegative
    """Weight at the beginning."""
    end: NonNegative
    """Weight from the end of the change on."""
    epochs: Count | None = None
    """How long it changes,"""
    steps: Count | None = None
    """or how long in steps of the optimiser."""
    shape: Literal["linear", "cosine"] = "linear"
    """Along a straight line, or along half a cosine."""

    @model_validator(mode="after")
    def _one_length(self) -> WeightSchedule:
        if (self.epochs is None) == (self.steps is None):
            raise reject("a weight changes over so many epochs, or over so many steps: one of them")
        return self

    @property
    def highest(self) -> float:
        """The highest weight on the way."""
        return max(self.start, self.end)

    def at(self, epoch: int, step: float = 0.0) -> float:
        """The weight in an epoch, at a step, both counted from 0."""
        done = epoch / self.epochs if self.epochs is not None else step / (self.steps or 1)
        done = min(done, 1.0)
        if self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start + (self.end - self.start) * done


class PiecewiseWeight(Section):
    """A weight that has each of `values` from an epoch, or a step, on; the first from 0."""

    values: Annotated[list[NonNegative], Field(min_length=2)]
    """One after the other."""
    epochs: list[Count] | None = None
    """Epochs from which on there is another value, counted from 0,"""
    steps: list[Count] | None = None
    """or steps."""

    @model_validator(mode="after")
    def _bounds_fit(self) -> PiecewiseWeight:
        bounds = self.epochs if self.steps is None else self.steps
        both = self.epochs is not None and self.steps is not None
        fits = bounds is not None and len(bounds) == len(self.values) - 1
        if both or not fits or bounds != sorted(set(bounds or [])):
            raise reject(
                "a weight in pieces has the epochs, or the steps, at which it changes, one less "
                "than values: { values = [1.0, 10.0, 100.0], epochs = [20, 50] }"
            )
        return self

    @property
    def highest(self) -> float:
        """The highest weight on the way."""
        return max(self.values)

    def at(self, epoch: int, step: float = 0.0) -> float:
        """The weight in an epoch, at a step, both counted from 0."""
        bounds, now = (self.epochs, epoch) if self.epochs is not None else (self.steps or [], step)
        return self.values[sum(now >= bound for bound in bounds)]


def _weight(value: object) -> object:
    if isinstance(value, Mapping):
        kind = PiecewiseWeight if "values" in value else WeightSchedule
        return kind.model_validate(value)
    if isinstance(value, bool) or not isinstance(
        value, int | float | WeightSchedule | PiecewiseWeight
    ):
        raise reject(
            "a weight is a number, { start = 1.0, end = 10.0, epochs = 50 } or "
            "{ values = [1.0, 10.0], epochs = [20] }"
        )
    if isinstance(value, int | float) and not 0 <= value < math.inf:
        raise reject("a weight is finite and not negative")
    return value


class TermConfig(Section):
    """What every term of the loss has."""

    weight: Annotated[float | WeightSchedule | PiecewiseWeight, BeforeValidator(_weight)] = 1.0
    """A number, or a schedule over epochs or steps."""
    by_source: dict[str, NonNegative] = {}
    """What structures of a source count, by the name of its file; those not named count 1. The mean
    stays one over all structures that have the label."""

    def weight_at(self, epoch: int, step: float = 0.0) -> float:
        """The weight in an epoch, at a step, both counted from 0."""
        weight = self.weight
        return weight if isinstance(weight, int | float) else weight.at(epoch, step)

    @property
    def highest_weight(self) -> float:
        """The highest weight on the way."""
        return self.weight if isinstance(self.weight, int | float) else self.weight.highest


class LossTermConfig(TermConfig):
    """A term of the loss that compares a quantity with its label."""

    error: Literal["squared", "absolute", "huber"] = "squared"
    """Function of a component's deviation."""
    huber_delta: Positive = 1.0
    """Where the Huber error turns from squared to linear, in the label's unit."""


class EnergyLossConfig(LossTermConfig):
    """The energy's term of the loss."""

    per_atom: bool = False
    """Divide the deviation by the number of atoms, before it is squared."""


class AtomLossConfig(LossTermConfig):
    """A term of the loss over a quantity of the atoms."""

    reduction: Literal["structure", "atom"] = "structure"
    """`structure`: structures count alike; `atom`: all atoms of the batch count alike."""
    by_element: dict[str, NonNegative] = {}
    """What atoms of an element count, by its symbol; those not named count 1."""

    @model_validator(mode="after")
    def _known_elements(self) -> AtomLossConfig:
        require_elements(self.by_element)
        return self


class OwnLossConfig(TermConfig):
    """A term of the loss that is a class of yours, derived from `runner.losses.Term`. All further
    keys go to its constructor."""

    model_config = ConfigDict(extra="allow")

    name: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]
    """`"package.module:Class"`."""

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """What goes to the constructor."""
        return dict(self.model_extra or {})


class LossConfig(Section):
    """`[train.loss]`: the terms, by the quantity that they compare."""

    energy: EnergyLossConfig | None = None
    forces: AtomLossConfig | None = None
    stress: LossTermConfig | None = None
    total_charge: LossTermConfig | None = None
    dipole: LossTermConfig | None = None
    quadrupole: LossTermConfig | None = None
    charges: AtomLossConfig | None = None
    spin_multiplicity: LossTermConfig | None = None
    own: dict[str, OwnLossConfig] = {}
    """Terms of your own, by what they are called in the logs: `[train.loss.own.angle]`."""

    @model_validator(mode="after")
    def _own_names(self) -> LossConfig:
        for name in self.own:
            if name in LABELS or name == "total_loss" or not name.isidentifier():
                raise reject(
                    f"a term of your own cannot be called {name}: it needs a name of letters, "
                    "digits and underscores that is no quantity's"
                )
        return self

    @model_validator(mode="after")
    def _some_term(self) -> LossConfig:
        if not self.terms:
            raise reject("the loss has no term; add for example [train.loss.energy]")
        return self

    @property
    def terms(self) -> dict[str, TermConfig]:
        """The terms that are there, by name."""
        named = {name: getattr(self, name) for name in type(self).model_fields if name != "own"}
        return {name: term for name, term in named.items() if term is not None} | self.own


METRIC_NAMES = ("mae", "rmse", "max_error", "r2", "cosine")


def _metric(name: object) -> object:
    if not isinstance(name, str) or not (name in METRIC_NAMES or ":" in name):
        hint = did_you_mean(str(name), METRIC_NAMES)
        allowed = f'it is one of {", ".join(METRIC_NAMES)}, or "package.module:Class"'
        raise reject("; ".join(filter(None, [f"found {shown(name)}", hint, allowed])))
    return name


_METRIC_SCHEMA: dict[str, Any] = {
    "anyOf": [{"enum": list(METRIC_NAMES)}, {"type": "string", "pattern": ":"}]
}
MetricName = Annotated[str, BeforeValidator(_metric), WithJsonSchema(_METRIC_SCHEMA)]
MetricNames = Annotated[list[MetricName], Field(min_length=1)]


class MetricsConfig(Section):
    """`[train.metrics]`: which errors are measured of which quantity: `mae`, `rmse`, `max_error`,
    `r2` of its components, `cosine` of the angle between vectors, on average, or
    `"package.module:Class"`: a class of torchmetrics, or yours derived from `torchmetrics.Metric`,
    made without arguments and updated with predicted and reference components, both flat."""

    by: list[Literal["element", "source", "size", "charge"]] = []
    """Validation and test errors also apart: of the atoms of each element, and of the structures
    of each source, of similar numbers of atoms (1, 2, 3–4, 5–8, …), or of each total charge."""
    energy: MetricNames | None = None
    """Offset-corrected; the same of the energy per atom comes with it."""
    forces: MetricNames | None = None
    """Components of the forces on all atoms."""
    stress: MetricNames | None = None
    """Nine components a structure."""
    total_charge: MetricNames | None = None
    """Sums of the predicted charges."""
    dipole: MetricNames | None = None
    """Three components a structure."""
    quadrupole: MetricNames | None = None
    """Nine components a structure."""
    charges: MetricNames | None = None
    """Charges of all atoms."""
    spin_multiplicity: MetricNames | None = None
    """2S + 1 of the structures."""

    @model_validator(mode="after")
    def _cosines_of_vectors(self) -> MetricsConfig:
        for name, metrics in self.properties.items():
            if "cosine" in metrics and LABELS[name].shape != (3,):
                raise reject(f"{name} has no direction, so there is no cosine of it")
        return self

    @property
    def properties(self) -> dict[str, list[str]]:
        """The metrics of every quantity that has some."""
        named = {name: getattr(self, name) for name in type(self).model_fields if name != "by"}
        return {name: list(metrics) for name, metrics in named.items() if metrics is not None}
