"""What is seen of a training: a bar on a terminal, a line an epoch everywhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import lightning
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import Logger

from runner.config import DataConfig, TrainConfig
from runner.metrics import has_unit, quantity_of
from runner.terminal import Terminal
from runner.training import MONITOR, Training

TOO_MUCH_WAITING = 0.1


class ProgressBar(RichProgressBar):
    """Lightning's bar, with the losses of the last epoch beside it."""

    def get_metrics(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Losses and errors of the last epoch, once there is one."""
        del trainer
        assert isinstance(pl_module, Training)
        values = pl_module.latest.get("train", {}) | pl_module.latest.get("val", {})
        named = (("train loss", "train/loss/total_loss"), ("val loss", MONITOR))
        shown: dict[str, int | str | float | dict[str, float]] = {
            name: f"{values[key]:.4g}" for name, key in named if key in values
        }
        for name, key in _headline(pl_module.config):
            if f"val/{key}" in values:
                shown[name] = " ".join(in_small_units(key, values[f"val/{key}"]))
        if "time/data" in values:
            shown["structures/s"] = f"{values['time/structures_per_s']:,.0f}"
            shown["waiting for data"] = f"{100 * waiting_share(values):.0f} %"
        return shown


class EpochLines(Logger):
    """A logger that says once an epoch where the training stands."""

    name, version = None, None

    def __init__(self, terminal: Terminal, config: TrainConfig, *, to_file: bool) -> None:
        """Say it on `terminal`, or in its log files alone, beside a progress bar."""
        super().__init__()
        self.say = terminal.note if to_file else terminal.say
        self.config = config
        self._last = time.perf_counter()
        self._advised = False

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing: the config is in the run directory."""

    def log_metrics(self, metrics: Mapping[str, float | int], step: int | None = None) -> None:  # noqa: ARG002
        """Say what an epoch came to; the test has a table of its own."""
        if MONITOR not in metrics:
            return
        headline = [(name, f"val/{key}") for name, key in _headline(self.config)]
        errors = [
            " ".join([name, *in_small_units(key.removeprefix("val/"), metrics[key])])
            for name, key in headline
            if key in metrics
        ]
        now = time.perf_counter()
        self.say(
            f"epoch {metrics['epoch'] + 1}/{self.config.epochs}  "
            f"loss {metrics['train/loss/total_loss']:.4g} / {metrics[MONITOR]:.4g}  "
            f"{'  '.join(errors)}  lr {metrics['lr']:.2g}  {now - self._last:.1f} s"
            f", {metrics['time/structures_per_s']:,.0f} structures/s"
            f", {100 * waiting_share(metrics):.0f} % waiting for data"
        )
        self._last = now
        warm = metrics["epoch"] > 0 or self.config.epochs == 1  # the first reads the data
        if warm and waiting_share(metrics) > TOO_MUCH_WAITING and not self._advised:
            self._advised = True
            self.say(f"advice: {advice(self.config.data)}")


def waiting_share(metrics: Mapping[str, float | int]) -> float:
    """Which part of an epoch's training was spent waiting for batches."""
    waited, computed = metrics["time/data"], metrics["time/compute"]
    return waited / max(waited + computed, 1e-9)


def advice(config: DataConfig) -> str:
    """What helps when a training waits for its batches."""
    start = f"more than {100 * TOO_MUCH_WAITING:.0f} % of the time goes into waiting for batches; "
    if config.residence == "stream":
        return start + 'if memory allows, set train.data.residence = "memory" (or "auto")'
    workers = (config.workers or 0) + 1
    return start + f"set train.data.workers = {workers}, or make the batches larger"


def _headline(config: TrainConfig) -> list[tuple[str, str]]:
    """(what it is called in a line, its key) of the first metric of each quantity."""
    return [
        (f"{name} {metrics[0]}", f"{name}_{metrics[0]}")
        for name, metrics in config.measured.items()
    ]


def in_small_units(name: str, value: float) -> tuple[str, str]:
    """An energy or a force in meV, others as they are."""
    if not has_unit(name):
        return f"{value:.4g}", ""
    unit = quantity_of(name).unit_text
    shown, factor = (f"m{unit}", 1000) if unit.startswith("eV") else (unit, 1)
    return f"{factor * value:.4g}", shown + (" an atom" if "_per_atom" in name else "")
