"""Run directories as others see them: read without torch, also while they are written."""

from __future__ import annotations

import csv
import io
import json
import os
import shlex
import time
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from runner.errors import RunError

LOCK = ".lock"
MOMENT = 0.5  # s, in which a run that begins takes its lock


def find_run(path: Path) -> Path:
    """The run that is meant: a run directory, or the latest of an experiment.

    Raises:
        RunError: there is none.
    """
    folder = path if path.is_dir() else path.parent
    for run in (folder, folder / "runs" / "latest"):
        if (run / "manifest.json").is_file():
            return run.resolve()
    raise RunError(
        f"there is no run at {path}",
        where=str(path if not path.exists() else folder / "manifest.json"),
        allowed="a run directory, such as experiments/quickstart/runs/latest, or an experiment "
        "that has been trained",
    )


def read_manifest(run: Path) -> dict[str, Any]:
    """What `manifest.json` says."""
    manifest: dict[str, Any] = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    return manifest


def read_rows(metrics: Path) -> list[dict[str, str]]:
    """The rows of `metrics.csv`, without one that is half written."""
    if not metrics.is_file():
        return []
    text = metrics.read_bytes().decode("utf-8", errors="replace")
    return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))


def is_trained(run: Path) -> bool:
    """Whether a process trains a run now, as its lock tells.

    Where that cannot be seen, in a run of somebody else's, it may be.
    """
    if not (run / LOCK).exists():
        return False
    try:
        with FileLock(run / LOCK, blocking=False):
            return False
    except (Timeout, OSError, NotImplementedError):
        return True


def status(run: Path) -> str:
    """Running, finished, interrupted, failed, or killed, which no manifest can say of itself."""
    for attempt in range(2):
        trained = is_trained(run)  # first, for a run that ends says so before it lets the lock go
        said = str(read_manifest(run)["status"])
        if trained or said != "running":
            return said
        if not attempt:
            time.sleep(MOMENT)
    return "killed"


def resume_command(run: Path) -> str:
    """The command by which a run goes on, with the config that it has."""
    folder = Path(read_manifest(run)["dataset"]).parent
    usual = [parent / "data" / "prepared" for parent in run.parents]
    named = os.environ.get("RUNNER_DATA_DIR")
    known = folder == Path(named).resolve() if named else folder in usual
    words = ["runner", "train", str(run), "--resume", str(run)]
    return shlex.join(words if known else [*words, "--data-dir", str(folder)])


def read_numbers(metrics: Path, n: int) -> list[dict[str, float | int]]:
    """The first `n` rows of `metrics.csv`."""
    return [
        {name: int(v) if name in ("epoch", "step") else float(v) for name, v in row.items() if v}
        for row in read_rows(metrics)[:n]
    ]
