"""How weights are changed: optimisers, schedules, averages, stages."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator

from runner.config.potentials import FOREIGN
from runner.config.values import Count, NonNegative, Positive, Section, reject


class OptimizerConfig(Section):
    """What every optimiser has. Weight decay is for matrices of weights alone: biases, the weights
    of norms, and scale and shift of the energies have none."""

    name: str
    lr: Positive = 1e-3
    """Learning rate."""
    weight_decay: NonNegative = 0.01
    """How strongly matrices of weights are drawn to zero."""


_Share = Annotated[float, Field(ge=0, lt=1)]
_Betas = Annotated[list[_Share], Field(min_length=2, max_length=2)]


class AdamWConfig(OptimizerConfig):
    """Adam with decoupled weight decay (Loshchilov and Hutter, ICLR 2019, arXiv:1711.05101)."""

    name: Literal["adamw"] = "adamw"
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay."""
    betas: _Betas = [0.9, 0.999]
    """Decay of the averages of the gradient and of its square."""
    eps: Positive = 1e-8
    """Added to the root of the latter."""
    amsgrad: bool = False
    """Divide by the largest such root so far."""


class AdamConfig(AdamWConfig):
    """Adam (Kingma and Ba, ICLR 2015, arXiv:1412.6980); the other keys are those of `adamw`."""

    name: Literal["adam"]  # type: ignore[assignment]
    weight_decay: NonNegative = 0.0
    """Added to the gradient as weights times this."""


class SGDConfig(OptimizerConfig):
    """Stochastic gradient descent."""

    name: Literal["sgd"]
    weight_decay: NonNegative = 0.0
    """Added to the gradient as weights times this."""
    momentum: _Share = 0.9
    """Share of the last step in a step."""
    nesterov: bool = True
    """Whether the momentum looks ahead."""

    @model_validator(mode="after")
    def _momentum_to_look_with(self) -> SGDConfig:
        if self.nesterov and not self.momentum:
            raise reject("nesterov needs a momentum; set one, or nesterov = false")
        return self


class MuonConfig(OptimizerConfig):
    """Muon for the matrices of weights, whose momentum it makes orthogonal; AdamW for the others,
    and for embeddings of elements (Jordan et al. 2024, kellerjordan.github.io/posts/muon). Rates
    are matched to those of AdamW, so both have the same (Liu et al. 2025, arXiv:2502.16982)."""

    name: Literal["muon"]
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay, of both."""
    momentum: _Share = 0.95
    """Of Muon."""
    betas: _Betas = [0.9, 0.999]
    """Of AdamW."""


class ScheduleFreeConfig(OptimizerConfig):
    """AdamW whose weights are averaged on the way, instead of a schedule of the learning rate
    (Defazio et al., NeurIPS 2024, arXiv:2405.15682); the extra `schedule-free` installs it."""

    name: Literal["schedule_free"]
    lr: Positive = 2.5e-3
    """Learning rate; somewhat above that of AdamW."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay."""
    betas: _Betas = [0.9, 0.999]
    """Between average and fast weights, and decay of the average of the gradient's square."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps in which the rate rises to `lr`."""


class ForeignOptimizerConfig(OptimizerConfig):
    """A class of `torch.optim`, or of yours. All further keys go to its constructor, which checks
    them; weight decay only if it is given."""

    model_config = ConfigDict(extra="allow")

    name: str
    """`"torch.optim:NAdam"`, `"package.module:Class"`."""
    weight_decay: NonNegative | None = None  # type: ignore[assignment]
    """Goes to the class for matrices of weights, and 0 for the others; unless given, it has its
    own."""

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """What goes to the constructor beside rate and weight decay."""
        return dict(self.model_extra or {})


def _kind_of_optimizer(value: Any) -> str:
    """Which class a `[train.optimizer]` table is of, as its `name` tells."""
    given = isinstance(value, Mapping)
    name = value.get("name", "adamw") if given else getattr(value, "name", "")
    return FOREIGN if ":" in str(name) else str(name)


AnyOptimizerConfig = Annotated[
    Annotated[AdamWConfig, Tag("adamw")]
    | Annotated[AdamConfig, Tag("adam")]
    | Annotated[SGDConfig, Tag("sgd")]
    | Annotated[MuonConfig, Tag("muon")]
    | Annotated[ScheduleFreeConfig, Tag("schedule_free")]
    | Annotated[ForeignOptimizerConfig, Tag(FOREIGN)],
    Discriminator(_kind_of_optimizer),
]


class ScheduleConfig(Section):
    """How the learning rate changes, in epochs, of which parts count."""

    name: str
    warmup: NonNegative = 0.0
    """Epochs in which the rate rises in a straight line from zero."""

    def relative_rate(self, epoch: float, epochs: int) -> float:
        """What the rate of the optimiser is multiplied by.

        Args:
            epoch: that are done, with the part of the one that is under way.
            epochs: of the whole training.
        """
        if epoch < self.warmup:
            return epoch / self.warmup
        return self.after_warmup(epoch - self.warmup, max(epochs - self.warmup, 1e-9))

    def after_warmup(self, epoch: float, epochs: float) -> float:  # noqa: ARG002
        """The same with the warm-up taken off."""
        return 1.0


class ConstantConfig(ScheduleConfig):
    """The rate stays as it is."""

    name: Literal["constant"]


class PlateauConfig(ScheduleConfig):
    """The rate is lowered when the validation loss no longer improves."""

    name: Literal["reduce_on_plateau"] = "reduce_on_plateau"
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """What the rate is multiplied by on a plateau of the validation loss."""
    patience: Count = 10
    """Epochs in a row without improvement, of one part in 10,000 at least, that are let pass; after
    one more the rate is lowered."""
    min_lr: NonNegative = 1e-6
    """The rate does not go below this."""


class CosineConfig(ScheduleConfig):
    """Down half a cosine (Loshchilov and Hutter, ICLR 2017, arXiv:1608.03983, eq. 5)."""

    name: Literal["cosine"]
    end: _Share = 0.0
    """Rate at the end, in units of the optimiser's."""

    def after_warmup(self, epoch: float, epochs: float) -> float:
        """Half a cosine from 1 to `end`."""
        done = min(epoch / epochs, 1.0)
        return self.end + (1 - self.end) * (1 + math.cos(math.pi * done)) / 2


class CosineRestartsConfig(ScheduleConfig):
    """Down half a cosine, again and again (Loshchilov and Hutter, arXiv:1608.03983)."""

    name: Literal["cosine_restarts"]
    period: Positive
    """Epochs of the first cosine."""
    growth: Annotated[float, Field(ge=1)] = 1.0
    """Each period is this many times as long as the one before."""
    end: _Share = 0.0
    """Rate at the end of each, in units of the optimiser's."""

    def after_warmup(self, epoch: float, epochs: float) -> float:  # noqa: ARG002
        """Half a cosine from 1 to `end`, of the period that it is in."""
        if self.growth == 1:
            periods = epoch / self.period
            done = max(periods - math.floor(periods + 1e-12), 0.0)
        else:  # the n-th period starts after period · (growthⁿ − 1)/(growth − 1)
            relative = epoch / self.period
            n = math.floor(math.log(relative * (self.growth - 1) + 1, self.growth) + 1e-12)
            started = (self.growth**n - 1) / (self.growth - 1)
            done = (relative - started) / self.growth**n
        return self.end + (1 - self.end) * (1 + math.cos(math.pi * done)) / 2


class OneCycleConfig(ScheduleConfig):
    """Up to the optimiser's rate and down again, along cosines (Smith and Topin 2018,
    arXiv:1708.07120, with the shape of `torch.optim.lr_scheduler.OneCycleLR`; the momentum stays
    as it is)."""

    name: Literal["one_cycle"]
    rise: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Part of the training in which the rate goes up."""
    start: _Share = 0.04
    """Rate at the beginning, in units of the optimiser's."""
    end: _Share = 4e-6
    """Rate at the end."""

    def after_warmup(self, epoch: float, epochs: float) -> float:
        """From `start` to 1 to `end`."""
        done = min(epoch / epochs, 1.0)
        if done < self.rise:
            return 1 - (1 - self.start) * (1 + math.cos(math.pi * done / self.rise)) / 2
        down = (done - self.rise) / (1 - self.rise)
        return self.end + (1 - self.end) * (1 + math.cos(math.pi * down)) / 2


class ExponentialConfig(ScheduleConfig):
    """Multiplied by the same every epoch."""

    name: Literal["exponential"]
    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """By this."""

    def after_warmup(self, epoch: float, epochs: float) -> float:  # noqa: ARG002
        """γ to the power of the epoch."""
        return float(self.gamma**epoch)


class LinearConfig(ScheduleConfig):
    """Down a straight line."""

    name: Literal["linear"]
    end: _Share = 0.0
    """Rate at the end, in units of the optimiser's."""

    def after_warmup(self, epoch: float, epochs: float) -> float:
        """From 1 to `end`."""
        return 1 + (self.end - 1) * min(epoch / epochs, 1.0)


def _kind_of_schedule(value: Any) -> str:
    """Which class a `[train.schedule]` table is of, as its `name` tells."""
    given = isinstance(value, Mapping)
    return str(value.get("name", "reduce_on_plateau") if given else getattr(value, "name", ""))


AnyScheduleConfig = Annotated[
    Annotated[PlateauConfig, Tag("reduce_on_plateau")]
    | Annotated[ConstantConfig, Tag("constant")]
    | Annotated[CosineConfig, Tag("cosine")]
    | Annotated[CosineRestartsConfig, Tag("cosine_restarts")]
    | Annotated[OneCycleConfig, Tag("one_cycle")]
    | Annotated[ExponentialConfig, Tag("exponential")]
    | Annotated[LinearConfig, Tag("linear")],
    Discriminator(_kind_of_schedule),
]


class EMAConfig(Section):
    """The exponential moving average of the weights over all steps."""

    name: Literal["ema"]
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """What remains of the average at a step."""


class SWAConfig(Section):
    """The mean of the weights at the ends of the last epochs (Izmailov et al., UAI 2018,
    arXiv:1803.05407)."""

    name: Literal["swa"]
    start: Count
    """The first epoch, counted from 1, at whose end they are taken."""


AnyAverageConfig = Annotated[EMAConfig | SWAConfig, Field(discriminator="name")]


class StageConfig(Section):
    """`[[train.stage]]`: from an epoch on, other weights of the loss, or another learning rate."""

    start: Count
    """The first epoch of the stage, counted from 0."""
    lr: Positive | None = None
    """Learning rate, which the schedule no longer changes, unless it waits for plateaus."""
    weights: dict[str, NonNegative] = {}
    """Weights of the loss's terms by name; the others stay as they are."""

    @model_validator(mode="after")
    def _changes_something(self) -> StageConfig:
        if self.lr is None and not self.weights:
            raise reject(
                "the stage changes nothing; give it lr = 1e-4, or weights = { energy = 10.0 }"
            )
        return self
