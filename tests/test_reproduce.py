"""Reproducing a run: identical, or what differs first."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from molecules import springs, write_experiment, write_extxyz

from runner import cli
from runner.config import load_config
from runner.errors import RunError
from runner.experiment import RunDirectory
from runner.prepare import prepare
from runner.reproduce import (
    comparisons,
    metrics_difference,
    reproduce,
    require_identical,
    weights_difference,
)
from runner.runs import read_rows
from runner.terminal import Terminal
from runner.train import train


def _train(config_file: Path, *settings: str, resume: Path | None = None) -> Path:
    config, folder = load_config(config_file, settings), config_file.parent / "prepared"
    prepare(config, folder, Terminal())
    return Path(train(config, config_file, folder, Terminal(), [], resume)["run"])


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs."""
    return _train(write_experiment(tmp_path_factory.mktemp("experiment")), "train.epochs=2")


def _noted(run: Path, **entries: Any) -> None:
    """Change what a manifest says."""
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | entries))


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    """A copy of it, sources and dataset included, that may be spoilt."""
    experiment = original.parent.parent
    shutil.copytree(experiment, tmp_path / "copy", symlinks=True)
    copy = tmp_path / "copy" / "runs" / original.name
    for file in ("manifest.json", "config.toml"):
        text = (copy / file).read_text()
        (copy / file).write_text(text.replace(str(experiment), str(tmp_path / "copy")))
    return copy


def _reproduced(run: Path) -> dict[str, Any]:
    return reproduce(run, None, Terminal(), ["runner", "reproduce", "x"])


def test_a_run_is_reproduced_to_the_bit_beside_it(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = _reproduced(run)
    assert result["identical"] is True
    assert result["differences"] == result["surroundings"] == []
    again = Path(result["reproduction"])
    assert again.parent == run.parent
    assert again != run
    assert (run.parent / "latest").resolve() == run
    manifest = json.loads((again / "manifest.json").read_text())
    assert manifest["reproduces"] == str(run)
    assert manifest["dataset"] == json.loads((run / "manifest.json").read_text())["dataset"]
    assert manifest["command"] == ["runner", "reproduce", "x"]
    said = capsys.readouterr().out
    assert "versions, hardware and git commit are as they were" in said
    assert (
        "identical: SHA-256 of the sources (1 files); the prepared dataset; metrics.csv, 3 rows "
        "but for the times; test_metrics.json; the weights in best.ckpt; the weights in last.ckpt"
    ) in said
    folder = run.parent.parent / "prepared"
    assert not list(folder.glob(".scratch*"))
    require_identical(result)


def test_a_planted_digit_is_found_and_named(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = read_rows(run / "metrics.csv")
    value = rows[1]["val/forces_mae"]
    other = value[:-1] + str((int(value[-1]) + 1) % 10)
    text = (run / "metrics.csv").read_text()
    (run / "metrics.csv").write_text(text.replace(value, other))
    manifest = json.loads((run / "manifest.json").read_text())
    _noted(run, versions=manifest["versions"] | {"torch": "1.0"})
    monkeypatch.setattr(sys, "argv", ["runner", "reproduce", str(run), "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    output = capsys.readouterr()
    result = json.loads(output.out)
    assert result["identical"] is False
    (found,) = result["differences"]
    assert found == {
        "what": "val/forces_mae of epoch 1 in metrics.csv",
        "then": other,
        "now": value,
        "epoch": 1,
        "column": "val/forces_mae",
    }
    (surrounding,) = result["surroundings"]
    assert surrounding == {"what": "torch", "then": "1.0", "now": torch.__version__}
    assert f"in metrics.csv: {other} then, {value} now" in output.err
    assert f"may be the reason: torch (1.0 then, {torch.__version__} now)" in output.err
    assert re.search(r"What is not as it was\s+then\s+now\s+torch\s+1.0", output.err)


def test_a_planted_weight_is_found_and_named(original: Path, run: Path) -> None:
    path = run / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    name = next(key for key, weight in checkpoint["state_dict"].items() if weight.dim() == 2)
    weight = checkpoint["state_dict"][name]
    before = weight[1, 0].item()
    weight[1, 0] = torch.nextafter(weight[1, 0], torch.tensor(torch.inf))
    torch.save(checkpoint, path)
    assert [d for _, d in comparisons(original, original)] == [None] * 4
    assert weights_difference(run, original, "last.ckpt") == {
        "what": f"{name}[1, 0] in last.ckpt",
        "then": weight[1, 0].item(),
        "now": before,
        "weight": name,
    }
    del checkpoint["state_dict"][name]
    torch.save(checkpoint, path)
    found = weights_difference(run, original, "last.ckpt")
    assert found is not None
    assert (found["then"], found["now"]) == (None, "there")


def test_test_errors_and_missing_rows_are_compared(original: Path, run: Path) -> None:
    errors = json.loads((run / "test_metrics.json").read_text())
    (run / "test_metrics.json").write_text(json.dumps(errors | {"forces_mae": 1.0}))
    found = {what: difference for what, difference in comparisons(run, original) if difference}
    assert found["test_metrics.json"]["what"] == "forces_mae in test_metrics.json"
    assert found["test_metrics.json"]["then"] == 1.0
    rows = read_rows(run / "metrics.csv")
    assert metrics_difference(rows, rows[:2]) == {
        "what": "the number of rows of metrics.csv",
        "then": 3,
        "now": 2,
    }
    slower = [row | {"time/data": "99"} for row in rows]
    assert metrics_difference(rows, slower) is None


def test_a_changed_or_missing_source_is_named_and_nothing_is_trained(run: Path) -> None:
    data = run.parent.parent / "data.extxyz"
    before = json.loads((run / "manifest.json").read_text())["sources"][0]["sha256"]
    data.write_text(data.read_text().replace("energy=-", "energy=-1", 1))
    result = _reproduced(run)
    (found,) = result["differences"]
    assert found["what"] == f"the source file {data} has changed, SHA-256"
    assert found["then"] == before != found["now"]
    data.unlink()
    (found,) = _reproduced(run)["differences"]
    assert found["what"] == f"the source file {data} is gone"
    with pytest.raises(RunError, match=r"the run is not reproduced: the source file .* is gone"):
        require_identical(result | {"differences": [found]})
    assert result["reproduction"] is None
    assert len(list(run.parent.iterdir())) == 2  # the run, and latest


def test_another_self_energy_or_array_is_named(run: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    energies = manifest["self_energies"]
    _noted(run, self_energies=energies | {"C": energies["C"] + 1e-12 * abs(energies["C"])})
    (found,) = _reproduced(run)["differences"]
    assert found["what"] == "the self-energy of C, in eV"
    assert found["now"] == energies["C"]
    other = run.parent.parent / "other"
    write_extxyz(other.with_suffix(".extxyz"), springs(seed=3))
    text = (run / "config.toml").read_text().replace("data.extxyz", "other.extxyz")
    other.with_suffix(".toml").write_text(text)
    there = prepare(load_config(other.with_suffix(".toml")), other, Terminal())["dataset"]
    _noted(run, self_energies=energies, dataset=there)
    (found,) = _reproduced(run)["differences"]
    assert re.fullmatch(r"\w+\[\d+(, \d+)?\] of the dataset", found["what"])
    assert found["then"] != found["now"]


def test_a_run_that_has_not_ended_is_refused(run: Path) -> None:
    _noted(run, status="interrupted")
    with pytest.raises(RunError) as caught:
        _reproduced(run)
    text = str(caught.value)
    assert "the run was interrupted, so there is no end to compare with" in text
    assert f"finish it: runner train {run} --resume {run}" in text
    _noted(run, status="running")
    with pytest.raises(RunError, match="the run was killed, so"):
        _reproduced(run)
    directory = RunDirectory(run, json.loads((run / "manifest.json").read_text()))
    with directory.locked(), pytest.raises(RunError, match="the run is still trained, so"):
        _reproduced(run)


def test_a_run_that_was_compiled_in_part_is_refused(run: Path) -> None:
    assert json.loads((run / "manifest.json").read_text())["compiled"] == [False]
    _noted(run, compiled=[False, True])
    with pytest.raises(RunError, match="some epochs of the run were compiled and others were not"):
        _reproduced(run)


def test_a_run_that_went_on_with_more_epochs_is_reproduced_in_one_go(run: Path) -> None:
    config_file = run.parent.parent / "config.toml"
    _train(config_file, "train.epochs=3", "train.data.residence='stream'", resume=run)
    result = _reproduced(run)
    assert result["identical"] is True
    assert "metrics.csv, 4 rows but for the times" in result["compared"]


@pytest.mark.parametrize(
    ("changed", "old", "new", "message"),
    [
        (
            {"train.epochs": [3, 2]},
            "",
            "",
            None,
        ),
        (
            {"train.epochs": [3, 2]},
            'name = "reduce_on_plateau"',
            'name = "cosine"',
            "train.epochs was changed when the run went on after 1 epochs, from 3 to 2",
        ),
        (
            {"train.epochs": [3, 2]},
            "weight = 10.0",
            "weight = { start = 10.0, end = 1.0, epochs = 9 }",
            "train.epochs was changed",
        ),
        ({"train.checkpoints.minutes": [1, 2], "train.data.workers": [0, 1]}, "", "", None),
        ({"train.compile": ["auto", True]}, "", "", "train.compile was changed"),
    ],
)
def test_what_no_training_in_one_go_equals_is_refused(
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    changed: dict[str, Any],
    old: str,
    new: str,
    message: str | None,
) -> None:
    text = (run / "config.toml").read_text()
    if old:
        assert old in text
        schedule = "[train.schedule]" + text.partition("[train.schedule]")[2].partition("\n[")[0]
        text = text.replace(schedule, f"[train.schedule]\n{new}\n") if "cosine" in new else text
        text = text.replace(old, new)
    (run / "config.toml").write_text(text)
    _noted(run, resumed=[{"at": "", "epochs_done": 1, "changed": changed}])

    class Went(Exception):
        pass

    def went(*_: object) -> None:
        raise Went

    monkeypatch.setattr("runner.reproduce.source_difference", went)
    with pytest.raises(Went if message is None else RunError, match=message):
        _reproduced(run)
