"""The run directory: everything that a training leaves behind."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from lightning.pytorch.loggers import Logger

from runner.config import Config, load_config, resolved_toml
from runner.errors import RunError
from runner.runs import LOCK, MOMENT, read_manifest, read_rows

VERSIONS = ("nnp-runner", "torch", "lightning", "torchmetrics", "numpy", "zarr", "scikit-learn")


class RunDirectory:
    """`experiments/<name>/runs/<start time>/`, with `runs/latest` pointing to the newest."""

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        """Use a directory that is there already."""
        self.path = path
        self._manifest = dict(manifest)

    @classmethod
    def create(
        cls,
        experiment: Path,
        config: Config,
        manifest: Mapping[str, Any],
        reproduces: Path | None = None,
    ) -> RunDirectory:
        """Make a new one.

        Args:
            experiment: the directory that the config is in.
            config: is written, resolved, as `config.toml`.
            manifest: of the data; versions, hardware and times are added.
            reproduces: the run that it is to equal, beside which it lies; `latest` does not move.
        """
        started = datetime.now(UTC).astimezone()
        runs = experiment / "runs" if reproduces is None else reproduces.parent
        path = _new_directory(runs, started.strftime("%Y-%m-%d_%H-%M-%S"))
        (path / "checkpoints").mkdir()
        (path / "config.toml").write_text(resolved_toml(config), encoding="utf-8")
        run = cls(path, manifest)
        run.note(
            started=started.isoformat(timespec="seconds"),
            status="running",
            **surroundings(experiment),
        )
        if reproduces is not None:
            run.note(reproduces=str(reproduces))
        return run

    def begin(self) -> None:
        """The training begins: the run is the latest one, unless it reproduces another."""
        if "reproduces" not in self._manifest:
            _point_to(self.path.parent / "latest", self.path)

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """Use one that is there.

        Raises:
            RunError: it is none, or has nothing to go on from.
        """
        path = path.resolve()
        if not (path / "manifest.json").is_file():
            raise RunError(
                f"there is no run at {path}",
                where="--resume",
                allowed="a run directory, such as experiments/quickstart/runs/latest",
            )
        if not any((path / "checkpoints" / name).is_file() for name in ("last.ckpt", "best.ckpt")):
            raise RunError(
                f"the run {path} has no checkpoint to go on from",
                where=str(path / "checkpoints" / "last.ckpt"),
                remedy="train anew, without --resume",
            )
        return cls(path, read_manifest(path))

    @property
    def manifest(self) -> dict[str, Any]:
        """What `manifest.json` says."""
        return dict(self._manifest)

    def config(self) -> Config:
        """The resolved config of the run."""
        return load_config(self.path / "config.toml")

    def resumed(self, config: Config, epochs_done: int, changed: Mapping[str, Any]) -> None:
        """Note that the run goes on, with a config that may differ."""
        before = (self.path / "config.toml").read_text(encoding="utf-8")
        self._before = before, self.manifest
        self._write("config.toml", resolved_toml(config))
        at = datetime.now(UTC).astimezone().isoformat(timespec="seconds")
        entry = {"at": at, "epochs_done": epochs_done, "changed": dict(changed)}
        self.note(status="running", resumed=[*self._manifest.get("resumed", []), entry])

    def as_before(self) -> None:
        """Take back that the run goes on, where it could not."""
        text, self._manifest = self._before
        self._write("config.toml", text)
        self.note()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing to the run.

        Raises:
            RunError: another one does.
        """
        lock = FileLock(self.path / LOCK, timeout=MOMENT)  # `runner watch` holds it to see it
        try:
            lock.acquire()
        except Timeout:
            raise RunError(
                f"another process trains the run {self.path}",
                where="--resume",
                remedy="wait for it, or stop it first",
            ) from None
        try:
            yield
        finally:
            lock.release()

    def note(self, **entries: Any) -> None:
        """Add to the manifest, and write it."""
        self._manifest |= entries
        self.write_json("manifest.json", self._manifest)

    def finish(self, status: str) -> None:
        """Say how the run ended: finished, interrupted or failed."""
        ended = datetime.now(UTC).astimezone().isoformat(timespec="seconds")
        self.note(ended=ended, status=status)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file, whole or not at all."""
        self._write(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def _write(self, name: str, text: str) -> None:
        aside = self.path / f".{name}.part"
        aside.write_text(text, encoding="utf-8")
        aside.replace(self.path / name)


class MetricsFile(Logger):
    """`metrics.csv`, a row an epoch and one for the test, written at once.

    Lightning's own logger deletes the rows of a run that goes on.
    """

    name, version = None, None

    def __init__(self, path: Path, rows: int) -> None:
        """Go on after the first `rows` rows of a file that may be there."""
        super().__init__()
        self.path = path
        kept = read_rows(path)[:rows] if rows else []
        self._columns = list(kept[0]) if kept else []
        self._write_all(kept)

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing: the config is in the run directory."""

    def log_metrics(self, metrics: Mapping[str, float | int], step: int | None = None) -> None:
        """Add a row."""
        row = {name: str(value) for name, value in (dict(metrics) | {"step": step}).items()}
        new = [name for name in row if name not in self._columns]
        if new:
            self._columns += new
            self._write_all([*read_rows(self.path), row])
            return
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def _write_all(self, rows: Sequence[Mapping[str, str]]) -> None:
        aside = self.path.with_name(f".{self.path.name}.part")
        with aside.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)
        aside.replace(self.path)


def surroundings(experiment: Path) -> dict[str, Any]:
    """What numbers may depend on besides config and data: versions, hardware, the git commit."""
    return {
        "versions": {name: version(name) for name in VERSIONS}
        | {"python": platform.python_version()},
        "hardware": _hardware(),
        "git_commit": _git_commit(experiment),
    }


def _new_directory(parent: Path, name: str) -> Path:
    """A directory of this name, or with a number behind it if another run has just taken it."""
    parent.mkdir(exist_ok=True)
    for number in range(1, 1000):
        path = parent / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise FileExistsError(parent / name)


def _point_to(link: Path, target: Path) -> None:
    aside = link.with_name(f".{link.name}.{os.getpid()}")
    aside.unlink(missing_ok=True)
    aside.symlink_to(target.name, target_is_directory=True)
    aside.replace(link)


def _git_commit(folder: Path) -> str | None:
    """Commit of the repository that the experiment is in, with `-dirty` if there are changes."""

    def git(*arguments: str) -> str:
        command: Sequence[str] = ("git", "-C", str(folder), *arguments)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _hardware() -> dict[str, Any]:
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "machine": platform.machine(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": devices,
    }
