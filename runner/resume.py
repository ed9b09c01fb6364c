"""Whether a run can go on: what of its config may have changed, and what there is left to do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from runner.checkpoints import LAST, EarlyStopping, has_ended, last_checkpoint
from runner.config import Config, TrainConfig, differences
from runner.datamodule import PreparedDataModule
from runner.errors import ConfigError
from runner.experiment import RunDirectory
from runner.losses import Loss
from runner.predictor import read_checkpoint
from runner.store import PreparedDataset
from runner.terminal import Terminal

MAY_CHANGE = (
    "train.epochs",
    "train.compile",
    "train.checkpoints",
    "train.early_stopping",
    "train.logger",
    "train.data.residence",
    "train.data.workers",
    "train.trainer.accelerator",
    "train.trainer.devices",
    "train.trainer.num_nodes",
    "train.trainer.strategy",
)


def resume_run(
    run: RunDirectory, config: Config, dataset: PreparedDataset, terminal: Terminal, processes: int
) -> int:
    """Check that a run can go on with a config, on so many devices, and note it.

    Returns:
        How many epochs are done.

    Raises:
        ConfigError: it would be another training, or there is nothing left to do.
        RunError: its checkpoint is damaged.
    """
    changed = differences(run.config(), config)
    safe = {key for key in changed if key.startswith(MAY_CHANGE)}
    lines = [
        f"{key}: {_shown(was)} before, {_shown(now)} now" for key, (was, now) in changed.items()
    ]
    refused = [line for key, line in zip(changed, lines, strict=True) if key not in safe]
    if not refused and run.manifest["fingerprint"] != dataset.attributes["fingerprint"]:
        refused = ["the sources of the dataset have changed"]
    if refused:
        raise ConfigError(
            "the config is not the one that the run was started with:\n  " + "\n  ".join(refused),
            where=str(run.path / "config.toml"),
            allowed="other values of " + ", ".join(MAY_CHANGE),
            remedy="set it back, or train anew without --resume",
        )
    file = last_checkpoint(run.path)
    last = read_checkpoint(file)
    done, batches = int(last["training"]["epochs_done"]), _batches_done(last)
    before = 1 + len(last["training"].get("others", []))
    if batches and before != processes:
        raise ConfigError(
            f"the run stopped within an epoch of {before} device{'s' * (before > 1)}, and can go "
            f"on with {processes} only between two epochs",
            where="train.trainer.devices, train.trainer.num_nodes",
            allowed=f"{before} in all",
            remedy=f"go on with {before} until an epoch is done",
        )
    assert config.train is not None
    _check_best(run.config(), config.train, dataset)
    enough, stopping = done >= config.train.epochs, config.train.early_stopping
    stopped = stopping is not None and any(
        name.startswith(EarlyStopping.__qualname__) and has_ended(state, stopping.patience)
        for name, state in last["callbacks"].items()
    )
    if (enough or stopped) and run.manifest["status"] == "finished":
        raise ConfigError(
            f"the run has done all its {done} epochs"
            if done == config.train.epochs
            else f"the run has done {done} epochs, and {config.train.epochs} are asked for"
            if enough
            else f"the run was ended after {done} epochs, as the validation loss fell no more",
            where="train.epochs" if enough else "train.early_stopping",
            remedy=f"raise it to train on: --set train.epochs={2 * done}"
            if enough
            else "to train on, raise its patience, or take it out",
        )
    if file.name != LAST:
        terminal.warn(f"there is no {LAST}, so the run goes on from {file.name}")
    where = (
        "after all epochs" if enough or stopped else f"after {done} epochs and {batches} batches"
    )
    terminal.say(f"goes on {where}", *sorted(lines))
    run.resumed(config, done, {key: list(values) for key, values in changed.items()})
    return done


def _check_best(before: Config, now: TrainConfig, dataset: PreparedDataset) -> None:
    """Refuse more epochs where the validation losses of before would be of other weights.

    Raises:
        ConfigError: they would be, and the best epoch could not be told.
    """
    assert before.train is not None
    loss = Loss(now.loss, now.stage, dataset.source_names)
    ends = [loss.weights_at(epochs - 1, math.inf) for epochs in (before.train.epochs, now.epochs)]
    for name in ends[0]:
        if ends[0][name] != ends[1][name]:
            raise ConfigError(
                f"the weight of {name} would end at {ends[1][name]:g}, not at {ends[0][name]:g}, "
                "and by the weights at the end the epochs are compared",
                where="train.epochs",
                allowed=str(before.train.epochs),
                remedy=f"train anew; a schedule that ends before epoch {before.train.epochs} lets "
                "a run be made longer",
            )


def _batches_done(checkpoint: Mapping[str, Any]) -> int:
    """Of the epoch in which a checkpoint was written."""
    return int(checkpoint[PreparedDataModule.__qualname__]["batches"])


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)
