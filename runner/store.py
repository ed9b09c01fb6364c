"""The prepared dataset: float64 arrays in a Zarr v3 group, named by what they were made from.

A dataset is written aside and renamed, so it is there whole or not at all. Every chunk carries a
checksum, fill values are NaN, and a chunk that is missing is an error.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr
from jaxtyping import Int32, Int64
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec

from runner.errors import DatasetError
from runner.structures import Structures, ragged_rows

SCHEMA_VERSION = 2
TRANSFORMATION_VERSION = 2  # raise when the same input would give other numbers
CHUNK_ROWS = 1 << 16
SHARD_ROWS = 1 << 20
NOT_LEARNT_FROM = ("source_index", "group", "level")


def fingerprint(prepare: Mapping[str, Any], hashes: Sequence[Sequence[str]]) -> str:
    """SHA-256 of everything that decides the numbers of a dataset.

    Args:
        prepare: the resolved `[prepare]` table. Its name does not count, nor where the files are.
        hashes: SHA-256 of the files of each source.
    """
    decisive = _decisive(prepare) | {
        "files": [list(of_source) for of_source in hashes],
        "transformation": TRANSFORMATION_VERSION,
    }
    text = json.dumps(decisive, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def dataset_path(folder: Path, name: str, digest: str) -> Path:
    """Where a dataset is, or would be."""
    return folder / f"{name}-{digest[:16]}.zarr"


def _decisive(prepare: Mapping[str, Any]) -> dict[str, Any]:
    sources = [{k: v for k, v in source.items() if k != "path"} for source in prepare["source"]]
    split = {k: v for k, v in prepare.get("split", {}).items() if k != "file"}
    other = {k: v for k, v in prepare.items() if k != "name"}
    return other | {"source": sources, "split": split}


def write_dataset(
    path: Path,
    structures: Structures,
    attributes: Mapping[str, Any],
    beside: Callable[[Path], None],
    order: Int64[np.ndarray, " n_stored"] | None = None,
    pages: Mapping[str, str] | None = None,
) -> None:
    """Write a dataset aside, then rename it to its place.

    Args:
        path: where it will be; if another process has put it there meanwhile, that one stays.
        structures: what is to be stored; the arrays of the atoms may be larger than memory.
        attributes: of the group, plain data.
        beside: called with the path of a picture to draw before the dataset appears.
        order: which structures are stored, in which order; all as they are if None.
        pages: texts to lie in its folder, by file name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path.parent)
    aside = path.with_name(
        f".{path.name}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
    )
    picture = aside.with_name(f"{aside.name}.png")
    try:
        with _codecs(rust=False):
            group = zarr.open_group(aside, mode="w-", zarr_format=3)
            group.attrs.update(dict(attributes))
            _write_arrays(group, structures, np.arange(len(structures)) if order is None else order)
            group.attrs["checksum"] = _checksum(aside)
        for name, text in (pages or {}).items():
            (aside / name).write_text(text, encoding="utf-8")
        PreparedDataset(aside)  # what cannot be opened does not get its name
        beside(picture)
        picture.replace(path.with_suffix(".png"))
        with contextlib.suppress(OSError):  # another process was faster, with the same content
            aside.rename(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        picture.unlink(missing_ok=True)


def _checksum(path: Path) -> str:
    """SHA-256 of all that describes a dataset: its attributes, and the arrays' shapes and types.

    Chunks carry checksums of their own.
    """
    digest = hashlib.sha256()
    for file in sorted(path.rglob("zarr.json")):
        description = json.loads(file.read_text(encoding="utf-8"))
        description.get("attributes", {}).pop("checksum", None)
        text = json.dumps(description, sort_keys=True)
        digest.update(f"{file.relative_to(path).as_posix()} {text}\n".encode())
    return digest.hexdigest()


def _write_arrays(group: zarr.Group, structures: Structures, order: np.ndarray) -> None:
    """The arrays of both tables, shard by shard."""
    counts = np.diff(structures.first_atom)[order]
    first_atom = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    by_structure = group.create_group("structures")
    _write(
        by_structure,
        "first_atom",
        first_atom,
        len(first_atom),
        lambda start, stop: slice(start, stop),
    )
    for name, array in structures.structures.items():
        _write(by_structure, name, array, len(order), lambda start, stop: order[start:stop])

    def rows_of(start: int, stop: int) -> np.ndarray:
        first = int(np.searchsorted(first_atom, start, side="right")) - 1
        last = int(np.searchsorted(first_atom, stop, side="left"))
        rows = ragged_rows(structures.first_atom, order[first:last])
        return rows[start - first_atom[first] : stop - first_atom[first]]

    by_atom = group.create_group("atoms")
    for name, array in structures.atoms.items():
        _write(by_atom, name, array, int(first_atom[-1]), rows_of)


def _write(
    group: zarr.Group,
    name: str,
    array: np.ndarray,
    rows: int,
    taken: Callable[[int, int], np.ndarray | slice],
) -> None:
    """One array of so many rows, which `taken` names for each range of them."""
    chunk = min(CHUNK_ROWS, max(rows, 1))
    shard = min(SHARD_ROWS, -(-max(rows, 1) // chunk) * chunk)
    stored = group.create_array(
        name,
        shape=(rows, *array.shape[1:]),
        dtype=array.dtype,
        chunks=(chunk, *array.shape[1:]),
        shards=(shard, *array.shape[1:]),
        serializer=BytesCodec(),
        compressors=(ZstdCodec(level=1), Crc32cCodec()),
        fill_value=np.nan if array.dtype.kind == "f" else 0,
        config={"write_empty_chunks": True},
    )
    for start in range(0, rows, shard):
        stop = min(start + shard, rows)
        stored[start:stop] = array[taken(start, stop)]


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A folder for what is too large for memory while a dataset is made; gone afterwards."""
    _remove_abandoned(folder)
    path = folder / f".scratch.zarr.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


_ZARR_CONFIG = threading.RLock()  # it is one for all threads


@contextlib.contextmanager
def _codecs(*, rust: bool) -> Iterator[None]:
    """zarr with its codecs in Rust, where they work, or with its own.

    An array keeps the codecs with which it was opened. Those in Rust read several times faster,
    but leave out a shard that holds only fill values when they write.
    """
    pipeline = "zarr.core.codec_pipeline.BatchedCodecPipeline"
    if rust:
        with contextlib.suppress(ImportError):
            import zarrs  # noqa: F401

            pipeline = "zarrs.ZarrsCodecPipeline"
    with _ZARR_CONFIG, zarr.config.set({"codec_pipeline.path": pipeline}):
        yield


def _remove_abandoned(folder: Path) -> None:
    """Delete what processes of this machine left behind when they were killed."""
    for entry in folder.glob(f".*.zarr.{socket.gethostname()}.*"):
        process = entry.name.removesuffix(".png").split(".")[-2]
        if process.isdigit() and not _is_running(int(process)):
            shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _open(path: Path, *, rust: bool) -> tuple[dict[str, Any], dict[str, zarr.Array[Any]]]:
    """Attributes and arrays of a dataset."""
    with _codecs(rust=rust):
        group = zarr.open_group(path, mode="r", zarr_format=3)
        return dict(group.attrs), {
            f"{table}/{name}": array
            for table in ("structures", "atoms")
            for name, array in group.require_group(table).arrays()
        }


def _identity(path: Path) -> tuple[int, int, int]:
    """What tells a dataset from another one that is put in its place."""
    status = (path / "zarr.json").stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


class PreparedDataset:
    """A prepared dataset on disk.

    Attributes:
        path: its folder.
        attributes: what it says of itself: `fingerprint`, `splits`, `self_energies`, `fit`, …
    """

    def __init__(self, path: Path) -> None:
        """Open a dataset and see that it is whole.

        Raises:
            DatasetError: it is not there, is of another version, or lacks a part.
        """
        self.path = path
        if not path.is_dir():
            raise DatasetError(f"there is no prepared dataset at {path}")
        try:
            self._identity = _identity(path)
            self.attributes, self._arrays = _open(path, rust=True)
            _, self._checked = _open(path, rust=False)
        except Exception as error:  # zarr raises many kinds for a damaged hierarchy
            raise self._damaged(str(error)) from error
        if self.attributes.get("schema_version") != SCHEMA_VERSION:
            raise self._damaged(f"its schema version is {self.attributes.get('schema_version')}")
        if self.attributes.get("checksum") != _checksum(path):
            raise self._damaged("its description was changed since it was written")
        self._check_lengths()
        self._check_chunks()

    def read(self, split: str) -> Structures:
        """The structures of one split, in their stored order, float64.

        Raises:
            DatasetError: a chunk is missing, or its checksum is wrong.
        """
        return self.read_rows(*self.attributes["splits"][split])

    def read_rows(self, start: int, stop: int, *, origins: bool = True) -> Structures:
        """The structures from `start` up to `stop`, in their stored order, float64.

        Args:
            start: the first.
            stop: the one after the last.
            origins: whether to read where they came from, beside the number of the source.

        Raises:
            DatasetError: a chunk is missing, or its checksum is wrong.
        """
        first_atom = self._read("structures/first_atom", start, stop + 1)
        rows = (int(first_atom[0]), int(first_atom[-1]))
        left_out = {"first_atom"} if origins else {"first_atom", *NOT_LEARNT_FROM}
        structures, atoms = {}, {}
        for key in self._arrays:
            table, name = key.split("/")
            if table == "atoms":
                atoms[name] = self._read(key, *rows)
            elif name not in left_out:
                structures[name] = self._read(key, start, stop)
        return Structures(first_atom - first_atom[0], atoms, structures)

    def sizes(self, split: str) -> Int32[np.ndarray, " n_split"]:
        """How many atoms each structure of a split has."""
        start, stop = self.attributes["splits"][split]
        parts = [
            np.diff(self._read("structures/first_atom", first, min(first + SHARD_ROWS, stop) + 1))
            for first in range(start, stop, SHARD_ROWS)
        ]
        return np.concatenate([np.empty(0, np.int64), *parts]).astype(np.int32)

    def origins(self, split: str) -> Int64[np.ndarray, "n_split 2"]:
        """Number of the source file, and of the structure in it, for each structure of a split."""
        start, stop = self.attributes["splits"][split]
        source = self._read("structures/source", start, stop).astype(np.int64)
        return np.stack([source, self._read("structures/source_index", start, stop)], axis=1)

    def groups(self, split: str) -> Int64[np.ndarray, " n_split"]:
        """Number of the group of each structure of a split, among `attributes["groups"]`.

        Raises:
            DatasetError: it was prepared without groups.
        """
        if "structures/group" not in self._arrays:
            raise DatasetError(
                "the prepared dataset has no groups",
                where=str(self.path),
                remedy="name them with prepare.split.group_by; for a dataset of an earlier version "
                "that has it, delete this folder and run `runner prepare` again",
            )
        start, stop = self.attributes["splits"][split]
        return self._read("structures/group", start, stop).astype(np.int64)

    def name_of(self, split: str, number: int) -> str:
        """Where a structure of a split came from, for a message."""
        start, _ = self.attributes["splits"][split]
        row = start + number
        source = int(self._read("structures/source", row, row + 1)[0])
        index = int(self._read("structures/source_index", row, row + 1)[0])
        return f"{self.attributes['sources'][source]['name']}, structure {index} (counted from 0)"

    def __len__(self) -> int:
        return max(int(stop) for _, stop in self.attributes["splits"].values())

    @property
    def n_atoms(self) -> int:
        """Atoms of all structures."""
        return int(self._arrays["atoms/atomic_numbers"].shape[0])

    @property
    def labels(self) -> dict[str, int]:
        """How many structures have each label that the dataset holds."""
        return dict(self.attributes["statistics"]["coverage"])

    @property
    def source_names(self) -> list[str]:
        """Names of the files that it was made of, by their numbers."""
        return [source["name"] for source in self.attributes["sources"]]

    @property
    def quadrupole(self) -> Literal["traced", "traceless"]:
        """The convention of its quadrupoles; traced where there are none."""
        sources = self.attributes["prepare"]["source"]
        found = {s["quadrupole"]["convention"] for s in sources if s.get("quadrupole")}
        return "traceless" if "traceless" in found else "traced"

    def _read(self, key: str, start: int, stop: int) -> np.ndarray:
        """Some rows of an array, every chunk of them checked.

        The codecs in Rust check a shard only if all of it is asked for, and lies within the array:
        so they read the whole shards, and zarr's own codecs what is before and after.
        """
        if key not in self._arrays:
            raise self._damaged(f"the array {key} is missing")
        array, checked = self._arrays[key], self._checked[key]
        shard = (array.shards or array.chunks)[0]
        first = min(-(-start // shard) * shard, stop)
        last = max(stop // shard * shard, first)
        self._refuse_changed()
        try:
            parts = ((checked, start, first), (array, first, last), (checked, last, stop))
            rows = [np.asarray(reader[low:high]) for reader, low, high in parts if low < high]
        except Exception as error:  # both codec pipelines raise kinds of their own
            where = self._first_bad_chunk(key, start, stop)
            raise self._damaged(f"{where} of the array {key} cannot be read: {error}") from error
        self._check_shards(key, range(start // shard, -(-stop // shard)))
        if len(rows) == 1:
            return rows[0]
        return np.concatenate([np.empty((0, *array.shape[1:]), array.dtype), *rows])

    def _first_bad_chunk(self, key: str, start: int, stop: int) -> str:
        checked = self._checked[key]
        rows = checked.chunks[0]
        for first in range(start // rows * rows, stop, rows):
            try:
                checked[first : min(first + rows, checked.shape[0])]
            except Exception:
                return f"chunk {first // rows} (rows from {first})"
        return "a chunk"

    def _refuse_changed(self) -> None:
        """A dataset is written once: whoever finds another one in its place must not go on."""
        try:
            now = _identity(self.path)
        except OSError:
            now = None
        if now != self._identity:
            raise DatasetError(
                "the prepared dataset was changed or removed while it was in use",
                where=str(self.path),
                remedy="run `runner prepare` again, and leave its folder alone during a training",
            )

    def _shard_file(self, key: str, number: int) -> Path:
        further = ["0"] * (self._arrays[key].ndim - 1)
        return self.path.joinpath(key, "c", str(number), *further)

    def _check_lengths(self) -> None:
        """Arrays of one table are as long as each other, and the splits lie within them."""
        lengths = {key: array.shape[0] for key, array in self._arrays.items()}
        n_structures = lengths.get("structures/first_atom", 0) - 1
        n_atoms = lengths.get("atoms/atomic_numbers")
        for key, length in lengths.items():
            expected = n_structures if key.startswith("structures/") else n_atoms
            if key != "structures/first_atom" and length != expected:
                raise self._damaged(f"the array {key} has {length} rows instead of {expected}")
        splits = self.attributes.get("splits", {}).values()
        if max((stop for _, stop in splits), default=0) != n_structures:
            raise self._damaged(f"its splits do not cover its {n_structures} structures")

    def _check_chunks(self) -> None:
        for key, array in self._arrays.items():
            shards = -(-array.shape[0] // (array.shards or array.chunks)[0])
            self._check_shards(key, range(shards))

    def _check_shards(self, key: str, numbers: range) -> None:
        """See that files are there and not empty, where zarr would put in fill values."""
        for number in numbers:
            file = self._shard_file(key, number)
            if not file.is_file():
                raise self._damaged(f"chunk {number} of the array {key} is missing")
            if file.stat().st_size == 0:
                raise self._damaged(
                    f"chunk {number} of the array {key} cannot be read: it is empty"
                )

    def _damaged(self, what: str) -> DatasetError:
        return DatasetError(
            f"the prepared dataset is damaged: {what}",
            where=str(self.path),
            remedy="delete this folder and run `runner prepare` again",
        )


def why_not_reused(
    folder: Path, name: str, prepare: Mapping[str, Any], hashes: Sequence[Sequence[str]]
) -> list[str]:
    """How what is asked for differs from the latest dataset of the same name.

    Returns:
        Lines such as `split.seed: 0 → 1`; empty if there is no dataset of that name.
    """
    candidates = sorted(folder.glob(f"{name}-*.zarr"), key=lambda path: path.stat().st_mtime)
    for path in reversed(candidates):
        try:
            old = json.loads((path / "zarr.json").read_text())["attributes"]
        except (OSError, ValueError, KeyError):
            continue
        before = _flat(_decisive(old["prepare"])) | {"files": old["files"]}
        after = _flat(_decisive(prepare)) | {"files": [list(of_source) for of_source in hashes]}
        return _differences(before, after)
    return []


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    lines = []
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) == after.get(key):
            continue
        if key == "files":
            lines.append("the content of the source files")
        else:
            lines.append(f"{key}: {before.get(key, '(absent)')} → {after.get(key, '(absent)')}")
    return lines or ["the version of the program's transformation"]


def _flat(table: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys of nested tables and lists."""
    items = enumerate(table) if isinstance(table, list) else table.items()
    flat: dict[str, Any] = {}
    for key, value in items:
        dotted = f"{prefix}{key}"
        flat |= _flat(value, f"{dotted}.") if isinstance(value, dict | list) else {dotted: value}
    return flat
