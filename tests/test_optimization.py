"""Optimisers, schedules and averages, each against what it is defined as."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import nn
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    ExponentialLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
)

from runner.config import (
    AnyAverageConfig,
    AnyOptimizerConfig,
    AnyScheduleConfig,
    CosineRestartsConfig,
    OptimizerConfig,
    ScheduleConfig,
    potential_config,
)
from runner.errors import ConfigError
from runner.optimization import Average, build_optimizer, parameter_groups
from runner.potentials import build_potential

STATISTICS = {"energy_per_atom": {"mean": 0.0, "std": 1.0}}


def _optimizer(**table: Any) -> OptimizerConfig:
    adapter: TypeAdapter[OptimizerConfig] = TypeAdapter(AnyOptimizerConfig)
    return adapter.validate_python(table)


def _schedule(**table: Any) -> ScheduleConfig:
    adapter: TypeAdapter[ScheduleConfig] = TypeAdapter(AnyScheduleConfig)
    return adapter.validate_python(table)


class Small(nn.Module):
    """Something of every kind of parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(5, 4)
        self.first = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.second = nn.Linear(6, 1)

    def loss(self) -> torch.Tensor:
        hidden = self.norm(torch.tanh(self.first(self.embedding(torch.arange(5)))))
        return ((self.second(hidden).squeeze(-1) - torch.arange(5.0)) ** 2).mean()


def _trained(optimizer: torch.optim.Optimizer, module: Small, steps: int) -> float:
    for _ in range(steps):
        optimizer.zero_grad()
        module.loss().backward()
        optimizer.step()
    getattr(optimizer, "eval", lambda: None)()
    return float(module.loss().detach())


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 0.03},
    "adam": {"lr": 0.03},
    "sgd": {"lr": 0.03},
    "muon": {"lr": 0.03},
    "schedule_free": {"lr": 0.1},
    "torch.optim:NAdam": {"lr": 0.03, "momentum_decay": 0.01},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_a_loss(name: str) -> None:
    module = Small()
    before = float(module.loss().detach())
    optimizer = build_optimizer(_optimizer(name=name, **OPTIMIZERS[name]), module)
    getattr(optimizer, "train", lambda: None)()
    assert _trained(optimizer, module, 200) < 0.05 * before


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_on_from_its_state(name: str) -> None:
    def built(module: Small) -> torch.optim.Optimizer:
        optimizer = build_optimizer(_optimizer(name=name, **OPTIMIZERS[name]), module)
        getattr(optimizer, "train", lambda: None)()
        return optimizer

    whole, stopped = Small(), Small()
    _trained(built(whole), whole, 0)
    first, second = built(whole), built(stopped)
    for _ in range(6):
        first.zero_grad()
        whole.loss().backward()
        first.step()
    for number in range(6):
        if number == 3:
            state, weights = second.state_dict(), stopped.state_dict()
            stopped = Small()
            stopped.load_state_dict(weights)
            second = built(stopped)
            second.load_state_dict(state)
        second.zero_grad()
        stopped.loss().backward()
        second.step()
    for one, other in zip(whole.parameters(), stopped.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "muon", "schedule_free"])
def test_a_rate_that_is_set_is_that_of_every_parameter(name: str) -> None:
    module = Small()
    optimizer = build_optimizer(_optimizer(name=name), module)
    before = [p.detach().clone() for p in module.parameters()]
    getattr(optimizer, "train", lambda: None)()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    module.loss().backward()
    optimizer.step()
    for parameter, old in zip(module.parameters(), before, strict=True):
        assert torch.equal(parameter, old)


def test_biases_norms_and_offsets_do_not_decay() -> None:
    table = {
        "name": "schnet",
        "features": 8,
        "energy": {"scale": "one", "shift": "one", "learnt": True},
    }
    statistics = {"energy_per_atom": {"mean": -1.0, "std": 2.0}}
    potential = build_potential(potential_config(table), ["energy"], statistics, ["H"])
    decaying, others = parameter_groups(potential, 0.1)
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in potential.named_parameters()}
    still = {names[id(p)] for p in others["params"]}
    assert still == {n for n in names.values() if "bias" in n or n.startswith("energy.")}
    assert {"architecture.filters.bias", "energy.scale", "energy.shift"} <= still
    small = Small()
    decaying, others = parameter_groups(small, 0.1)
    assert [tuple(p.shape) for p in decaying["params"]] == [(5, 4), (6, 4), (1, 6)]
    assert any(p is small.norm.weight for p in others["params"])


def test_weight_decay_shrinks_matrices_alone() -> None:
    module = Small()
    optimizer = build_optimizer(_optimizer(name="adamw", lr=0.1, weight_decay=0.5), module)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer.step()
    for name, parameter in module.named_parameters():
        shrinks = name in ("embedding.weight", "first.weight", "second.weight")
        assert torch.allclose(parameter, before[name] * (0.95 if shrinks else 1.0))


def test_muon_makes_the_steps_of_matrices_orthogonal() -> None:
    module = Small()
    before = module.first.weight.detach().clone()
    optimizer = build_optimizer(_optimizer(name="muon", lr=0.1, weight_decay=0.0), module)
    module.loss().backward()
    optimizer.step()
    step = module.first.weight.detach() - before
    values = torch.linalg.svdvals(step)
    assert values.min() > 0.5 * values.max()  # a few iterations bring them near each other


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ({"name": "torch.optim:Nadam"}, 'there is no Nadam in torch.optim; did you mean "NAdam"'),
        ({"name": "torch.nn:Linear"}, "torch.nn:Linear is not a class of torch.optim"),
        ({"name": "torch.optim:NAdam", "beta": 1}, "unexpected keyword argument 'beta'"),
        ({"name": "nowhere:Optimizer"}, "nowhere:Optimizer cannot be imported"),
    ],
)
def test_a_class_that_cannot_be_used_is_named(table: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        build_optimizer(_optimizer(**table), Small())
    assert "train.optimizer" in str(caught.value)


def _of_torch(kind: type[LRScheduler], steps: int, **arguments: Any) -> Iterator[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = kind(optimizer, **arguments)
    for _ in range(steps):
        yield optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("table", "kind", "arguments"),
    [
        ({"name": "cosine", "end": 0.1}, CosineAnnealingLR, {"T_max": 40, "eta_min": 0.1}),
        (
            {"name": "cosine_restarts", "period": 10, "growth": 2},
            CosineAnnealingWarmRestarts,
            {"T_0": 10, "T_mult": 2},
        ),
        (
            {"name": "cosine_restarts", "period": 7},
            CosineAnnealingWarmRestarts,
            {"T_0": 7},
        ),
        ({"name": "exponential", "gamma": 0.9}, ExponentialLR, {"gamma": 0.9}),
        (
            {"name": "linear", "end": 0.2},
            LinearLR,
            {"start_factor": 1.0, "end_factor": 0.2, "total_iters": 40},
        ),
    ],
)
def test_schedules_are_those_of_torch(
    table: dict[str, Any], kind: type[LRScheduler], arguments: dict[str, Any]
) -> None:
    schedule = _schedule(**table)
    found = [schedule.relative_rate(float(epoch), 40) for epoch in range(40)]
    assert found == pytest.approx(list(_of_torch(kind, 40, **arguments)), abs=1e-6)


def test_one_cycle_is_that_of_torch() -> None:
    schedule = _schedule(name="one_cycle")
    n = 1001  # torch has the peak at step 0.3 · 1001 − 1 of 1000
    expected = list(_of_torch(OneCycleLR, n, max_lr=1.0, total_steps=n, cycle_momentum=False))
    found = [schedule.relative_rate(100 * k / (n - 1), 100) for k in range(n)]
    assert np.abs(np.array(found) - expected).max() < 0.005
    assert (found[0], max(found), found[-1]) == pytest.approx((0.04, 1.0, 4e-6), abs=1e-5)


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "reduce_on_plateau"])
def test_the_rate_warms_up_in_a_straight_line(name: str) -> None:
    schedule = _schedule(name=name, warmup=4.0)
    assert [schedule.relative_rate(epoch, 10) for epoch in (0.0, 1.0, 2.5)] == [0, 0.25, 0.625]
    assert schedule.relative_rate(4.0, 10) == 1.0
    end = schedule.relative_rate(10.0, 10)
    assert end == pytest.approx(0.0 if name in ("cosine", "linear") else 1.0)


def _averages(**table: Any) -> Any:
    adapter: TypeAdapter[Any] = TypeAdapter(AnyAverageConfig)
    return adapter.validate_python(table)


def test_an_exponential_average_is_its_sum() -> None:
    module, decay = nn.Linear(1, 1), 0.9
    average = Average(_averages(name="ema", decay=decay), module)
    values = [1.0, 5.0, -2.0, 4.0]
    assert not average.begun
    for value in values:
        nn.init.constant_(module.weight, value)
        average.after_step(module)
        average.after_epoch(module, 0)
    first, *rest = values
    n = len(rest)
    expected = decay**n * first
    expected += sum((1 - decay) * decay ** (n - 1 - k) * v for k, v in enumerate(rest))
    assert float(average.model.module.weight) == pytest.approx(expected)
    assert not average.model.module.weight.requires_grad


def test_a_stochastic_weight_average_is_the_mean_of_the_last_epochs() -> None:
    module = nn.Linear(1, 1)
    average = Average(_averages(name="swa", start=3), module)
    for epoch, value in enumerate([1.0, 5.0, -2.0, 4.0, 7.0]):
        nn.init.constant_(module.weight, value)
        average.after_step(module)
        average.after_epoch(module, epoch)
        assert average.begun == (epoch >= 2)
    assert float(average.model.module.weight) == pytest.approx(3.0)
    assert math.isclose(float(average.model.n_averaged), 3)


@pytest.mark.parametrize("period", [0.1, 0.2, 1.0, 3.0])
def test_every_restart_of_a_cosine_is_at_its_peak(period: float) -> None:
    schedule = CosineRestartsConfig(name="cosine_restarts", period=period)
    for n in range(40):
        assert schedule.after_warmup(n * period, 100.0) == pytest.approx(1.0)
        assert schedule.after_warmup((n + 1e-13) * period, 100.0) == pytest.approx(1.0)
        assert schedule.after_warmup((n + 0.5) * period, 100.0) == pytest.approx(0.5)
