"""`runner train`: float32 batches → Lightning loop → a run directory with a potential in it."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import shlex
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, LambdaCallback
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy

from runner import plots
from runner.batches import PRECISIONS
from runner.checkpoints import (
    EarlyStopping,
    Interruptions,
    WholeFiles,
    checkpoints,
    last_checkpoint,
)
from runner.config import BatchConfig, Config, TrainConfig
from runner.datamodule import PreparedDataModule
from runner.errors import ConfigError, DatasetError, RunError
from runner.experiment import MetricsFile, RunDirectory
from runner.fields import LABELS
from runner.losses import Loss
from runner.metrics import groupings, labelled_components, quantity_of
from runner.potentials import build_potential
from runner.predictor import Predictor, passport
from runner.prepare import default_data_dir, find_prepared
from runner.processes import STOPPING, Place, Processes, together
from runner.progress import EpochLines, ProgressBar, in_small_units
from runner.resume import resume_run
from runner.runs import read_numbers, read_rows, resume_command
from runner.store import PreparedDataset
from runner.terminal import Terminal, table
from runner.trackers import require_installed, trackers
from runner.training import MONITOR, STEPS_MEANWHILE, Training

WORTH_COMPILING = 3e6  # pairs that a training computes; some 1e6 pay for the compiling


def train(
    config: Config,
    config_file: Path,
    data_dir: Path,
    terminal: Terminal,
    command: Sequence[str],
    resume: Path | None = None,
    reproduces: Path | None = None,
    processes: Processes | None = None,
) -> dict[str, Any]:
    """Train the potential of an experiment on its prepared dataset.

    Args:
        config: the experiment.
        config_file: where it stands.
        data_dir: folder of the prepared datasets.
        terminal: to say on what is done.
        command: that was given.
        resume: a run that goes on where it stopped, instead of a new one.
        reproduces: a run that the new one is to equal.
        processes: that train together, if they have met already.

    Returns:
        What `runner train --json` prints; nothing in other processes than the first.
    """
    if processes is None:
        with together(Place.of(require_train(config, config_file).trainer)) as processes:
            return train(
                config, config_file, data_dir, terminal, command, resume, reproduces, processes
            )
    if not processes.first:
        return follow(processes)
    started = time.perf_counter()
    settings = require_train(config, config_file)
    dataset = find_prepared(config, data_dir, _prepare_command(config_file, data_dir, command))
    loss = Loss(settings.loss, settings.stage, dataset.source_names)
    _check_data(settings, loss, dataset)
    _strategy(settings.trainer.strategy, processes.place)  # refused before a run is made
    if resume is None:
        manifest = _manifest(settings, dataset, command)
        run = RunDirectory.create(config_file.parent, config, manifest, reproduces)
    else:
        run = RunDirectory.open(resume)
    processes.at_end = lambda: run.finish("failed")
    with run.locked(), terminal.log_to(run.path / "log.txt"), _terminable():
        terminal.say(f"run {run.path}", f"dataset {dataset.path}")
        done = None
        if resume is not None:
            done = resume_run(run, config, dataset, terminal, processes.place.n)
        task = {"run": str(run.path.resolve()), "dataset": str(dataset.path.resolve())}
        processes.tell(task | {"done": done})
        tables = config.model_dump(mode="json", exclude_none=True)
        rows = read_numbers(run.path / "metrics.csv", done or 0)
        try:
            with trackers(settings.logger, tables, run, rows, terminal.say) as loggers:
                result = _train(
                    settings, loss, dataset, run, terminal, done, processes.place, loggers
                )
        except KeyboardInterrupt:
            run.finish("interrupted")
            saved = reproduces is None and any((run.path / "checkpoints").iterdir())
            kept = f"; to go on: {resume_command(run.path)}" if saved else ""
            terminal.say(f"stopped early{kept}")
            raise
        except BaseException as error:
            if resume is not None and isinstance(error, ConfigError):
                run.as_before()
            else:
                with contextlib.suppress(OSError):  # of a full disk, which is the error
                    run.finish("failed")
            raise
        run.finish("finished")
    return result | {"seconds": round(time.perf_counter() - started, 3)}


def follow(processes: Processes) -> dict[str, Any]:
    """Train with the first process, which tells what; read from where it wrote, write nothing."""
    with _terminable():
        task = processes.told()
        run = RunDirectory(Path(task["run"]), {})
        dataset, settings = PreparedDataset(Path(task["dataset"])), run.config().train
        assert settings is not None
        loss = Loss(settings.loss, settings.stage, dataset.source_names)
        quiet = Terminal(quiet=True)
        _train(settings, loss, dataset, run, quiet, task["done"], processes.place, [])
    return {}


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM and SIGUSR1 end a run as Ctrl-C does."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {n: signal.signal(n, interrupt) for n in STOPPING if n != signal.SIGINT}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def require_train(config: Config, config_file: Path) -> TrainConfig:
    """The `[train]` table of a config.

    Raises:
        ConfigError: there is none, or it asks for a logger that is not installed.
    """
    if config.train is None:
        raise ConfigError(
            "the config has no [train] table, so there is nothing to train",
            where=str(config_file),
            remedy="add [train.potential] and [train.loss.energy], see the README",
        )
    require_installed(config.train.logger)
    return config.train


def _train(
    config: TrainConfig,
    loss: Loss,
    dataset: PreparedDataset,
    run: RunDirectory,
    terminal: Terminal,
    done: int | None,
    place: Place,
    loggers: Sequence[Logger],
) -> dict[str, Any]:
    """Fit, or go on after so many epochs; test from the best checkpoint, write what came out."""
    lightning.seed_everything(config.seed, verbose=False)
    # filling fresh memory costs time and changes no number
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    quantities = {*loss.labels, *loss.quantities, *config.measured}
    potential = build_potential(
        config.potential,
        quantities,
        dataset.attributes["statistics"]["train"],
        dataset.attributes["elements"],
        dataset.quadrupole,
        PRECISIONS[config.precision],
    )
    torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    data = PreparedDataModule(
        dataset,
        config.batch,
        potential.cutoff,
        config.seed,
        config.data,
        terminal.say,
        potential.near,
        potential.dtype,
    )
    weights = sum(parameter.numel() for parameter in potential.parameters())
    terminal.say(f"potential {config.potential.name}, {weights} weights")
    if config.schedule.warmup > config.epochs:
        terminal.say(
            f"the warm-up ({config.schedule.warmup:g} epochs) is longer than the training "
            f"({config.epochs}): the learning rate stays below {config.optimizer.lr:g}"
        )
    incomplete = [name for name, n in dataset.labels.items() if n < len(dataset)]
    compiled = _compiles(config, data, terminal)
    if place.rank == 0:
        run.note(compiled=sorted({*run.manifest.get("compiled", []), compiled}))
    by = [] if config.metrics is None else config.metrics.by
    module = Training(
        potential,
        loss,
        config,
        passport(config, quantities, dataset),
        groupings(by, dataset.source_names),
        incomplete,
        compiled,
        compiled and (config.compile is True or _is_worth_it(config, data, "val")),
    )
    module.say, module.name_of = terminal.say, dataset.name_of
    try:
        trainer = _trainer(config, run, terminal, done, place, loggers)
    except (MisconfigurationException, ValueError, TypeError, ImportError) as error:
        raise ConfigError(
            f"Lightning refuses the trainer: {error}",
            where="train.trainer",
            remedy='accelerator = "auto" and strategy = "auto" work everywhere',
        ) from None
    _fit(trainer, module, data, None if done is None else last_checkpoint(run.path))
    test = _test(trainer, module, data, run, terminal)
    if place.rank > 0:
        return {}
    best = _best_epoch(run.path)
    plots.learning_curves(run.path / "learning_curves.png", _curves(run.path / "metrics.csv"))
    return {
        "run": str(run.path),
        "dataset": str(dataset.path),
        "fingerprint": dataset.attributes["fingerprint"],
        "epochs": module.epochs_done,
        "steps": trainer.global_step,
        "best": best,
        "test": test,
    }


def _compiles(config: TrainConfig, data: PreparedDataModule, terminal: Terminal) -> bool:
    """Whether training steps are compiled; said, where they are or could be.

    Decided by the size of the training and not by a clock, so that the same training always goes
    the same way.
    """
    if config.compile is False or config.precision == "bf16-mixed":
        return False
    on_cpu = config.trainer.accelerator == "cpu" or not torch.cuda.is_available()
    if config.compile == "auto" and not (on_cpu and _is_worth_it(config, data, "train")):
        return False
    if config.compile == "auto" and shutil.which(os.environ.get("CXX", "g++")) is None:
        terminal.say("the step is not compiled: there is no C++ compiler (g++)")
        return False
    threads = torch.get_num_threads()
    terminal.say(
        "training steps are compiled, which takes 10 to 90 s the first time (the first "
        f"{STEPS_MEANWHILE} are taken meanwhile), and computed in parts by "
        f"{threads} thread{'s' * (threads != 1)}"
        if on_cpu
        else "training steps are compiled, which takes a minute or two"
    )
    return True


def _is_worth_it(config: TrainConfig, data: PreparedDataModule, split: str) -> bool:
    """Whether compiling what a split goes through takes less time than it saves."""
    return data.pairs_of(split) * config.epochs >= WORTH_COMPILING


def _check_data(config: TrainConfig, loss: Loss, dataset: PreparedDataset) -> None:
    """Refuse what cannot be trained on this dataset, before anything is computed."""
    own = config.loss.own
    asked = {
        label: f"loss.{'own.' * (name in own)}{name}"
        for name in config.loss.terms
        for label in loss.term(name).labels
    }
    asked = {name: f"metrics.{name}" for name in config.measured} | asked
    if config.metrics is not None and "charge" in config.metrics.by:
        asked.setdefault("total_charge", "metrics.by")
    for name, where in asked.items():
        if name not in dataset.labels:
            section = where.partition(".")[0]
            raise DatasetError(
                f"the prepared dataset has no {name}",
                where=f"train.{where}",
                allowed=", ".join(dataset.labels),
                remedy=f"map {name} in [[prepare.source]], or take it out of train.{section}",
            )
    elements = dataset.attributes["elements"]
    for name, term in config.loss.terms.items():
        weights = {} if name in own else getattr(term, "by_element", {})
        absent = sorted(set(weights) - set(elements))
        if absent:
            raise DatasetError(
                f"the prepared dataset has no {absent[0]}, which the loss weighs",
                where=f"train.loss.{name}.by_element",
                allowed=", ".join(elements),
            )
    for name in sorted(config.potential.needed_inputs):
        n = dataset.labels.get(name, 0)
        if n < len(dataset):
            raise DatasetError(
                f"the potential needs the {name} of every structure, and {len(dataset) - n} of "
                f"{len(dataset)} have none",
                where="train.potential",
                remedy=f"map {name} in [[prepare.source]], such as {name} = {{ value = "
                f"{int(name == 'spin_multiplicity')} }}, or do without it in train.potential",
            )
    start, stop = dataset.attributes["splits"]["val"]
    if start == stop:
        raise DatasetError(
            "the validation split is empty, and the best epoch is chosen by it",
            where="prepare.split.val",
            remedy="give it a share of the structures",
        )


def _manifest(
    config: TrainConfig, dataset: PreparedDataset, command: Sequence[str]
) -> dict[str, Any]:
    attributes = dataset.attributes
    return {
        "command": list(command),
        "seed": config.seed,
        "dataset": str(dataset.path),
        "fingerprint": attributes["fingerprint"],
        "sources": attributes["sources"],
        "splits": attributes["splits"],
        "self_energies": attributes["self_energies"],
    }


def _prepare_command(config_file: Path, data_dir: Path, command: Sequence[str]) -> str:
    """The command that makes the dataset which a training looks for."""
    whole = config_file.name == "config.toml"
    words = ["runner", "prepare", str(config_file.parent if whole else config_file)]
    if data_dir != default_data_dir(config_file):
        words += ["--data-dir", str(data_dir)]
    for option, value in itertools.pairwise(command):
        if option == "--set" and value.startswith("prepare"):
            words += [option, value]
    return shlex.join(words)


def _trainer(
    config: TrainConfig,
    run: RunDirectory,
    terminal: Terminal,
    done: int | None,
    place: Place,
    loggers: Sequence[Logger],
) -> lightning.Trainer:
    """Lightning's trainer for a run of which so many epochs are done; None if it is new."""
    for name in ("lightning.pytorch", "lightning.fabric"):  # what it says at every start
        logging.getLogger(name).setLevel(logging.WARNING)
    settings = config.trainer.model_dump()
    if settings["devices"] == "auto":
        settings["devices"] = place.n_local
    settings["num_nodes"] = place.n_nodes
    settings["strategy"] = _strategy(settings["strategy"], place)
    if settings["accelerator"] == "auto":  # Apple's GPUs have no float64, which exact means need
        settings["accelerator"] = "cuda" if torch.cuda.is_available() else "cpu"
    if config.precision == "bf16-mixed":  # of the others the data and the potential are
        settings["precision"] = config.precision
    on_terminal = sys.stderr.isatty() and terminal.console.is_terminal
    interactive = on_terminal and place.rank == 0
    rows = read_numbers(run.path / "metrics.csv", done or 0)
    begins = done is None and place.rank == 0
    trainer = lightning.Trainer(
        **settings,
        max_epochs=config.epochs,
        inference_mode=False,  # forces need gradients, in validation too
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        enable_model_summary=False,
        enable_progress_bar=interactive,
        use_distributed_sampler=False,
        reload_dataloaders_every_n_epochs=int(_length_varies(config)),
        default_root_dir=run.path,
        plugins=[WholeFiles(), place.environment if place.n > 1 else LightningEnvironment()],
        logger=[
            MetricsFile(run.path / "metrics.csv", done or 0),
            TensorBoardLogger(
                run.path, name="", version="", purge_step=rows[-1]["step"] + 1 if rows else None
            ),
            EpochLines(terminal, config, to_file=interactive),
            *loggers,
        ]
        if place.rank == 0
        else False,
        callbacks=[
            *([ProgressBar(console_kwargs={"stderr": True})] if interactive else []),
            *([LambdaCallback(on_train_start=lambda *_: run.begin())] if begins else []),
            Interruptions(run.path / "checkpoints", terminal.say, config.checkpoints.minutes),
            *checkpoints(run.path / "checkpoints", MONITOR),
            *_early_stopping(config),
        ],
    )
    # Lightning's handlers would broadcast from the one process that is asked to stop
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer


STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true")


def _strategy(name: str, place: Place) -> str | DDPStrategy:
    """How Lightning trains in several processes.

    However long one process computes what the others wait for, that is no failure: it is noticed
    elsewhere.

    Raises:
        ConfigError: forces cannot be trained that way.
    """
    if place.n == 1:
        return name
    if name not in STRATEGIES:
        sharded = "fsdp" in name or "deepspeed" in name
        why = (
            ": it lets go of a layer's weights once they are used, and forces, which are a "
            "derivative themselves, need them again"
            if sharded
            else ""
        )
        raise ConfigError(
            f"several devices are not trained by the strategy {name}{why}",
            where="train.trainer.strategy",
            allowed=", ".join(STRATEGIES),
            remedy='strategy = "auto"; every device then holds all weights, and its batches alone '
            "decide how much memory it needs",
        )
    unused = name == "ddp_find_unused_parameters_true"
    return DDPStrategy(find_unused_parameters=unused, timeout=timedelta(days=7))


def _length_varies(config: TrainConfig) -> bool:
    """Whether epochs differ in how many batches they have, which Lightning then asks each time."""
    return config.batch.unit != "structures" or config.data.weights is not None


def _early_stopping(config: TrainConfig) -> list[Callback]:
    settings = config.early_stopping
    if settings is None:
        return []
    return [EarlyStopping(MONITOR, min_delta=settings.min_delta, patience=settings.patience)]


def _fit(
    trainer: lightning.Trainer,
    module: Training,
    data: PreparedDataModule,
    checkpoint: Path | None,
) -> None:
    with _quiet(), _ends_clearly(trainer, module.config.batch), _threads(module):
        try:
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        finally:
            module.close()


@contextlib.contextmanager
def _threads(module: Training) -> Iterator[None]:
    """Leave the cores to the compiled step's threads.

    Where threads of torch's operations take turns with them, each of its thousands of parallel
    regions waits for the other to wake up: a plain step then takes ten times as long.
    """
    before = torch.get_num_threads()
    if module.compiled is not None:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _ends_clearly(trainer: lightning.Trainer, size: BatchConfig) -> Iterator[None]:
    """Say what to do where memory runs out, and let an interruption be one."""
    try:
        yield
    except SystemExit:  # how Lightning ends after Ctrl-C
        raise KeyboardInterrupt from None
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise RunError(
            f"out of memory in epoch {trainer.current_epoch}: {str(error).splitlines()[0]}",
            where=f"train.batch.{size.unit} = {size.limit}",
            remedy="lower it, or train.potential.features or cutoff; a budget in atoms or pairs "
            'keeps large structures from meeting; train.data.residence = "stream" keeps the data '
            "on disk",
        ) from error


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the GPU or of the machine; for the latter torch has no class."""
    words = ("not enough memory", "can't allocate memory", "out of memory")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the advice of Lightning that does not apply here."""
    with warnings.catch_warnings():
        for message in (
            ".*does not have many workers.*",  # batches are made faster than workers hand them over
            ".*exists and is not empty.*",  # the run directory holds more than metrics.csv
            ".*LeafSpec.*is deprecated.*",  # between Lightning and torch
            ".*sync_dist=True.*",  # what is logged is that of all processes already
            ".*Grad strides do not match bucket view strides.*",  # of a matrix with one row
            ".*callbacks used to create the checkpoint.*",  # one of 0.5.0 has another
        ):
            warnings.filterwarnings("ignore", message)
        yield


def _test(
    trainer: lightning.Trainer,
    module: Training,
    data: PreparedDataModule,
    run: RunDirectory,
    terminal: Terminal,
) -> dict[str, float]:
    """Errors of the best checkpoint on the test split, as a file, a table and a picture."""
    start, stop = data.dataset.attributes["splits"]["test"]
    if start == stop:
        terminal.say("the test split is empty, so nothing is tested")
        return {}
    best = Predictor.load(run.path).potential.to(module.device)
    module.potential.load_state_dict(best.state_dict())
    module.average = None  # that of the last epoch; the best one's is what was loaded
    with _quiet(), _ends_clearly(trainer, module.config.batch):
        trainer.test(module, datamodule=data, verbose=False)
    errors = {
        name.removeprefix("test/"): value
        for name, value in module.latest["test"].items()
        if not name.startswith("test/loss/")
    }
    if not trainer.is_global_zero:
        return errors
    run.write_json("test_metrics.json", errors)
    rows = [(name, *in_small_units(name, value)) for name, value in errors.items()]
    terminal.say(
        "", table("Errors on the test split, best checkpoint", ("", "error", "unit"), rows)
    )
    pairs = _parity_pairs(module, data)
    notes = {
        name: f"MAE {np.abs(predicted - reference).mean():.3g} {LABELS[name].unit_text}"
        for name, (reference, predicted) in pairs.items()
    }
    plots.parity(run.path / "parity.png", pairs, notes)
    return errors


def _parity_pairs(
    module: Training, data: PreparedDataModule
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(reference, predicted) components of each quantity that is trained or measured."""
    collected: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    potential = module.potential.eval()
    quantities = {*module.loss.labels, *module.config.measured}
    for batch in data.whole("test"):
        prediction = potential(batch.to(potential.device), **module.derivatives)
        for name in quantities:
            there = batch.to(potential.device)
            predicted, reference, _ = labelled_components(name, prediction, there)
            pair = (reference.cpu().numpy(), predicted.cpu().numpy())
            collected.setdefault(name, []).append(pair)
    return {
        name: (np.concatenate([r for r, _ in pairs]), np.concatenate([p for _, p in pairs]))
        for name, pairs in sorted(collected.items())
    }


def _best_epoch(run: Path) -> dict[str, float | int]:
    """The validation split's values in the epoch of the best checkpoint."""
    checkpoint = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    epoch = int(checkpoint["epoch"])
    (row,) = (row for row in read_rows(run / "metrics.csv") if row["epoch"] == str(epoch))
    values = {
        name.removeprefix("val/"): float(value)
        for name, value in row.items()
        if value and name.startswith("val/") and not name.startswith("val/loss/")
    }
    return {"epoch": epoch, "total_loss": float(row[MONITOR])} | values


def _curves(metrics: Path) -> Mapping[str, Any]:
    """Loss and errors over the epochs, for the picture."""
    rows = read_rows(metrics)
    names = [name.removeprefix("val/") for name in rows[0] if name.startswith("val/")]
    shown = ["loss/total_loss", *[name for name in names if name.endswith("_mae")]]
    curves: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for name in shown:
        for split in ("train", "val"):
            points = [
                (float(row["epoch"]), float(row[f"{split}/{name}"]))
                for row in rows
                if row.get(f"{split}/{name}")
            ]
            if points:
                epochs, values = zip(*points, strict=True)
                title = f"{name}, {quantity_of(name).unit_text}" if name.endswith("_mae") else name
                curves.setdefault(title, {})[split] = (list(epochs), list(values))
    return curves
