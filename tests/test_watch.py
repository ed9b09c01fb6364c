"""Watching a run: curves on a terminal, lines elsewhere, and how it ended."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from runner import runs, watch
from runner.errors import RunError
from runner.experiment import MetricsFile, RunDirectory
from runner.runs import find_run, read_rows, resume_command, status
from runner.terminal import Terminal

COLUMNS = (
    "epoch", "lr", "time/data", "time/compute", "train/loss/total_loss", "train/forces_mae",
    "train/energy_per_atom_mae", "val/loss/total_loss", "val/energy_mae",
    "val/energy_per_atom_mae", "val/forces_mae", "val/dipole_rmse", "step",
)  # fmt: skip


def _row(epoch: int) -> dict[str, float]:
    error = math.exp(-epoch / 4)
    values = [epoch, 1e-3, 0.5, 1.5, error, error, error, 2 * error, 3 * error]
    return dict(zip(COLUMNS, [*values, 0.05 * error, 0.2 * error, 0.3, 6 * epoch], strict=True))


def _write_rows(run: Path, rows: Sequence[dict[str, Any]]) -> None:
    with (run / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, "test/forces_mae"])
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that says that it has done 8 of 20 epochs."""
    path = tmp_path / "runs" / "first"
    (path / "checkpoints").mkdir(parents=True)
    (path.parent / "latest").symlink_to("first")
    (path / "config.toml").write_text("[train]\nepochs = 20\n")
    (path / "checkpoints" / "last.ckpt").touch()
    _note(path, "running")
    _write_rows(path, [_row(epoch) for epoch in range(8)])
    return path


def _note(run: Path, state: str) -> None:
    dataset = str(run.parent / "data" / "prepared" / "x.zarr")
    manifest = {"status": state, "dataset": dataset, "started": "then", "ended": "later"}
    (run / "manifest.json").write_text(json.dumps(manifest))


def _directory(run: Path) -> RunDirectory:
    return RunDirectory(run, json.loads((run / "manifest.json").read_text()))


def _said(run: Path, *, once: bool = False) -> list[str]:
    terminal = Terminal()
    with terminal.console.capture() as capture:
        watch.watch(run, terminal, once=once)
    return capture.get().splitlines()


def test_a_run_is_named_by_itself_its_experiment_or_its_config(run: Path, tmp_path: Path) -> None:
    for named in (run, tmp_path, tmp_path / "config.toml", tmp_path / "runs" / "latest"):
        assert find_run(named) == run
    (tmp_path / "runs" / "latest").unlink()
    with pytest.raises(RunError) as caught:
        find_run(tmp_path / "gone")
    assert f"there is no run at {tmp_path / 'gone'}\n" in str(caught.value)
    assert "or an experiment that has been trained" in str(caught.value)


def test_without_a_terminal_an_epoch_is_a_line(run: Path) -> None:
    _note(run, "finished")
    said = _said(run)
    assert len(said) == 9
    assert said[0] == (
        "epoch 1/20  loss 1 / 2  energy MAE 1000 / 50 meV an atom  forces MAE 1000 / 200 meV/Å  "
        "dipole RMSE – / 0.3 e·Å"
    )
    assert said[-1] == "finished after 8 of 20 epochs"
    assert not any("\x1b" in line for line in said)


def test_lines_come_as_epochs_do_until_the_run_ends(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[Callable[[], Any]] = [
        lambda: _write_rows(run, [_row(epoch) for epoch in range(9)]),
        lambda: None,
        lambda: _write_rows(run, [_row(epoch) for epoch in range(11)]),
        lambda: _note(run, "finished"),
    ]
    monkeypatch.setattr(watch.time, "sleep", lambda _: steps.pop(0)())
    with _directory(run).locked():
        said = _said(run)
    assert [line.split()[1] for line in said[:-1]] == [f"{n}/20" for n in range(1, 12)]
    assert said[-1] == "finished after 11 of 20 epochs"
    assert not steps


def test_once_does_not_wait(run: Path) -> None:
    with _directory(run).locked():
        said = _said(run, once=True)
    assert said[-1] == "running, after 8 of 20 epochs, about 24 s of training left"


def test_ctrl_c_ends_the_watching_not_the_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", interrupted)
    with _directory(run).locked():
        said = _said(run)
    assert said[-1] == "no longer watched; the run goes on"


@pytest.mark.parametrize(
    ("state", "words"),
    [("running", "was killed"), ("interrupted", "was interrupted"), ("failed", "failed")],
)
def test_how_a_run_goes_on_that_has_stopped(
    run: Path, monkeypatch: pytest.MonkeyPatch, state: str, words: str
) -> None:
    monkeypatch.setattr(runs, "MOMENT", 0.0)
    monkeypatch.setenv("RUNNER_DATA_DIR", str(run.parent / "data" / "prepared"))
    _note(run, state)
    again = f"runner train {run} --resume {run}"
    assert _said(run)[-1] == f"{words} after 8 of 20 epochs; to go on: {again}"
    monkeypatch.delenv("RUNNER_DATA_DIR")
    folder = run.parent / "data" / "prepared"
    assert resume_command(run) == f"{again}"
    monkeypatch.setenv("RUNNER_DATA_DIR", "/elsewhere")
    assert resume_command(run) == f"{again} --data-dir {folder}"
    (run / "checkpoints" / "last.ckpt").unlink()
    assert _said(run)[-1] == f"{words} after 8 of 20 epochs; it has no checkpoint"


def test_the_lock_tells_a_run_from_one_that_was_killed(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "MOMENT", 0.0)
    assert status(run) == "killed"
    with _directory(run).locked():
        assert status(run) == "running"
    assert status(run) == "killed"


def test_a_run_that_has_just_begun_is_not_taken_for_killed(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = _directory(run).locked()
    monkeypatch.setattr(runs.time, "sleep", lambda _: lock.__enter__())
    assert status(run) == "running"
    lock.__exit__(None, None, None)


def test_who_looks_does_not_keep_a_run_from_going_on(run: Path) -> None:
    (run / runs.LOCK).touch()
    with runs.FileLock(run / runs.LOCK, thread_local=False) as looking:
        threading.Timer(0.05, looking.release).start()
        with _directory(run).locked():
            assert runs.is_trained(run)


def test_a_row_that_is_half_written_is_none(run: Path) -> None:
    with (run / "metrics.csv").open("a") as file:
        file.write("8,0.001,0.")
    assert len(read_rows(run / "metrics.csv")) == 8
    MetricsFile(run / "metrics.csv", 8).log_metrics({"epoch": 8}, 54)
    assert [row["epoch"] for row in read_rows(run / "metrics.csv")] == list("012345678")


def test_the_latest_values_as_json(run: Path) -> None:
    _write_rows(run, [*(_row(epoch) for epoch in range(8)), {"test/forces_mae": 0.5, "step": 48}])
    _note(run, "finished")
    found = json.loads(json.dumps(watch.latest(run)))
    assert {name: found[name] for name in ("status", "epoch", "epochs", "seconds_an_epoch")} == {
        "status": "finished",
        "epoch": 8,
        "epochs": 20,
        "seconds_an_epoch": 2.0,
    }
    assert found["best"] == {"epoch": 7, "total_loss": 2 * math.exp(-7 / 4)}
    assert found["latest"]["val/forces_mae"] == 0.2 * math.exp(-7 / 4)
    assert found["test"] == {"forces_mae": 0.5}
    assert found["run"] == str(run)


def _drawn(run: Path, width: int, height: int) -> list[str]:
    console = Console(width=width, height=height, force_terminal=True, color_system="standard")
    with console.capture() as capture:
        console.print(watch.Curves(watch.Progress.of(run)))
    return capture.get().splitlines()


@pytest.mark.parametrize(("width", "height"), [(80, 24), (40, 15), (200, 60), (120, 30)])
def test_curves_fit_the_terminal(run: Path, width: int, height: int) -> None:
    _note(run, "finished")
    lines = _drawn(run, width, height)
    plain = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines]
    assert len(plain) <= height
    assert max(map(len, plain)) <= width
    text = "\n".join(plain)
    assert "finished after 8 of 20 epochs" in text
    shown = ("loss", "energy MAE, meV an atom", "forces MAE, meV/Å", "dipole RMSE, e·Å")
    room = {40: 1}.get(width, 4)
    assert [title in text for title in shown] == [number < room for number in range(4)]
    assert "0.1738  0.3475  best 0.3475 in epoch 8" in text


def test_a_falling_error_falls_and_is_logarithmic(run: Path) -> None:
    _note(run, "finished")
    (top, *_, bottom) = [
        re.sub(r"\x1b\[[0-9;]*m", "", line)[:45]
        for line in _drawn(run, 40, 15)
        if "|" in line and "⠀" in line
    ]
    left, right = top.split("|")[1], bottom.split("|")[1]
    assert left.strip(" ⠀")
    assert right.strip(" ⠀")
    assert left.index(left.strip(" ⠀")[0]) < right.index(right.strip(" ⠀")[0])
    ticks = [
        float(re.sub(r"\x1b\[[0-9;]*m", "", line).split("|")[0])
        for line in _drawn(run, 40, 15)
        if re.match(r"(\x1b\[[0-9;]*m)* *[\d.]+ \|", line)
    ]
    ratios = [high / low for high, low in itertools.pairwise(ticks)]
    assert len(ratios) >= 3
    assert ratios == pytest.approx([ratios[0]] * len(ratios), rel=0.02)


def test_before_the_first_epoch_there_is_nothing_to_draw(run: Path) -> None:
    (run / "metrics.csv").unlink()
    _note(run, "finished")
    assert "no epoch is done yet" in "\n".join(_drawn(run, 80, 24))
    assert _said(run) == ["finished after 0 of 20 epochs"]


def test_a_value_that_is_zero_is_drawn(run: Path) -> None:
    _write_rows(run, [_row(0) | {"val/forces_mae": 0.0}, _row(1)])
    _note(run, "finished")
    assert "forces MAE, meV/Å" in "\n".join(_drawn(run, 80, 24))


def _read_until(terminal: int, text: bytes) -> bytes:
    found = b""
    while not re.search(text, found):
        ready, _, _ = select.select([terminal], [], [], 60)
        assert ready, f"nothing more after {found[-200:]!r}"
        found += os.read(terminal, 65536)
    return found


def test_on_a_terminal_it_draws_until_the_run_ends_and_torch_is_not_imported(run: Path) -> None:
    _note(run, "running")
    script = (
        "import signal, sys\nfrom runner import cli, watch\nwatch.PERIOD = 0.05\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # may be ignored: a job
        f"sys.argv = ['runner', 'watch', {str(run)!r}]\n"
        "try:\n    cli.main()\nfinally:\n"
        "    slow = {'torch', 'lightning', 'zarr', 'sklearn', 'matplotlib', 'pint'}\n"
        "    print('imported:', sorted(slow & set(sys.modules)))\n"
    )
    main, second = pty.openpty()
    environment = os.environ | {"COLUMNS": "80", "LINES": "24", "TERM": "xterm"}
    with _directory(run).locked():
        process = subprocess.Popen(
            [sys.executable, "-c", script], stdout=second, stderr=second, env=environment
        )
        os.close(second)
        drawn = _read_until(main, b"after 8 of 20")
        _write_rows(run, [_row(epoch) for epoch in range(9)])
        drawn += _read_until(main, b"after 9 of 20")
        process.send_signal(signal.SIGINT)
        drawn += _read_until(main, rb"imported: .*\]")
        code = process.wait(60)
    os.close(main)
    text = drawn.decode()
    assert code == 0, text
    assert "\x1b[" in text
    assert "no longer watched; the run goes on" in text
    assert "imported: []" in text
