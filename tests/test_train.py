"""A whole training: the run directory, its numbers, its errors."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from molecules import random_structures, springs, without, write_experiment, write_extxyz
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from runner import compiled, loader, training
from runner import train as train_module
from runner.batches import Batch, make_batch
from runner.calculator import NNPCalculator
from runner.compiled import StepResult
from runner.config import Config, load_config
from runner.epochs import Draw
from runner.errors import ConfigError, DatasetError, InputError, RunError, SelfEnergyError
from runner.experiment import RunDirectory
from runner.loader import Stock
from runner.losses import Term
from runner.predictor import Predictor
from runner.prepare import find_prepared, prepare
from runner.terminal import Terminal
from runner.train import train
from runner.training import Training


def _run(config_file: Path, *settings: str) -> dict[str, Any]:
    config = load_config(config_file, settings)
    folder = config_file.parent / "prepared"
    prepare(config, folder, Terminal())
    return train(config, config_file, folder, Terminal(), command=["runner", "train", "x"])


def _rows(result: dict[str, Any]) -> list[dict[str, str]]:
    with (Path(result["run"]) / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def _numbers(result: dict[str, Any]) -> list[dict[str, str]]:
    """Rows of metrics.csv but for the times."""
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in _rows(result)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    config_file = write_experiment(tmp_path_factory.mktemp("experiment"))
    return config_file, _run(config_file)


def test_the_run_directory_holds_all_that_the_design_names(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    config_file, result = finished
    run = Path(result["run"])
    assert run.parent == config_file.parent / "runs"
    assert (run.parent / "latest").resolve() == run
    names = {path.name for path in run.iterdir()}
    expected = {"config.toml", "manifest.json", "metrics.csv", "test_metrics.json", "log.txt"}
    assert expected <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    for picture in ("parity.png", "learning_curves.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")


def test_the_result_says_what_was_done(finished: tuple[Path, dict[str, Any]]) -> None:
    _, result = finished
    assert set(result) == {
        "run", "dataset", "fingerprint", "epochs", "steps", "best", "test", "seconds"
    }  # fmt: skip
    assert result["epochs"] == 3
    assert result["steps"] == 3 * 6  # 48 structures in batches of 8
    assert result["test"] == json.loads((Path(result["run"]) / "test_metrics.json").read_text())
    assert result["best"]["total_loss"] > 0
    rows = _rows(result)
    losses = [float(r["val/loss/total_loss"]) for r in rows if r["val/loss/total_loss"]]
    assert result["best"]["epoch"] == int(np.argmin(losses))
    assert {"train/loss/total_loss", "val/energy_mae", "test/forces_rmse"} <= set(rows[0])


def test_the_test_errors_are_those_of_the_best_checkpoint_over_all_components(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    config_file, result = finished
    config = load_config(config_file)
    dataset = find_prepared(config, config_file.parent / "prepared", "")
    predictor = Predictor.load(Path(result["run"]))
    structures = dataset.read("test")
    values = predictor.potential(make_batch(structures, predictor.potential.cutoff))
    prediction = {name: value.detach().double().numpy() for name, value in values.items()}
    energy = prediction["energy"] - structures.structures["energy"]
    forces = prediction["forces"] - structures.atoms["forces"]
    dipole = prediction["dipole"] - structures.structures["dipole"]
    expected = {
        "energy_mae": np.abs(energy).mean(),
        "energy_rmse": np.sqrt((energy**2).mean()),
        "energy_per_atom_mae": np.abs(energy / np.diff(structures.first_atom)).mean(),
        "forces_mae": np.abs(forces).mean(),
        "forces_rmse": np.sqrt((forces**2).mean()),
        "dipole_mae": np.abs(dipole).mean(),
    }
    assert {name: result["test"][name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_training_lowers_the_errors(finished: tuple[Path, dict[str, Any]]) -> None:
    _, result = finished
    rows = _rows(result)
    losses = [float(r["train/loss/total_loss"]) for r in rows if r["train/loss/total_loss"]]
    assert losses[-1] < 0.9 * losses[0]


def test_the_same_seed_gives_the_same_numbers_to_the_bit(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    config_file, first = finished
    second = _run(config_file)
    metrics = [_numbers(result) for result in (first, second)]
    assert metrics[0] == metrics[1]
    weights = [
        torch.load(Path(r["run"]) / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for r in (first, second)
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    other = _run(config_file, "train.seed=1")
    assert _numbers(other) != metrics[0]


def test_the_manifest_and_the_resolved_config(finished: tuple[Path, dict[str, Any]]) -> None:
    config_file, result = finished
    run = Path(result["run"])
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["status"] == "finished"
    assert manifest["fingerprint"] == result["fingerprint"]
    assert manifest["seed"] == 0
    assert manifest["command"] == ["runner", "train", "x"]
    assert {"torch", "lightning", "nnp-runner", "python"} <= set(manifest["versions"])
    assert manifest["sources"][0]["name"] == "data.extxyz"
    assert set(manifest["self_energies"]) == {"H", "C", "N", "O"}
    assert load_config(run / "config.toml") == load_config(config_file)


def test_checkpoints_hold_tensors_and_plain_data(finished: tuple[Path, dict[str, Any]]) -> None:
    _, result = finished
    for name in ("best", "last"):
        path = Path(result["run"]) / "checkpoints" / f"{name}.ckpt"
        passport = torch.load(path, weights_only=True)["runner"]
        assert all(type(value) is float for value in passport["self_energies"].values())


def test_structures_without_some_label_train(tmp_path: Path) -> None:
    structures = without(springs(), "forces", list(range(0, 60, 2)))
    config_file = write_experiment(tmp_path, structures)
    text = config_file.read_text().replace(
        'unit = "eV/angstrom" }', 'unit = "eV/angstrom", missing = "nan" }'
    )
    config_file.write_text(text)
    result = _run(config_file, "train.epochs=1")
    assert result["test"]["forces_mae"] > 0


def _prepared(tmp_path: Path, *settings: str) -> tuple[Config, Path, Path]:
    config_file = write_experiment(tmp_path)
    config = load_config(config_file, settings)
    prepare(config, tmp_path / "prepared", Terminal())
    return config, config_file, tmp_path / "prepared"


def test_training_before_preparing_names_the_command(tmp_path: Path) -> None:
    config_file = write_experiment(tmp_path)
    with pytest.raises(DatasetError, match=f"not prepared yet(.|\n)*runner prepare {tmp_path}"):
        train(load_config(config_file), config_file, tmp_path / "prepared", Terminal(), [])


def test_a_config_without_train_is_refused(tmp_path: Path) -> None:
    config_file = write_experiment(tmp_path)
    config_file.write_text(config_file.read_text().partition("[train]")[0])
    with pytest.raises(ConfigError, match=r"no \[train\] table(.|\n)*config.toml"):
        train(load_config(config_file), config_file, tmp_path, Terminal(), [])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.loss.charges.weight=1.0", r"has no charges(.|\n)*train.loss.charges(.|\n)*energy"),
        ("train.metrics.charges=['mae']", r"has no charges(.|\n)*train.metrics.charges"),
    ],
)
def test_a_loss_or_metric_without_its_label_is_refused(
    tmp_path: Path, setting: str, message: str
) -> None:
    config, config_file, folder = _prepared(tmp_path, setting)
    with pytest.raises(DatasetError, match=message):
        train(config, config_file, folder, Terminal(), [])
    assert not (tmp_path / "runs").exists()


def test_an_empty_validation_split_is_refused(tmp_path: Path) -> None:
    shares = [f"prepare.split.{name}={n}" for name, n in (("train", 50), ("val", 0), ("test", 10))]
    config, config_file, folder = _prepared(tmp_path, *shares)
    with pytest.raises(DatasetError, match="validation split is empty"):
        train(config, config_file, folder, Terminal(), [])


def test_a_loss_that_is_not_finite_stops_the_run_by_name(tmp_path: Path) -> None:
    config, config_file, folder = _prepared(tmp_path, "train.optimizer.lr=1e18")
    with pytest.raises(RunError) as caught:
        train(config, config_file, folder, Terminal(), [])
    text = str(caught.value)
    assert re.search(r"train/loss/energy.* is not a finite number in epoch 0, at step \d", text)
    assert re.search(r"structures of a batch of the train split: data.extxyz, structure \d+", text)
    assert "lower train.optimizer.lr" in text
    (run,) = (path for path in (tmp_path / "runs").iterdir() if not path.is_symlink())
    assert json.loads((run / "manifest.json").read_text())["status"] == "failed"


def _ask_at(patch: pytest.MonkeyPatch, step: int, times: int = 1) -> None:
    """Ask to stop, so many times, while a step is taken."""
    taken, left = Training.training_step, [times]

    def interrupted(self: Training, batch: Any) -> torch.Tensor:
        if self.global_step == step:
            for _ in range(left.pop() if left else 0):
                os.kill(os.getpid(), signal.SIGTERM)
        return taken(self, batch)

    patch.setattr(Training, "training_step", interrupted)


def _stopped_at(
    monkeypatch: pytest.MonkeyPatch, config_file: Path, step: int, *settings: str, times: int = 1
) -> Path:
    """A run that is asked to stop, so many times, while it takes a step."""
    with monkeypatch.context() as patch:
        _ask_at(patch, step, times)
        with pytest.raises(KeyboardInterrupt):
            _run(config_file, *settings)
    return (config_file.parent / "runs" / "latest").resolve()


def test_a_run_that_is_asked_to_stop_saves_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _stopped_at(monkeypatch, write_experiment(tmp_path), 8)
    assert json.loads((run / "manifest.json").read_text())["status"] == "interrupted"
    last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 9
    said = capsys.readouterr().out
    assert "SIGTERM: the run ends after this batch, or after its validation" in said
    assert f"stopped early; to go on: runner train {tmp_path}" in said
    assert f"--resume {run}" in said


def test_asked_twice_a_run_ends_at_once_with_its_last_checkpoint_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _stopped_at(monkeypatch, write_experiment(tmp_path), 8, times=2)
    last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 6


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return _run(write_experiment(tmp_path_factory.mktemp("whole")), *CHANGING)


CHANGING = (  # a rate and weights that change, epochs of several lengths
    "train.schedule.patience=1",
    "train.loss.forces.weight={start=1.0, end=9.0, epochs=3}",
    "train.batch={atoms=40}",
    "train.early_stopping.patience=2",
)


def _weights(run: str | Path, name: str = "last") -> dict[str, torch.Tensor]:
    path = Path(run) / "checkpoints" / f"{name}.ckpt"
    weights: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return weights


@pytest.mark.parametrize(
    "step", [3, 8, *(pytest.param(step, marks=pytest.mark.slow) for step in (0, 7, 9))]
)
def test_a_resumed_run_gives_the_numbers_of_one_that_never_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, Any], step: int
) -> None:
    config_file = write_experiment(tmp_path)
    run = _stopped_at(monkeypatch, config_file, step, *CHANGING)
    config = load_config(config_file, CHANGING)
    torch.manual_seed(99)  # what another process would begin with
    result = train(config, config_file, tmp_path / "prepared", Terminal(), [], resume=run)
    assert result["run"] == str(run)
    assert _numbers(result) == _numbers(whole)
    assert {name: result[name] for name in ("test", "best", "steps", "epochs")} == {
        name: whole[name] for name in ("test", "best", "steps", "epochs")
    }
    for checkpoint in ("last", "best"):
        expected = _weights(whole["run"], checkpoint)
        for name, value in _weights(run, checkpoint).items():
            assert torch.equal(value, expected[name])
    assert json.loads((run / "manifest.json").read_text())["status"] == "finished"


VARIANTS: dict[str, tuple[str, ...]] = {
    "muon and an average": (
        'train.optimizer={name="muon", lr=5e-3}',
        'train.average={name="ema", decay=0.8}',
        'train.schedule={name="cosine", warmup=0.5}',
        "train.trainer.accumulate_grad_batches=2",
    ),
    "weights of the last epochs": (
        'train.average={name="swa", start=2}',
        'train.schedule={name="reduce_on_plateau", warmup=1.5}',
        "train.stage=[{start=2, lr=1e-3, weights={forces=1.0}}]",
    ),
    "no schedule": ('train.optimizer={name="schedule_free"}', 'train.precision="64-true"'),
}


@pytest.mark.parametrize("name", [*VARIANTS, pytest.param("compiled", marks=pytest.mark.slow)])
def test_whatever_optimizes_it_a_resumed_run_gives_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    settings = VARIANTS.get(name, ("train.compile=true",))
    monkeypatch.setattr(training, "STEPS_MEANWHILE", 4)
    whole = _run(write_experiment(tmp_path / "whole"), *settings)
    config_file = write_experiment(tmp_path / "stopped")
    run = _stopped_at(monkeypatch, config_file, 2, *settings)
    with monkeypatch.context() as patch:  # and again in another epoch
        _ask_at(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            _resume(config_file, run, *settings)
    result = _resume(config_file, run, *settings)
    assert _numbers(result) == _numbers(whole)
    assert result["test"] == whole["test"]
    for checkpoint in ("last", "best"):
        expected = _weights(whole["run"], checkpoint)
        found = _weights(run, checkpoint)
        assert set(found) == set(expected)
        assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.parametrize("name", ["muon and an average", "weights of the last epochs"])
def test_averaged_weights_are_measured_and_kept(tmp_path: Path, name: str) -> None:
    config_file = write_experiment(tmp_path)
    result = _run(config_file, *VARIANTS[name], "train.epochs=3")
    run = Path(result["run"])
    weights = _weights(run)
    trained = weights["averaged.module.architecture.embedding.elements.weight"]
    assert not torch.equal(weights["potential.architecture.embedding.elements.weight"], trained)
    dataset = find_prepared(load_config(config_file), tmp_path / "prepared", "")
    structures = dataset.read("val")
    potential = Predictor.load(run / "checkpoints" / "last.ckpt").potential
    predicted = potential(make_batch(structures, potential.cutoff))["forces"].detach().double()
    error = (predicted.numpy() - structures.atoms["forces"]).__abs__().mean()
    last = [row for row in _rows(result) if row["val/forces_mae"]][-1]
    assert float(last["val/forces_mae"]) == pytest.approx(error, rel=1e-4)


def test_a_plateau_goes_on_after_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plateau = "train.schedule={patience=1, min_lr=0.0}"
    settings = ("train.epochs=6", "train.optimizer.lr=1e-6", plateau)
    whole = _run(write_experiment(tmp_path / "whole"), *settings)
    rates = [float(row["lr"]) for row in _rows(whole) if row["lr"]]
    assert rates == pytest.approx([1e-6, 1e-6, 1e-6, 5e-7, 5e-7, 2.5e-7])
    config_file = write_experiment(tmp_path / "stopped")
    run = _stopped_at(monkeypatch, config_file, 11, *settings)  # the last step of the second epoch
    assert _numbers(_resume(config_file, run, *settings)) == _numbers(whole)


def test_the_rate_follows_schedule_and_stages(tmp_path: Path) -> None:
    settings = (
        'train.schedule={name="linear", warmup=1.0, end=0.5}',
        "train.epochs=4",
        "train.stage=[{start=3, lr=1e-4, weights={forces=2.0, dipole=0.0}}]",
    )
    rows = [row for row in _rows(_run(write_experiment(tmp_path), *settings)) if row["lr"]]
    n, top = 6, 5e-3  # batches of an epoch; a row has the rate of the epoch's last batch

    def rate(epoch: float) -> float:
        return top * (epoch if epoch < 1 else 1 - 0.5 * (epoch - 1) / 3)

    expected = [rate(epoch + (n - 1) / n) for epoch in range(3)] + [1e-4]
    assert [float(row["lr"]) for row in rows] == pytest.approx(expected)
    for row, (forces, dipole) in zip(rows, [(10.0, 1.0)] * 3 + [(2.0, 0.0)], strict=True):
        terms = {name: float(row[f"train/loss/{name}"]) for name in ("energy", "forces", "dipole")}
        total = terms["energy"] + forces * terms["forces"] + dipole * terms["dipole"]
        assert float(row["train/loss/total_loss"]) == pytest.approx(total, rel=1e-6)


def test_a_warm_up_that_does_not_end_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schedule = 'train.schedule={name="constant", warmup=2.5}'
    rows = _rows(_run(write_experiment(tmp_path), schedule, "train.epochs=1"))
    assert float(rows[0]["lr"]) < 5e-3
    assert (
        "the warm-up (2.5 epochs) is longer than the training (1): the learning rate stays below "
        "0.005"
    ) in capsys.readouterr().out


def test_double_precision_trains_measures_and_predicts_in_it(tmp_path: Path) -> None:
    result = _run(write_experiment(tmp_path), 'train.precision="64-true"', "train.epochs=1")
    predictor = Predictor.load(Path(result["run"]))
    assert predictor.potential.dtype == torch.float64
    weights = _weights(result["run"])
    assert all(w.dtype == torch.float64 for n, w in weights.items() if w.is_floating_point())
    energy = NNPCalculator(result["run"]).get_potential_energy(Atoms("NH3", np.eye(4, 3)))
    assert energy != float(np.float32(energy))


def _resume(config_file: Path, run: Path, *settings: str) -> dict[str, Any]:
    config = load_config(config_file, settings)
    return train(config, config_file, config_file.parent / "prepared", Terminal(), [], resume=run)


def test_what_may_not_change_is_refused_key_by_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_file = write_experiment(tmp_path)
    run = _stopped_at(monkeypatch, config_file, 3)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError) as caught:
        _resume(config_file, run, "train.potential.features=16", "train.epochs=5", "train.seed=4")
    text = str(caught.value)
    assert "the config is not the one that the run was started with" in text
    assert "train.seed: 0 before, 4 now\n" in text
    assert "train.potential.features: 8 before, 16 now\n" in text
    assert "train.epochs: 3" not in text
    assert "set it back, or train anew without --resume" in text
    after = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != "log.txt"}
    assert {path: before[path] for path in after if path in before} == {
        path: content for path, content in after.items() if path in before
    }


def test_other_data_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config_file = write_experiment(tmp_path)
    run = _stopped_at(monkeypatch, config_file, 3)
    (tmp_path / "data.extxyz").unlink()
    write_extxyz(tmp_path / "data.extxyz", springs(seed=5))
    prepare(load_config(config_file), tmp_path / "prepared", Terminal())
    with pytest.raises(ConfigError, match="the sources of the dataset have changed"):
        _resume(config_file, run)


def test_more_epochs_are_trained_and_noted(
    finished: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(finished[0].parent, tmp_path / "copy", symlinks=True)
    config_file = tmp_path / "copy" / "config.toml"
    run = tmp_path / "copy" / "runs" / Path(finished[1]["run"]).name
    with pytest.raises(ConfigError) as caught:
        _resume(config_file, run)
    assert "the run has done all its 3 epochs" in str(caught.value)
    assert "raise it to train on: --set train.epochs=6" in str(caught.value)
    result = _resume(config_file, run, "train.epochs=5")
    whole = _run(write_experiment(tmp_path / "whole"), "train.epochs=5")
    assert _numbers(result) == _numbers(whole)
    assert "goes on after 3 epochs and 0 batches\ntrain.epochs: 3 before, 5 now" in (
        capsys.readouterr().out
    )
    assert [row["epoch"] for row in _rows(result)] == ["0", "1", "2", "3", "4", ""]
    (entry,) = json.loads((run / "manifest.json").read_text())["resumed"]
    assert entry["epochs_done"] == 3
    assert entry["changed"] == {"train.epochs": [3, 5]}
    assert load_config(run / "config.toml").train.epochs == 5  # type: ignore[union-attr]


def test_a_run_that_is_none_or_has_no_checkpoint_or_is_busy_is_refused(tmp_path: Path) -> None:
    config_file = write_experiment(tmp_path)
    config = load_config(config_file)
    prepare(config, tmp_path / "prepared", Terminal())
    with pytest.raises(RunError, match="there is no run at"):
        _resume(config_file, tmp_path / "runs" / "latest")
    run = RunDirectory.create(tmp_path, config, {})
    with pytest.raises(RunError, match="has no checkpoint to go on from"):
        _resume(config_file, run.path)
    (run.path / "checkpoints" / "last.ckpt").touch()
    with run.locked(), pytest.raises(RunError, match="another process trains the run"):
        _resume(config_file, run.path)


DIES = """
import os, sys, threading
from runner.cli import main
from runner.training import Training

number, delay = int(sys.argv.pop(1)), float(sys.argv.pop(1))
begin = Training.on_train_start

def begins(self):
    timer = threading.Timer(delay, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()
    begin(self)

Training.on_train_start = begins
main()
"""


@pytest.mark.slow
def test_killed_at_any_moment_a_run_gives_the_numbers_of_one_that_never_stopped(
    tmp_path: Path,
) -> None:
    settings = ("train.epochs=150", "train.checkpoints.minutes=0.001", *CHANGING)
    settings += ("train.early_stopping.patience=150",)
    whole = _run(write_experiment(tmp_path / "whole"), *settings)
    config_file = write_experiment(tmp_path / "killed")
    prepare(load_config(config_file, settings), tmp_path / "killed" / "prepared", Terminal())
    words = ["train", str(config_file.parent), "--data-dir", str(tmp_path / "killed" / "prepared")]
    words += [word for setting in settings for word in ("--set", setting)]
    rng, last = np.random.default_rng(0), tmp_path / "killed/runs/latest"
    signals = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
    ends = []
    for kill in range(20):
        go_on = ["--resume"] if (last / "checkpoints" / "last.ckpt").is_file() else []
        moment = [str(int(signals[kill % 4])), str(rng.uniform(0.02, 0.4))]
        command = [sys.executable, "-c", DIES, *moment, *words, *go_on]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "Traceback" not in done.stderr
        assert "bug" not in done.stderr
        ends.append(done.returncode)
    assert ends == [-signal.SIGKILL, -signal.SIGKILL, 130, 130] * 5  # it was never done before
    subprocess.run([sys.executable, "-m", "runner", *words, "--resume"], check=True)
    result = {"run": str(last.resolve())}
    assert _numbers(result) == _numbers(whole)
    for checkpoint in ("last", "best"):
        expected = _weights(whole["run"], checkpoint)
        found = _weights(result["run"], checkpoint)
        assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_early_stopping_ends_the_run(tmp_path: Path) -> None:
    config_file = write_experiment(tmp_path)
    result = _run(
        config_file,
        "train.epochs=50",
        "train.early_stopping.patience=2",
        "train.early_stopping.min_delta=1e9",
    )
    assert result["epochs"] == 3  # the first, and two that did not improve by so much


def test_no_test_split_means_no_test(tmp_path: Path) -> None:
    config_file = write_experiment(tmp_path)
    shares = [f"prepare.split.{name}={n}" for name, n in (("train", 50), ("val", 10), ("test", 0))]
    assert _run(config_file, "train.epochs=1", *shares)["test"] == {}


def test_validation_losses_of_a_scheduled_weight_can_be_compared(tmp_path: Path) -> None:
    config_file = write_experiment(tmp_path)
    result = _run(config_file, "train.loss.forces.weight={ start = 1.0, end = 9.0, epochs = 2 }")
    rows = [row for row in _rows(result) if row["train/loss/total_loss"]]
    assert len(rows) == 3
    for row, weight in zip(rows, (1.0, 5.0, 9.0), strict=True):
        assert float(row["lr"]) == 5e-3  # in double precision, as configured
        for split, factor in (("train", weight), ("val", 9.0)):
            terms = {n: float(row[f"{split}/loss/{n}"]) for n in ("energy", "forces", "dipole")}
            expected = terms["energy"] + factor * terms["forces"] + terms["dipole"]
            assert float(row[f"{split}/loss/total_loss"]) == pytest.approx(expected, rel=1e-5)


def test_every_epoch_says_how_long_it_waited_for_data(
    finished: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config_file, result = finished
    for row in _rows(result)[:3]:
        assert 0 < float(row["time/data"]) < float(row["time/compute"]) < 100
    log = (Path(result["run"]) / "log.txt").read_text()
    assert log.count("% waiting for data") == 3
    assert "data in memory, " in log
    make = Stock.make

    def slow(self: Stock, draw: Draw) -> Batch:
        time.sleep(0.05)
        return make(self, draw)

    monkeypatch.setattr(Stock, "make", slow)
    log = (Path(_run(config_file, "train.epochs=2")["run"]) / "log.txt").read_text()
    assert log.count("advice: more than 10 % of the time goes into waiting for batches; ") == 1
    assert "set train.data.workers = 1, or make the batches larger" in log


@pytest.mark.parametrize(
    "settings",
    [
        ("train.data.residence=stream",),
        ("train.data.residence=device", "train.data.workers=2"),
    ],
)
def test_where_the_data_is_changes_no_number(
    finished: tuple[Path, dict[str, Any]], settings: tuple[str, ...]
) -> None:
    config_file, result = finished
    assert _numbers(_run(config_file, *settings)) == _numbers(result)


def test_batches_of_so_many_atoms_or_pairs_and_weights_train(tmp_path: Path) -> None:
    config_file = write_experiment(tmp_path)
    result = _run(config_file, "train.batch={atoms = 30}", "train.data.weights={by='source'}")
    assert 3 * 6 <= result["steps"] <= 3 * 9  # 192 atoms an epoch
    assert "data in memory" in (Path(result["run"]) / "log.txt").read_text()
    result = _run(config_file, "train.batch={pairs = 90}", "train.data.train_size=20")
    assert 3 * 2 <= result["steps"] <= 3 * 5
    with pytest.raises(DatasetError, match=r"a structure of the train split has 5 atoms, more"):
        _run(config_file, "train.batch={atoms = 4}")


def test_periodic_structures_train(tmp_path: Path) -> None:
    config_file = write_experiment(tmp_path)
    data = tmp_path / "data.extxyz"
    box = 'Lattice="3.5 0 0 0.7 3.5 0 0 0 6" pbc="T T F"'
    data.write_text(data.read_text().replace('pbc="F F F"', box))
    first = _run(config_file)
    assert first["test"]["forces_mae"] > 0
    assert _numbers(_run(config_file, "train.data.residence=device")) == _numbers(first)
    calculator = NNPCalculator(first["run"])
    atoms = Atoms("OCH", [[0, 0, 1.2], [0, 0, 0], [0.95, 0, -0.5]], pbc=(True, True, False))
    atoms.set_cell([[3.5, 0, 0], [0.7, 3.5, 0], [0, 0, 6]])
    energies, forces = [], []
    for copies in ((1, 1, 1), (2, 1, 1), (1, 3, 1)):
        repeated = atoms.repeat(copies)
        repeated.calc = calculator
        energies.append(repeated.get_potential_energy() / np.prod(copies))
        forces.append(repeated.get_forces()[:3])
    assert energies == pytest.approx([energies[0]] * 3, abs=1e-4)
    assert forces[1] == pytest.approx(forces[0], abs=1e-4)
    isolated = Atoms(atoms.symbols, atoms.positions, calculator=calculator)
    assert abs(isolated.get_potential_energy() - energies[0]) > 1e-3  # the images count


def test_the_potential_predicts_energies_at_the_first_level_of_theory(tmp_path: Path) -> None:
    config_file = write_experiment(tmp_path)
    other = springs(seed=1)
    shifted = replace(other, structures={**other.structures})
    shifted.structures["energy"] = other.structures["energy"] + 50.0 * np.diff(other.first_atom)
    write_extxyz(tmp_path / "high.extxyz", shifted)
    text = config_file.read_text().replace(
        "[train]\n",
        '[[prepare.source]]\npath = "high.extxyz"\nlevel_of_theory = "high"\n'
        'energy = { key = "energy", unit = "eV" }\n[train]\n',
        1,
    )
    text = text.replace('path = "data.extxyz"', 'path = "data.extxyz"\nlevel_of_theory = "low"')
    config_file.write_text(text)
    result = _run(config_file, "train.epochs=1")
    predictor = Predictor.load(Path(result["run"]))
    assert set(predictor.fit.values) == {"H", "C", "N", "O"}
    assert predictor.fit.elements == ["H", "C", "N", "O"]
    written = springs()
    predicted = predictor.predict(written)["energy"]
    assert np.abs(predicted - written.structures["energy"]).max() < 30.0  # 50 eV an atom is high
    with pytest.raises(SelfEnergyError, match="F in"):
        predictor.predict(random_structures([3], elements=(1, 9)))


def test_a_dataset_that_is_damaged_under_a_run_ends_it_with_its_checkpoint_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_file = write_experiment(tmp_path)
    end = Training.on_train_epoch_end

    def damage(self: Training) -> None:
        end(self)
        if self.current_epoch == 1:
            (chunk,) = tmp_path.glob("prepared/*.zarr/atoms/forces/c/0/0")
            content = bytearray(chunk.read_bytes())
            content[len(content) // 3] ^= 1
            chunk.write_bytes(content)

    monkeypatch.setattr(Training, "on_train_epoch_end", damage)
    text = r"chunk 0 \(rows from 0\) of the array atoms/forces cannot be read"
    with pytest.raises(DatasetError, match=text):
        _run(config_file, "train.data.residence=stream")
    run = tmp_path / "runs" / "latest"
    assert json.loads((run / "manifest.json").read_text())["status"] == "failed"
    last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["epoch"] >= 1
    assert Predictor.load(run).fit.values


def test_a_dataset_that_is_replaced_under_a_run_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_file = write_experiment(tmp_path)

    def replaced(_: Training) -> None:
        (path,) = tmp_path.glob("prepared/*.zarr")
        shutil.copytree(path, tmp_path / "other")
        shutil.rmtree(path)
        (tmp_path / "other").rename(path)

    monkeypatch.setattr(Training, "on_train_epoch_start", replaced)
    with pytest.raises(DatasetError, match="was changed or removed while it was in use"):
        _run(config_file, "train.data.residence=stream", "train.epochs=1")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 9 GiB"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
    ],
)
def test_out_of_memory_says_what_to_lower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr(Training, "training_step", fails)
    text = r"out of memory in epoch 0(.|\n)*train.batch.structures = 8(.|\n)*lower it"
    with pytest.raises(RunError, match=text):
        _run(write_experiment(tmp_path))


def test_data_that_does_not_fit_where_it_is_asked_to_be_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "available_memory", lambda: 1000)
    text = r'and 1e-06 GB are free(.|\n)*residence = "memory"(.|\n)*set it to "auto" or "stream"'
    with pytest.raises(DatasetError, match=text):
        _run(write_experiment(tmp_path), "train.data.residence=memory")


def test_what_is_wrong_with_the_test_split_is_said_before_training(tmp_path: Path) -> None:
    data = springs(n=60)
    config_file = write_experiment(tmp_path, data)
    write_extxyz(tmp_path / "test.extxyz", random_structures([12]))
    text = config_file.read_text().replace('path = "data.extxyz"', 'path = "data.extxyz"\n')
    source = text[text.index("[[prepare.source]]") : text.index("[train]")]
    other = source.replace("data.extxyz", "test.extxyz") + 'split = "test"\n'
    config_file.write_text(text.replace("[train]\n", other + "[train]\n", 1))
    with pytest.raises(DatasetError, match=r"of the test split has 12 atoms, more than a batch"):
        _run(config_file, "train.batch={atoms = 10}")
    assert not list((tmp_path / "runs" / "latest" / "checkpoints").glob("best.ckpt"))


def test_a_validation_split_without_labels_is_named(tmp_path: Path) -> None:
    config_file = write_experiment(tmp_path)
    write_extxyz(tmp_path / "val.extxyz", springs(seed=3, n=4))
    text = config_file.read_text()
    text = text.replace("[train]\n", '[[prepare.source]]\npath = "val.extxyz"\nsplit = "val"\n'
        'total_charge = { key = "total_charge" }\n[train]\n', 1)  # fmt: skip
    text = text.replace(
        "[train]\n", "[prepare.split]\ntrain = 0.9\nval = 0\ntest = 0.1\n[train]\n", 1
    )
    config_file.write_text(text)
    with pytest.raises(RunError, match="no structure of the val split has energy or forces or dip"):
        _run(config_file)


def test_a_trainer_that_lightning_refuses_is_an_error_of_the_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Lightning refuses the trainer(.|\n)*train.trainer"):
        _run(write_experiment(tmp_path), "train.trainer.accelerator=foo")
    with pytest.raises(ConfigError, match=r"train.seed(.|\n)*less than 4294967296"):
        _run(write_experiment(tmp_path), "train.seed=99999999999")


@pytest.mark.parametrize("asked", ["SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize("step", ["test_step", "configure_optimizers"])
def test_a_signal_ends_a_run_as_ctrl_c_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, asked: str
) -> None:
    number = signal.Signals[asked]

    def terminated(*_: Any) -> None:
        os.kill(os.getpid(), number)
        time.sleep(1)

    monkeypatch.setattr(Training, step, terminated)
    for name, value in {"JOB_ID": "77", "NTASKS": "1", "PROCID": "0", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)  # Lightning would write a checkpoint, and more
    monkeypatch.setenv("SLURM_NODEID", "0")
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        _run(write_experiment(tmp_path), "train.epochs=1")
    (run,) = (path for path in (tmp_path / "runs").iterdir() if not path.is_symlink())
    assert json.loads((run / "manifest.json").read_text())["status"] == "interrupted"
    assert signal.getsignal(number) == before
    assert not list(run.glob("*.ckpt"))


def _stopped_in_the_test(
    monkeypatch: pytest.MonkeyPatch, config_file: Path, *settings: str
) -> Path:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Training, "test_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _run(config_file, *settings)
    return (config_file.parent / "runs" / "latest").resolve()


def test_a_run_that_was_stopped_in_its_test_is_tested_when_it_goes_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    finished: tuple[Path, dict[str, Any]],
) -> None:
    config_file = write_experiment(tmp_path)
    run = _stopped_in_the_test(monkeypatch, config_file)
    (run / "checkpoints" / "last.ckpt").touch()
    result = _resume(config_file, run)
    assert "goes on after all epochs" in capsys.readouterr().out
    for name in ("test", "best", "steps", "epochs"):
        assert result[name] == finished[1][name]
    assert _numbers(result) == _numbers(finished[1])
    assert json.loads((run / "manifest.json").read_text())["status"] == "finished"
    assert (run / "parity.png").is_file()
    with pytest.raises(ConfigError, match="the run has done all its 3 epochs"):
        _resume(config_file, run)


def test_a_run_that_was_ended_early_stays_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (
        "train.epochs=9",
        "train.early_stopping.patience=2",
        "train.early_stopping.min_delta=1e9",
    )
    whole = _run(write_experiment(tmp_path / "whole"), *settings)
    config_file = write_experiment(tmp_path / "stopped")
    run = _stopped_in_the_test(monkeypatch, config_file, *settings)
    result = _resume(config_file, run, *settings)
    assert result["epochs"] == whole["epochs"] == 3
    assert _numbers(result) == _numbers(whole)
    text = r"was ended after 3 epochs(.|\n)*train.early_stopping(.|\n)*raise its patience"
    with pytest.raises(ConfigError, match=text):
        _resume(config_file, run, *settings, "train.epochs=20")
    patient = "train.early_stopping.patience=4"
    longer = _run(write_experiment(tmp_path / "longer"), *settings, patient)
    again = _resume(config_file, run, *settings, patient)
    assert again["epochs"] == longer["epochs"] == 5
    rows = [row for row in _numbers(again) if row["val/loss/total_loss"]]
    assert rows == [row for row in _numbers(longer) if row["val/loss/total_loss"]]


def test_a_refused_resume_leaves_the_run_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_file = write_experiment(tmp_path)
    run = _stopped_at(monkeypatch, config_file, 3)
    before = {name: (run / name).read_bytes() for name in ("config.toml", "manifest.json")}
    with pytest.raises(ConfigError, match="Lightning refuses the trainer"):
        _resume(config_file, run, "train.trainer.accelerator=foo")
    assert {name: (run / name).read_bytes() for name in before} == before


def test_a_weight_of_an_element_that_is_not_there_is_refused(tmp_path: Path) -> None:
    text = r"has no Si, which the loss weighs(.|\n)*train.loss.forces.by_element(.|\n)*H, C"
    with pytest.raises(DatasetError, match=text):
        _run(write_experiment(tmp_path), "train.loss.forces.by_element.Si=2")


@pytest.mark.parametrize("average", ['{name="ema", decay=0.5}', '{name="swa", start=1}'])
def test_the_test_is_of_the_best_epochs_average(tmp_path: Path, average: str) -> None:
    config_file = write_experiment(tmp_path)
    worse = "train.stage=[{start=3, lr=0.5}]"  # in the last epochs
    rates = (worse, "train.epochs=5", 'train.precision="64-true"')
    result = _run(config_file, f"train.average={average}", *rates)
    assert result["best"]["epoch"] < 4, "the last epoch's would be the same"
    config = load_config(config_file)
    structures = find_prepared(config, tmp_path / "prepared", "").read("test")
    predictor = Predictor.load(Path(result["run"]))
    batch = make_batch(structures, predictor.potential.cutoff, dtype=torch.float64)
    error = predictor.potential(batch)["energy"].detach().numpy() - structures.structures["energy"]
    assert result["test"]["energy_mae"] == pytest.approx(np.abs(error).mean(), rel=1e-9)


def test_the_last_batches_of_an_epoch_are_averaged_over_as_many_as_they_are(
    tmp_path: Path,
) -> None:
    sgd = ("train.optimizer={name='torch.optim:SGD', lr=1e-3}", "train.epochs=1")
    sizes = ("train.data.train_size=24", "train.batch.structures=8")
    weights = []
    for n in (3, 5):  # three batches: all that there are, and fewer than a step takes
        folder = write_experiment(tmp_path / str(n))
        accumulated = f"train.trainer.accumulate_grad_batches={n}"
        result = _run(folder, *sgd, *sizes, accumulated, 'train.precision="64-true"')
        assert result["steps"] == 1
        weights.append(_weights(result["run"]))
    for name, value in weights[0].items():
        assert torch.allclose(value, weights[1][name], rtol=1e-10, atol=1e-13)


def test_the_loss_of_an_epoch_has_the_weights_of_its_steps(tmp_path: Path) -> None:
    sizes = ("train.data.train_size=24", "train.batch.structures=8", "train.epochs=2")
    weight = "train.loss.forces.weight={values=[1.0, 100.0], steps=[3]}"
    rows = _rows(_run(write_experiment(tmp_path), *sizes, weight))
    others = {"energy", "forces", "dipole"}
    for row, forces in zip(rows[:2], (1.0, 100.0), strict=True):
        terms = {n: float(row[f"train/loss/{n}"]) for n in others if f"train/loss/{n}" in row}
        total = sum(terms.values()) + (forces - 1) * terms["forces"]
        assert float(row["train/loss/total_loss"]) == pytest.approx(total, rel=1e-5)


def test_more_epochs_are_refused_where_the_best_one_could_not_be_told(tmp_path: Path) -> None:
    config_file = write_experiment(tmp_path)
    ramp = "train.loss.forces.weight={start=1.0, end=9.0, epochs=9}"
    run = Path(_run(config_file, ramp, "train.epochs=2")["run"])
    text = r"weight of forces would end at 9, not at 1.88889(.|\n)*train.epochs(.|\n)*train anew"
    with pytest.raises(ConfigError, match=text):
        _resume(config_file, run, ramp, "train.epochs=20")


def test_a_run_that_is_refused_is_not_the_latest(tmp_path: Path) -> None:
    config_file = write_experiment(tmp_path)
    result = _run(config_file, "train.epochs=1")
    for setting in ("train.data.train_size=5000", "train.trainer.accelerator=foo"):
        with pytest.raises(InputError):
            _run(config_file, setting)
    assert (tmp_path / "runs" / "latest").resolve() == Path(result["run"])


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("train.trainer.devices=0", "needs one device at least"),
        ("train.average.decay=0.9", "'ema' or 'swa'"),
        ('train.average.name="emma"', "'ema' or 'swa'"),
    ],
)
def test_what_no_training_can_be_is_refused(tmp_path: Path, setting: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        load_config(write_experiment(tmp_path), [setting])


def test_the_remedy_prepares_what_is_asked_for(tmp_path: Path) -> None:
    config_file = write_experiment(tmp_path / "my experiment")
    setting = "prepare.split.seed=7"
    config = load_config(config_file, [setting])
    command = ["runner", "train", "x", "--set", setting, "--set", "train.epochs=1"]
    with pytest.raises(DatasetError) as caught:
        train(config, config_file, tmp_path / "prepared", Terminal(), command)
    text = (
        f"runner prepare '{config_file.parent}' --data-dir {tmp_path / 'prepared'} --set {setting}"
    )
    assert f"{text}`" in str(caught.value)


def test_a_damaged_checkpoint_is_named_and_the_best_one_is_offered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config_file = write_experiment(tmp_path)
    run = _stopped_at(monkeypatch, config_file, 8)
    last = run / "checkpoints" / "last.ckpt"
    good = last.read_bytes()
    with zipfile.ZipFile(last) as archive:
        weight = max(archive.infolist(), key=lambda entry: entry.file_size)
    flipped = bytearray(good)
    flipped[weight.header_offset + len(weight.filename) + 500] ^= 0x40
    for content in (good[:-1000], b"", b"no zip file", bytes(flipped)):
        last.write_bytes(content)
        with pytest.raises(RunError) as caught:
            _resume(config_file, run)
        text = str(caught.value)
        assert "the checkpoint is damaged: " in text
        assert str(last) in text
        assert "remove it: --resume then goes on from best.ckpt" in text
    assert "the checksum of " in text
    best = last.with_name("best.ckpt")
    kept = best.read_bytes()
    best.write_bytes(kept[:-1000])
    with pytest.raises(RunError, match=r"damaged(.|\n)*take last.ckpt instead"):
        Predictor.load(run)
    best.write_bytes(kept)
    last.unlink()
    result = _resume(config_file, run)
    assert "there is no last.ckpt, so the run goes on from best.ckpt" in capsys.readouterr().out
    assert _numbers(result) == _numbers(_run(write_experiment(tmp_path / "whole")))
    events = EventAccumulator(str(run)).Reload()
    steps = [event.step for event in events.Scalars("val/energy_mae")]
    assert len(steps) == len(set(steps)) == 3


def test_a_loss_that_overflows_names_the_structures_of_its_batch(tmp_path: Path) -> None:
    with pytest.raises(RunError) as caught:
        _run(write_experiment(tmp_path), "train.loss.forces={ weight=1e300 }")
    text = str(caught.value)
    assert "train/loss/total_loss is not a finite number" in text
    assert re.search(r"[1-9]\d* of \d+ structures of a batch", text)
    assert "data.extxyz" in text


EVERYTHING = (
    'train.potential.inputs=["total_charge"]',
    'train.potential.energy={scale="per_element", shift="per_element", learnt=true}',
    "train.potential.charges.equalise=true",
    "train.potential.coulomb={}",
    'train.potential.zbl.cutoff="2 angstrom"',
)


@pytest.fixture(scope="module")
def with_everything(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return _run(write_experiment(tmp_path_factory.mktemp("all") / "experiment"), *EVERYTHING)


def test_a_potential_with_every_term_trains(with_everything: dict[str, Any]) -> None:
    rows = _rows(with_everything)
    losses = [float(row["val/loss/total_loss"]) for row in rows if row["val/loss/total_loss"]]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    potential = Predictor.load(Path(with_everything["run"])).potential
    assert set(potential.terms) == {"coulomb", "zbl"}
    assert np.isinf(potential.cutoff)
    assert potential.energy.scale[[1, 6]].unique().numel() == 2


@pytest.mark.parametrize("residence", ["stream", "device"])
def test_where_the_data_is_changes_no_number_of_a_potential_that_looks_far(
    tmp_path: Path, with_everything: dict[str, Any], residence: str
) -> None:
    setting = f"train.data.residence={residence}"
    elsewhere = _run(write_experiment(tmp_path), *EVERYTHING, setting)
    assert _numbers(elsewhere) == _numbers(with_everything)


def test_the_calculator_is_told_the_charge(with_everything: dict[str, Any]) -> None:
    atoms = Atoms("OCH2", [[0, 0, 1.2], [0, 0, 0], [0.95, 0, -0.5], [-0.95, 0, -0.5]])
    atoms.calc = NNPCalculator(with_everything["run"])
    text = r'needs the total_charge(.|\n)*atoms.info\["total_charge"\]'
    with pytest.raises(InputError, match=text):
        atoms.get_potential_energy()
    energies = []
    for charge in (0, 1):
        atoms.info["total_charge"] = charge
        energies.append(atoms.get_potential_energy())
        assert atoms.get_charges().sum() == pytest.approx(charge, abs=1e-5)
    assert abs(energies[0] - energies[1]) > 1e-3


def test_an_input_that_structures_lack_is_named(tmp_path: Path) -> None:
    text = (
        r"needs the spin_multiplicity of every structure, and 60 of 60 have none(.|\n)*"
        r"spin_multiplicity = \{ value = 1 \}"
    )
    with pytest.raises(DatasetError, match=text):
        _run(write_experiment(tmp_path), 'train.potential.inputs=["spin_multiplicity"]')


def test_a_cutoff_that_leaves_structures_without_pairs_is_said_and_allowed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _run(write_experiment(tmp_path), 'train.potential.cutoff="0.9 angstrom"', "train.epochs=1")
    text = r"\d+ of the 48 training structures have several atoms, no two of them within 0.9 Å"
    assert re.search(text, capsys.readouterr().out)


def test_a_checkpoint_of_the_version_before_still_predicts(
    tmp_path: Path, finished: tuple[Path, dict[str, Any]]
) -> None:
    run = Path(finished[1]["run"])
    checkpoint = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    weights, old = checkpoint["state_dict"], {}
    for name, tensor in weights.items():
        if name != "potential.energy.shift":
            before = name.replace("energy.scale", "scale").replace("readouts.", "")
            old[before.replace("embedding.elements.weight", "embedding.weight")] = tensor
    passport = checkpoint["runner"] | {"checkpoint_version": 1}
    del passport["quadrupole"]
    kept = ("name", "cutoff", "features", "interactions", "radial_basis")
    passport["potential"] = {key: passport["potential"][key] for key in kept}
    torch.save({"state_dict": old, "runner": passport}, tmp_path / "old.ckpt")
    structures = springs(seed=5, n=4)
    expected = Predictor.load(run).predict(structures)
    for name, values in Predictor.load(tmp_path / "old.ckpt").predict(structures).items():
        assert (values == expected[name]).all()


def test_a_long_training_is_compiled_and_a_failure_leaves_it_as_it_is(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    finished: tuple[Path, dict[str, Any]],
) -> None:
    def fails(*_: Any) -> None:
        raise RunError("the training step cannot be compiled: no memory")

    monkeypatch.setattr(train_module, "WORTH_COMPILING", 100)
    monkeypatch.setattr(compiled, "_compiled", fails)
    monkeypatch.setattr(compiled, "COMPILE", "raise SystemExit(1)")
    monkeypatch.setenv("CXX", "true")
    result = _run(write_experiment(tmp_path))
    output = capsys.readouterr().out
    assert "training steps are compiled, which takes" in output
    assert (
        output.count("steps are no longer compiled: the training step cannot be compiled: no mem")
        == 1
    )
    assert _numbers(result) == _numbers(finished[1])
    with pytest.raises(RunError, match="cannot be compiled: no memory"):
        _run(write_experiment(tmp_path), "train.compile=true")
    _run(write_experiment(tmp_path), "train.compile=false", "train.epochs=1")
    monkeypatch.setenv("CXX", "no-such-compiler")
    _run(write_experiment(tmp_path), "train.epochs=1")
    assert "not compiled: there is no C++ compiler" in capsys.readouterr().out


def test_the_first_steps_are_taken_as_they_are_while_the_step_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[bool] = []
    used: list[int] = []  # the step of each call

    class Program(compiled.CompiledStep):
        def compile_aside(self, *_: Any) -> None:
            begun.append(self.learns)

        def __call__(self, batch: Batch, *given: Any) -> StepResult:
            if self.learns:
                used.append(len(taken))
            return self.step(batch, *given)

    def step(self: Training, batch: Batch) -> torch.Tensor:
        loss = take(self, batch)
        taken.append(1)
        return loss

    taken: list[int] = []
    take = Training.training_step
    monkeypatch.setattr(Training, "training_step", step)
    monkeypatch.setattr(training, "CompiledStep", Program)
    monkeypatch.setattr(training, "STEPS_MEANWHILE", 4)
    result = _run(write_experiment(tmp_path / "compiled"), "train.compile=true")
    # before the first batches of the other two epochs also for the gradient of each of three terms
    assert used == [4, 5, *[6] * 4, *range(7, 12), *[12] * 4, *range(13, 18)]
    assert set(begun[:2]) == {True, False}
    assert result["steps"] == 18


def test_a_short_training_is_not_compiled(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    assert "compiled" not in (Path(finished[1]["run"]) / "log.txt").read_text()


def test_errors_apart_and_the_balance_are_logged_each_epoch(tmp_path: Path) -> None:
    result = _run(
        write_experiment(tmp_path),
        "train.epochs=2",
        'train.loss.own.angle={name="test_train:Angle", weight=0.1}',
        'train.metrics.forces=["cosine", "mae", "r2", "torchmetrics:PearsonCorrCoef"]',
        'train.metrics.energy=["max_error"]',
        'train.metrics.by=["element", "source", "size", "charge"]',
        'train.loss.forces.by_source={"data.extxyz" = 0.5}',
    )
    *epochs, test = _rows(result)
    assert len(epochs) == 2
    for row in epochs:
        terms = ("energy", "forces", "dipole", "angle")
        assert sum(float(row[f"train/share/{term}"]) for term in terms) == pytest.approx(1)
        assert all(float(row[f"train/gradient_norm/{term}"]) > 0 for term in terms)
        assert all(float(row[f"train/coverage/{term}"]) == 1 for term in terms)
        assert -1 <= float(row["train/forces_cosine"]) <= 1
        assert float(row["val/forces_PearsonCorrCoef"]) ** 2 <= 1
        assert float(row["val/loss/angle"]) >= 0
    by_size = [
        float(v) for k, v in test.items() if k.startswith("test/energy_max_error_by_size/") and v
    ]
    assert float(test["test/energy_max_error"]) == max(by_size)
    assert float(test["test/forces_mae_by_source/data.extxyz"]) == pytest.approx(
        float(test["test/forces_mae"])
    )
    for group in ("element/H", "charge/", "size/3-4"):
        assert any(name.startswith(f"forces_mae_by_{group}") for name in result["test"])


class Angle(Term):
    """A term of the user's: one less the cosine of the angle of the forces."""

    labels = ("forces",)

    def values(self, prediction: Mapping[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        cosine = torch.cosine_similarity(prediction["forces"], batch.labels["forces"], eps=1e-6)
        return batch.sum_by_structure(1 - cosine) / batch.n_atoms


def test_bfloat16_is_mixed_in_where_matrices_are_multiplied(tmp_path: Path) -> None:
    config_file = write_experiment(tmp_path)
    with pytest.raises(ConfigError, match='"bf16-mixed" is not compiled'):
        load_config(config_file, ["train.precision=bf16-mixed", "train.compile=true"])
    mixed = _run(config_file, "train.precision=bf16-mixed")
    single = _run(config_file)
    assert {tensor.dtype for tensor in _weights(mixed["run"]).values()} >= {torch.float32}
    assert torch.bfloat16 not in {tensor.dtype for tensor in _weights(mixed["run"]).values()}
    for name, value in single["test"].items():
        assert mixed["test"][name] == pytest.approx(value, rel=0.3)  # it learns as well
        assert mixed["test"][name] != value
