"""Data files, one format a module: each reads its file into `Structures` in eV, Å and e."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from runner.config import SourceConfig, format_of
from runner.errors import SourceError, did_you_mean
from runner.fields import LABELS
from runner.sources import ase_db, ase_io, deepmd, extxyz, hdf5, npz, prepared
from runner.sources.labels import factors, to_structures
from runner.sources.raw import Raw
from runner.structures import Gathering, Structures

REMEMBERED_FROM = 1 << 26  # bytes; smaller files are hashed in no time
SETTLED = 2 * 10**9  # ns


@dataclass(frozen=True)
class Reader:
    """One format: how its structures are read, and what labels a file of it has.

    Attributes:
        read: (path, keys and units, group key) → the structures, some thousands at a time.
        keys: (path) → the keys that its first structure has.
        units: (path) → the units that the file itself states, by its keys; those of the positions
            under `positions`.
        usual: units that the format prescribes where neither file nor config says otherwise.
    """

    read: Callable[[Path, SourceConfig, str | None], Iterator[Raw]]
    keys: Callable[[Path], list[str]]
    units: Callable[[Path], dict[str, str]] = lambda _: {}
    usual: Mapping[str, str] = field(default_factory=dict)


READERS: dict[str, Reader] = {
    "extxyz": Reader(extxyz.read, extxyz.keys),
    "ase_db": Reader(ase_db.read, ase_db.keys, ase_db.units, ase_db.USUAL),
    "aselmdb": Reader(ase_db.read, ase_db.keys, ase_db.units, ase_db.USUAL),
    "ase": Reader(ase_io.read, ase_io.keys, ase_io.units, ase_io.USUAL),
    "hdf5": Reader(hdf5.read, hdf5.keys, hdf5.units),
    "npz": Reader(npz.read, npz.keys, npz.units),
    "deepmd": Reader(deepmd.read, deepmd.keys, deepmd.units, deepmd.USUAL),
    "prepared": Reader(prepared.read, prepared.keys, prepared.units, prepared.USUAL),
}


MOST_FILES = 32_767  # their number is stored as int16


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


def locate(sources: Sequence[SourceConfig], folder: Path | None = None) -> list[SourceFile]:
    """Find and hash the files of all sources, in the order of the config.

    Args:
        sources: of the config.
        folder: where the hashes of large files are remembered, if anywhere.

    Raises:
        SourceError: a path that does not exist, a glob that matches nothing, an empty file,
            one that is named twice.
    """
    found: dict[Path, SourceFile] = {}
    hashes = Hashes(folder)
    for section, config in enumerate(sources):
        for path in _paths(config):
            if path in found:
                raise SourceError(
                    "the file is named twice, so its structures would be in several splits",
                    where=str(path),
                    remedy="name it once in prepare.source; a glob may match it too",
                )
            found[path] = _hashed(path, section, hashes)
    if len(found) > MOST_FILES:
        raise SourceError(
            f"the sources have {len(found)} files",
            where="prepare.source",
            allowed=f"up to {MOST_FILES}",
            remedy="put several files into one",
        )
    hashes.save()
    return list(found.values())


def read(
    files: Sequence[SourceFile],
    sources: Sequence[SourceConfig],
    group_key: str | None,
    scratch: Path | None = None,
    count: Callable[[int], None] = lambda _: None,
) -> Structures:
    """Read all files; `source` numbers the file and `source_index` the structure in it, from 0.

    Args:
        files: as `locate` found them.
        sources: the sections that name them.
        group_key: key in the files of the group that a structure belongs to, if any.
        scratch: folder in whose files the arrays are put together; in memory if None.
        count: told how many structures more were read.

    Raises:
        SourceError: a damaged file, a label that no structure of a source has, a value that
            cannot be.
    """
    gathering = Gathering(scratch)
    found: dict[tuple[int, str], bool] = {}  # (section, label) → whether some structure has it
    for number, file in enumerate(files):
        config = sources[file.section]
        for part in _read_file(file.path, config, group_key):
            part.structures["source"] = np.full(len(part), number, np.int16)
            gathering.append(part)
            count(len(part))
            for name in config.labels:
                array = (part.atoms if LABELS[name].per == "atom" else part.structures)[name]
                here = bool(np.isfinite(array).any())
                found[file.section, name] = found.get((file.section, name), False) or here
    structures = gathering.structures()
    for (section, name), here in found.items():
        if not here:
            first = next(file.path for file in files if file.section == section)
            _refuse_label(name, sources[section], first)
    return structures


def _read_file(path: Path, config: SourceConfig, group_key: str | None) -> Iterator[Structures]:
    """The structures of one file in the program's units, some thousands at a time."""
    reader = _reader(path, config)
    units = factors(path, config, reader.units(path), reader.usual)
    index = 0
    for raw in reader.read(path, config, group_key):
        part = to_structures(raw, config, units)
        part.structures["source_index"] = index + np.arange(len(part), dtype=np.int64)
        index += len(part)
        yield part
    if index == 0:
        raise SourceError("there are no structures in the file", where=str(path))


def _paths(config: SourceConfig) -> list[Path]:
    patterns = [config.path] if isinstance(config.path, str) else config.path
    found: list[Path] = []
    for pattern in patterns:
        matches = [pattern]
        if glob.has_magic(pattern):
            matches = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 (absolute pattern)
        files = [Path(match).resolve() for match in matches if _is_source(Path(match), config)]
        if not files:
            raise SourceError(
                f"no data file at {Path(pattern).resolve()}",
                where="prepare.source.path",
                allowed="a file, a list of files, or a glob, relative to the config",
            )
        found += files
    return found


def _is_source(path: Path, config: SourceConfig) -> bool:
    """Whether there is a file, or a folder of a format that keeps its data in one."""
    in_folders = ("deepmd", "prepared")
    return path.is_file() or (path.is_dir() and format_of(str(path), config.format) in in_folders)


def _hashed(path: Path, section: int, hashes: Hashes) -> SourceFile:
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
    size = sum(file.stat().st_size for file in files)
    if size == 0:
        raise SourceError("the file is empty", where=str(path))
    if path.is_file():
        return SourceFile(path, section, size, hashes.of(path))
    names = "".join(f"{file.relative_to(path).as_posix()} {hashes.of(file)}\n" for file in files)
    return SourceFile(path, section, size, hashlib.sha256(names.encode()).hexdigest())


class Hashes:
    """SHA-256 of files; those of large ones are remembered as long as the file is not touched."""

    def __init__(self, folder: Path | None) -> None:
        """Remember in a folder, or not at all."""
        self._file = None if folder is None else folder / ".hashes.json"
        self._known: dict[str, list[int | str]] = {}
        self._new = False
        if self._file is not None:
            with contextlib.suppress(OSError, ValueError):
                known = json.loads(self._file.read_text(encoding="utf-8"))
                self._known = known if isinstance(known, dict) else {}

    def of(self, path: Path) -> str:
        """The hash of a file, hexadecimal."""
        status = path.stat()
        state: list[int | str] = [status.st_size, status.st_mtime_ns, status.st_ino]
        entry = self._known.get(str(path), [])
        if isinstance(entry, list) and entry[:-1] == state:
            return str(entry[-1])
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        settled = time.time_ns() - status.st_mtime_ns > SETTLED  # else it may change once more
        if status.st_size >= REMEMBERED_FROM and settled:
            self._known[str(path)] = [*state, digest]
            self._new = True
        return digest

    def save(self) -> None:
        """Write down what is new, if that is possible."""
        if self._file is None or not self._new:
            return
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            aside = self._file.with_name(f"{self._file.name}.{os.getpid()}")
            aside.write_text(json.dumps(self._known), encoding="utf-8")
            aside.replace(self._file)


def _reader(path: Path, config: SourceConfig) -> Reader:
    return READERS[format_of(str(path), config.format)]


def _refuse_label(name: str, config: SourceConfig, path: Path) -> NoReturn:
    """A label that no structure of a source has is a misspelt key."""
    label, keys = config.labels[name], _reader(path, config).keys(path)
    if label.key in keys:
        what = f'the label {name}, key "{label.key}", is missing in every structure'
    else:
        hint = did_you_mean(str(label.key), keys)
        what = f'no structure has the label {name} under the key "{label.key}"'
        what += f"; {hint}" if hint else ""
    raise SourceError(
        what,
        where=str(path),
        allowed=f"the keys in the file: {', '.join(keys)}",
        remedy=f"correct the key of {name}, or take {name} out of the source",
    )
