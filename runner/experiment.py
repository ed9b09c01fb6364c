"""The run directory: everything that a training leaves behind."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from runner.config import Config, resolved_toml

VERSIONS = ("nnp-runner", "torch", "lightning", "torchmetrics", "numpy", "zarr", "scikit-learn")


class RunDirectory:
    """`experiments/<name>/runs/<start time>/`, with `runs/latest` pointing to the newest."""

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        """Use a directory that is there already."""
        self.path = path
        self._manifest = dict(manifest)

    @classmethod
    def create(cls, experiment: Path, config: Config, manifest: Mapping[str, Any]) -> RunDirectory:
        """Make a new one.

        Args:
            experiment: the directory that the config is in.
            config: is written, resolved, as `config.toml`.
            manifest: of the data; versions, hardware and times are added.
        """
        started = datetime.now(UTC).astimezone()
        path = _new_directory(experiment / "runs", started.strftime("%Y-%m-%d_%H-%M-%S"))
        (path / "checkpoints").mkdir()
        (path / "config.toml").write_text(resolved_toml(config), encoding="utf-8")
        run = cls(path, manifest)
        run.note(
            started=started.isoformat(timespec="seconds"),
            status="running",
            versions={name: version(name) for name in VERSIONS}
            | {"python": platform.python_version()},
            hardware=_hardware(),
            git_commit=_git_commit(experiment),
        )
        _point_to(path.parent / "latest", path)
        return run

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
        aside = self.path / f".{name}.part"
        aside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        aside.replace(self.path / name)


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
