"""Data files, one format a module: each reads its file into `Structures` in eV, Å and e."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runner.config import SourceConfig
from runner.errors import SourceError, did_you_mean
from runner.fields import LABELS
from runner.sources import extxyz
from runner.structures import Structures, concatenate


@dataclass(frozen=True)
class Reader:
    """One format: how its structures are read, and what labels a file of it has.

    Attributes:
        read: (path, keys and units, group key) → the structures, some thousands at a time.
        keys: (path) → the keys that its first structure has.
    """

    read: Callable[[Path, SourceConfig, str | None], Iterator[Structures]]
    keys: Callable[[Path], list[str]]


READERS: dict[str, Reader] = {"extxyz": Reader(extxyz.read, extxyz.keys)}
SUFFIXES: dict[str, str] = {".extxyz": "extxyz", ".xyz": "extxyz"}


@dataclass(frozen=True)
class SourceFile:
    """One data file, named by its content.

    Attributes:
        path: where it is now.
        section: number of the `[[prepare.source]]` that names it.
        bytes: its size.
        sha256: hash of its content, hexadecimal.
    """

    path: Path
    section: int
    bytes: int
    sha256: str

    def attributes(self) -> dict[str, Any]:
        """What a prepared dataset remembers of it."""
        return {**asdict(self), "path": str(self.path), "name": self.path.name}


def locate(sources: Sequence[SourceConfig]) -> list[SourceFile]:
    """Find and hash the files of all sources, in the order of the config.

    Raises:
        SourceError: a path that does not exist, a glob that matches nothing, an empty file,
            one that is named twice.
    """
    found: dict[Path, SourceFile] = {}
    for section, config in enumerate(sources):
        for path in _paths(config):
            if path in found:
                raise SourceError(
                    "the file is named twice, so its structures would be in several splits",
                    where=str(path),
                    remedy="name it once in prepare.source; a glob may match it too",
                )
            found[path] = _hashed(path, section)
    return list(found.values())


def read(
    files: Sequence[SourceFile], sources: Sequence[SourceConfig], group_key: str | None
) -> Structures:
    """Read all files; `source` numbers the file and `source_index` the structure in it, from 0.

    Args:
        files: as `locate` found them.
        sources: the sections that name them.
        group_key: key in the files of the group that a structure belongs to, if any.

    Raises:
        SourceError: a damaged file, a label that no structure of a source has, a value that
            cannot be.
    """
    parts = []
    for number, file in enumerate(files):
        config = sources[file.section]
        index = 0
        for part in _reader(file.path, config).read(file.path, config, group_key):
            part.structures["source"] = np.full(len(part), number, np.int16)
            part.structures["source_index"] = index + np.arange(len(part), dtype=np.int64)
            index += len(part)
            parts.append(part)
    structures = concatenate(parts)
    for section, config in enumerate(sources):
        mine = [number for number, file in enumerate(files) if file.section == section]
        first = files[mine[0]].path
        _check_labels_found(structures, mine, config, first, _reader(first, config).keys(first))
    return structures


def _paths(config: SourceConfig) -> list[Path]:
    patterns = [config.path] if isinstance(config.path, str) else config.path
    found: list[Path] = []
    for pattern in patterns:
        matches = [pattern]
        if glob.has_magic(pattern):
            matches = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 (absolute pattern)
        files = [Path(match).resolve() for match in matches if Path(match).is_file()]
        if not files:
            raise SourceError(
                f"no data file at {Path(pattern).resolve()}",
                where="prepare.source.path",
                allowed="a file, a list of files, or a glob, relative to the config",
            )
        found += files
    return found


def _hashed(path: Path, section: int) -> SourceFile:
    size = path.stat().st_size
    if size == 0:
        raise SourceError("the file is empty", where=str(path))
    with path.open("rb") as file:
        return SourceFile(path, section, size, hashlib.file_digest(file, "sha256").hexdigest())


def _reader(path: Path, config: SourceConfig) -> Reader:
    try:
        return READERS[config.format or SUFFIXES[path.suffix]]
    except KeyError:
        raise SourceError(
            f'the format of "{path.name}" is not clear from its suffix',
            where=str(path),
            allowed=f"suffixes {', '.join(SUFFIXES)}",
            remedy=f"give the source a format: {', '.join(READERS)}",
        ) from None


def _check_labels_found(
    structures: Structures,
    files: Sequence[int],
    config: SourceConfig,
    first: Path,
    keys: Sequence[str],
) -> None:
    """A label that no structure of a source has is a misspelt key."""
    mine = np.isin(structures.structures["source"], files)
    rows_of = {"structure": mine, "atom": np.repeat(mine, np.diff(structures.first_atom))}
    for name, label in config.labels.items():
        per = LABELS[name].per
        array = (structures.atoms if per == "atom" else structures.structures)[name]
        if np.isfinite(array[rows_of[per]]).any():
            continue
        if label.key in keys:
            what = f'the label {name}, key "{label.key}", is missing in every structure'
        else:
            hint = did_you_mean(str(label.key), keys)
            what = f'no structure has the label {name} under the key "{label.key}"'
            what += f"; {hint}" if hint else ""
        raise SourceError(
            what,
            where=str(first),
            allowed=f"the keys in the file: {', '.join(keys)}",
            remedy=f"correct the key of {name}, or take {name} out of the source",
        )
