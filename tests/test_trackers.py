"""W&B and MLflow: one run there for one run directory, whole, and marked as it ended."""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from molecules import write_experiment

from runner.config import load_config
from runner.errors import ConfigError
from runner.prepare import prepare
from runner.runs import read_rows
from runner.terminal import Terminal
from runner.train import require_train, train
from runner.training import Training

WANDB = 'train.logger.wandb={project="springs", tags=["try"], mode="offline"}'
MLFLOW = "train.logger.mlflow={tags={who='me'}}"


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_that_is_not_installed_is_refused_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    config_file = write_experiment(tmp_path)
    config = load_config(config_file, [f"train.logger.{name}={{}}"])
    for verb in (
        lambda: require_train(config, config_file),  # what `runner run` begins with
        lambda: train(config, config_file, tmp_path / "prepared", Terminal(), []),
    ):
        with pytest.raises(ConfigError) as caught:
            verb()
        text = str(caught.value)
        assert f"train.logger.{name} needs the package {name}\n" in text
        assert f"where:   train.logger.{name}\n" in text
        assert f"pip install 'nnp-runner[{name}]', or take the table out" in text
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "prepared").exists()


def test_a_folder_of_its_name_is_not_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_file = write_experiment(tmp_path)
    (tmp_path / "wandb" / "offline-run-1").mkdir(parents=True)  # what W&B leaves where it runs
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ConfigError, match="needs the package wandb"):
        require_train(load_config(config_file, ["train.logger.wandb={}"]), config_file)


def _train(config_file: Path, *settings: str, resume: Path | None = None) -> Path:
    config, folder = load_config(config_file, settings), config_file.parent / "prepared"
    prepare(config, folder, Terminal())
    return Path(train(config, config_file, folder, Terminal(), [], resume)["run"])


def _end_at(patch: pytest.MonkeyPatch, step: int, how: str) -> None:
    """Let a step be the last: by a signal, or by an error."""
    taken = Training.training_step

    def ends(self: Training, batch: Any) -> torch.Tensor:
        if self.global_step == step and how == "failed":
            raise ZeroDivisionError
        if self.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return taken(self, batch)

    patch.setattr(Training, "training_step", ends)


def _stopped(patch: pytest.MonkeyPatch, config_file: Path, how: str, *settings: str) -> Path:
    """A run that ends in its second epoch of six steps."""
    with patch.context() as patched:
        _end_at(patched, 8, how)
        with pytest.raises(ZeroDivisionError if how == "failed" else KeyboardInterrupt):
            _train(config_file, *settings)
    return (config_file.parent / "runs" / "latest").resolve()


def _whole(run: Path, folder: str) -> tuple[dict[int, dict[str, Any]], dict[str, Any], int]:
    """What is written once W&B's own process has closed the file, a moment after a run ends."""
    for _ in range(100):
        found = _written(run, folder)
        if found[-1] != -1:
            break
        time.sleep(0.1)
    return found


def _written(run: Path, folder: str) -> tuple[dict[int, dict[str, Any]], dict[str, Any], int]:
    """Rows by step, the rest of the summary, and the exit code of an offline run of W&B."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = (run / "wandb" / folder).glob("*.wandb")
    content = file.read_bytes()
    rows: dict[int, dict[str, Any]] = {}
    summary: dict[str, Any] = {}
    code, at, whole = -1, 7, b""
    while at < len(content):  # blocks of 32 KiB of records with headers, as in LevelDB
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record, whole = Record.FromString(whole), b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                row = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in items}
                rows[record.history.step.num] = row
            elif record.WhichOneof("record_type") == "summary":
                items = record.summary.update
                summary |= {i.key or i.nested_key[0]: json.loads(i.value_json) for i in items}
            elif record.WhichOneof("record_type") == "exit":
                code = record.exit.exit_code
    return rows, summary, code


@pytest.mark.filterwarnings("ignore")  # of W&B
def test_wandb_has_all_epochs_of_a_resumed_run_in_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    config_file = write_experiment(tmp_path)
    run = _stopped(monkeypatch, config_file, "interrupted", WANDB)
    (first,) = (path.name for path in (run / "wandb").glob("offline-run-*"))
    rows, _, code = _whole(run, first)
    assert (sorted(rows), code) == ([6], 255)
    identity = json.loads((run / "manifest.json").read_text())["loggers"]["wandb"]["id"]
    assert first.endswith(identity)
    assert _train(config_file, WANDB, resume=run) == run
    last = max(path.name for path in (run / "wandb").glob("offline-run-*"))
    assert last != first
    assert last.endswith(identity)
    rows, summary, code = _whole(run, last)
    assert code == 0
    expected = read_rows(run / "metrics.csv")
    assert sorted(rows) == [6, 12, 18]
    for row, found in zip(expected, rows.values(), strict=False):
        named = {name: float(value) for name, value in row.items() if value and name != "step"}
        assert {name: found[name] for name in named} == named
        assert found["trainer/global_step"] == int(row["step"])
    test = {name: float(v) for name, v in expected[-1].items() if name.startswith("test/")}
    assert {name: summary[name] for name in test} == test


@pytest.mark.filterwarnings("ignore")  # of MLflow and SQLAlchemy
def test_mlflow_has_all_epochs_of_a_resumed_run_in_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    write_experiment(tmp_path)
    monkeypatch.chdir(tmp_path)
    config_file = Path("config.toml")
    run = _stopped(monkeypatch, config_file, "interrupted", MLFLOW)
    assert "MLFLOW_TRACKING_URI" not in os.environ
    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    identity = json.loads((run / "manifest.json").read_text())["loggers"]["mlflow"]["run_id"]
    assert client.get_run(identity).info.status == "KILLED"
    assert _train(config_file, MLFLOW, "train.epochs=4", resume=run) == run
    (experiment,) = client.search_experiments(filter_string=f"name = '{tmp_path.name}'")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_id == identity
    assert found.info.status == "FINISHED"
    assert found.info.run_name == run.name
    assert found.data.tags["who"] == "me"
    assert found.data.params["train.optimizer.lr"] == "0.005"
    assert found.data.params["train.epochs"] == "3"
    assert found.data.tags["train.epochs"] == "4"
    for row in read_rows(run / "metrics.csv"):
        for name, value in row.items():
            history = client.get_metric_history(identity, name) if value and name != "step" else []
            values = {metric.step: metric.value for metric in history}
            assert not history or values[int(row["step"])] == float(value), name
    assert len(client.get_metric_history(identity, "val/loss/total_loss")) == 4


@pytest.mark.filterwarnings("ignore")
def test_a_logger_that_does_not_know_the_run_gets_the_epochs_that_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    from mlflow.tracking import MlflowClient

    config_file = write_experiment(tmp_path)
    run = _stopped(monkeypatch, config_file, "failed", MLFLOW)
    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    first = json.loads((run / "manifest.json").read_text())["loggers"]["mlflow"]["run_id"]
    assert client.get_run(first).info.status == "FAILED"
    elsewhere = f"sqlite:///{tmp_path / 'other.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", elsewhere)
    _train(config_file, MLFLOW, resume=run)
    assert os.environ["MLFLOW_TRACKING_URI"] == elsewhere
    other = json.loads((run / "manifest.json").read_text())["loggers"]["mlflow"]["run_id"]
    history = MlflowClient(elsewhere).get_metric_history(other, "val/forces_mae")
    assert [metric.step for metric in history] == [6, 12, 18]
    assert other != first


@pytest.mark.filterwarnings("ignore")
def test_a_server_that_goes_away_does_not_end_a_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    def gone(*_: object, **__: object) -> None:
        raise MlflowException("no answer")

    for name in ("log_batch", "set_terminated"):
        monkeypatch.setattr(MlflowClient, name, gone)
    run = _train(write_experiment(tmp_path), MLFLOW, "train.epochs=1")
    said = capsys.readouterr().out
    assert json.loads((run / "manifest.json").read_text())["status"] == "finished"
    assert "warning: MLflow has not got the config: no answer" in said
    assert "warning: MLflow has not got a row, which metrics.csv has: no answer" in said
    assert "warning: MLflow was not told how the run ended: finished: no answer" in said


@pytest.mark.filterwarnings("ignore")
def test_a_server_that_is_not_there_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    nowhere = "train.logger.mlflow={tracking_uri='http://127.0.0.1:9'}"
    with pytest.raises(ConfigError) as caught:
        _train(write_experiment(tmp_path), nowhere)
    assert "MLflow cannot be used: " in str(caught.value)
    assert "correct train.logger.mlflow.tracking_uri" in str(caught.value)
