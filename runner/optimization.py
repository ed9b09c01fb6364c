"""Optimisers, and averages of the weights on their way."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from runner.config import (
    AdamConfig,
    AdamWConfig,
    EMAConfig,
    ForeignOptimizerConfig,
    MuonConfig,
    OptimizerConfig,
    ScheduleFreeConfig,
    SGDConfig,
    SWAConfig,
)
from runner.errors import ConfigError
from runner.foreign import find_class
from runner.potentials.physics import AtomicEnergies

WHERE = "train.optimizer"
Group = dict[str, Any]


def build_optimizer(config: OptimizerConfig, module: nn.Module) -> Optimizer:
    """The optimiser of a module's parameters.

    Args:
        config: the `[train.optimizer]` table.
        module: whose matrices of weights decay, and whose biases, norms and offsets do not.

    Raises:
        ConfigError: a class cannot be found, or does not take what the config gives.
    """
    if isinstance(config, MuonConfig):
        return MuonAndAdamW(module, config)
    if isinstance(config, ScheduleFreeConfig):
        return _schedule_free(config, module)
    if isinstance(config, ForeignOptimizerConfig):
        return _foreign(config, module)
    groups = parameter_groups(module, config.weight_decay)
    if isinstance(config, SGDConfig):
        return torch.optim.SGD(
            groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=True
        )
    assert isinstance(config, AdamWConfig)
    kind = torch.optim.Adam if isinstance(config, AdamConfig) else AdamW
    return kind(
        groups,
        lr=config.lr,
        betas=_pair(config.betas),
        eps=config.eps,
        amsgrad=config.amsgrad,
        fused=True,
    )


def _pair(betas: Sequence[float]) -> tuple[float, float]:
    first, second = betas
    return first, second


def parameter_groups(module: nn.Module, weight_decay: float) -> list[Group]:
    """Two groups of parameters: those that decay, and those that do not."""
    named = list(module.named_parameters())
    matrices = _matrices(module)
    decaying = [parameter for name, parameter in named if name in matrices]
    others = [parameter for name, parameter in named if name not in matrices]
    groups = [
        {"params": decaying, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _matrices(module: nn.Module) -> dict[str, nn.Module]:
    """Names of the parameters that are weights of something, and the modules that they are of."""
    norms = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
    found = {}
    for prefix, part in module.named_modules():
        for name, parameter in part.named_parameters(recurse=False):
            offset = name.rpartition("_")[2].startswith("bias") or isinstance(part, AtomicEnergies)
            if parameter.dim() >= 2 and not offset and not isinstance(part, norms):
                found[f"{prefix}.{name}" if prefix else name] = part
    return found


class MuonAndAdamW(Optimizer):
    """Muon for matrices, AdamW for all else; their groups of parameters are those of both."""

    def __init__(self, module: nn.Module, config: MuonConfig) -> None:
        """Divide the parameters of a module between the two."""
        matrices = {
            name
            for name, part in _matrices(module).items()
            if not isinstance(part, nn.Embedding) and module.get_parameter(name).dim() == 2
        }
        named = dict(module.named_parameters())
        others = [
            {**group, "params": [p for p in group["params"] if not _among(p, matrices, named)]}
            for group in parameter_groups(module, config.weight_decay)
        ]
        muon = torch.optim.Muon(
            [named[name] for name in sorted(matrices)],
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            adjust_lr_fn="match_rms_adamw",
        )
        adamw = AdamW(
            [g for g in others if g["params"]], lr=config.lr, betas=_pair(config.betas), fused=True
        )
        self.parts: list[Optimizer] = [muon, adamw]
        super().__init__([g for part in self.parts for g in part.param_groups], {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """That of both."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from there."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [g for part in self.parts for g in part.param_groups]


def _among(parameter: Tensor, names: set[str], named: Mapping[str, Tensor]) -> bool:
    return any(parameter is named[name] for name in names)


def _schedule_free(config: ScheduleFreeConfig, module: nn.Module) -> Optimizer:
    try:
        from schedulefree import AdamWScheduleFree
    except ImportError:
        raise ConfigError(
            "schedule_free needs the package schedulefree",
            where=f"{WHERE}.name",
            remedy='pip install "nnp-runner[schedule-free]"',
        ) from None
    optimizer: Optimizer = AdamWScheduleFree(
        parameter_groups(module, config.weight_decay),
        lr=config.lr,
        betas=_pair(config.betas),
        warmup_steps=config.warmup_steps,
    )
    return optimizer


def _foreign(config: ForeignOptimizerConfig, module: nn.Module) -> Optimizer:
    """A class of the user's, or of torch."""
    kind: Any = find_class(config.name, Optimizer, f"{WHERE}.name")
    decay = config.weight_decay
    groups: list[Group] = (
        [{"params": list(module.parameters())}]
        if decay is None
        else parameter_groups(module, decay)
    )
    try:
        optimizer: Optimizer = kind(groups, lr=config.lr, **config.hyperparameters)
    except (TypeError, ValueError) as error:
        takes = [name for name in inspect.signature(kind).parameters if name not in ("params",)]
        raise ConfigError(
            f"{config.name} cannot be built: {error}", where=WHERE, allowed=", ".join(takes)
        ) from error
    return optimizer


class Average:
    """The potential with averaged weights, which is what is measured and kept."""

    def __init__(self, config: EMAConfig | SWAConfig, potential: nn.Module) -> None:
        """Average the weights of a potential, from its next step on."""
        self.config = config
        if isinstance(config, EMAConfig):
            average = get_ema_multi_avg_fn(config.decay)  # type: ignore[no-untyped-call]
            self.model = AveragedModel(potential, multi_avg_fn=average)
        else:
            self.model = AveragedModel(potential)
        self.model.requires_grad_(requires_grad=False)

    def after_step(self, potential: nn.Module) -> None:
        """A step of the optimiser is taken."""
        if isinstance(self.config, EMAConfig):
            self.model.update_parameters(potential)

    def after_epoch(self, potential: nn.Module, epoch: int) -> None:
        """The last step of an epoch, counted from 0, is taken."""
        if isinstance(self.config, SWAConfig) and epoch + 1 >= self.config.start:
            self.model.update_parameters(potential)

    @property
    def begun(self) -> bool:
        """Whether there is an average yet."""
        return int(self.model.n_averaged) > 0
