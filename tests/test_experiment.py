"""Run directories."""

from __future__ import annotations

import json
from pathlib import Path

from molecules import write_experiment

from runner.config import load_config
from runner.experiment import RunDirectory


def test_runs_that_start_at_once_get_directories_of_their_own(tmp_path: Path) -> None:
    config = load_config(write_experiment(tmp_path))
    runs = [RunDirectory.create(tmp_path, config, {}) for _ in range(3)]
    assert len({run.path for run in runs}) == 3
    assert not (tmp_path / "runs" / "latest").exists()
    runs[-1].begin()
    assert (tmp_path / "runs" / "latest").resolve() == runs[-1].path
    assert (tmp_path / "runs" / "latest").is_symlink()


def test_the_manifest_is_written_whole_and_grows(tmp_path: Path) -> None:
    config = load_config(write_experiment(tmp_path))
    run = RunDirectory.create(tmp_path, config, {"seed": 3})
    first = json.loads((run.path / "manifest.json").read_text())
    assert first["status"] == "running"
    assert first["seed"] == 3
    run.finish("finished")
    last = json.loads((run.path / "manifest.json").read_text())
    assert last["status"] == "finished"
    assert last["started"] == first["started"] <= last["ended"]
    assert not list(run.path.glob(".*"))
