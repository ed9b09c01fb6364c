"""NumPy archives with an array a quantity: PhysNet's (padded), sGDML's and rMD17's layouts.

The arrays of an archive are read side by side, some thousands of structures at a time; what the
config does not name is not read at all.
"""

from __future__ import annotations

import contextlib
import math
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from runner.config import SourceConfig
from runner.errors import SourceError, did_you_mean
from runner.fields import LABELS
from runner.sources import raw
from runner.sources.raw import Conformers, Raw, from_conformers, refusing_damage


@dataclass(frozen=True)
class Layout:
    """How a family of files calls its arrays.

    Attributes:
        name: of the family.
        positions: key of the positions, (structures, places, 3).
        species: key of the atomic numbers: (places,), or a row a structure where there are counts.
        counts: key of the atoms of each structure, where structures are padded to one length.
    """

    name: str
    positions: str
    species: str
    counts: str | None = None

    @property
    def needed(self) -> tuple[str, ...]:
        """The arrays by which it is known."""
        return (self.positions, self.species, *((self.counts,) if self.counts else ()))


LAYOUTS = (
    Layout("PhysNet", "R", "Z", "N"),
    Layout("sGDML", "R", "z"),
    Layout("rMD17", "coords", "nuclear_charges"),
)
SIGNATURES = (b"PK\x03\x04", b"PK\x05\x06")  # zipfile would also search behind other bytes
SGDML_KINDS = {"m": "a model", "t": "a training task"}  # what `type` says in its other files


def read(path: Path, config: SourceConfig, group_key: str | None) -> Iterator[Raw]:
    """The structures of a file, in its order, some thousands at a time.

    Args:
        path: the file.
        config: keys of the labels.
        group_key: key of an array with the name of each structure's group, if any.

    Raises:
        SourceError: a file that is damaged, cut off or of no known layout.
    """
    yield from from_conformers(_blocks(path, config, group_key), config)


def keys(path: Path) -> list[str]:
    """The keys of the numeric arrays that could be labels."""
    with _opened(path) as archive:
        needed = _layout(archive).needed
        others = [key for key in archive.members if key not in needed]
        return [key for key in others if archive.header(key).dtype.kind in "iuf"]


def units(path: Path) -> dict[str, str]:
    """The units that a file of sGDML states."""
    with _opened(path) as archive:
        length, energy = (_unit(archive, key) for key in ("r_unit", "e_unit"))
    found = {"positions": length, "E": energy}
    if length and energy:
        found["F"] = f"{energy}/{length}"
    return {key: unit for key, unit in found.items() if unit}


def _unit(archive: _Archive, key: str) -> str | None:
    """A text that stands in an array of its own."""
    if key not in archive.members:
        return None
    values = archive.whole(key).ravel()
    return _text(values[0]) or None if values.size else None


# --------------------------------------------------------------------------------------------------
# Structures
# --------------------------------------------------------------------------------------------------


def _blocks(path: Path, config: SourceConfig, group_key: str | None) -> Iterator[Conformers]:
    """The structures in slices."""
    with _opened(path) as archive:
        layout = _layout(archive)
        _refuse_other_kinds(archive)
        n, places = _size(archive, layout)
        labels, shared = _labels(archive, config, n, places)
        species = _shared_species(archive, layout, places)
        groups = None if group_key is None else _groups(archive, group_key, n)
        cell = _cell(archive, layout)
        keys_in_rows = {layout.positions, *labels}
        if layout.counts is not None:
            keys_in_rows |= {layout.species, layout.counts}
        start = 0
        for part in archive.in_step(sorted(keys_in_rows), n):
            m = len(part[layout.positions])
            if species is None:
                numbers = _padded_species(archive, layout, part, start)
            else:
                numbers = np.broadcast_to(species, (m, places))
            yield Conformers(
                where=partial(archive.where, start),
                species=numbers,
                positions=part[layout.positions].astype(np.float64),
                values=shared | {key: part[key] for key in labels},
                group=None if groups is None else groups[start : start + m],
                cell=None if cell is None else np.broadcast_to(cell, (m, 3, 3)),
                pbc=None if cell is None else np.ones((m, 3), bool),
            )
            start += m


def _layout(archive: _Archive) -> Layout:
    """The layout of a file, by the arrays that it has."""
    for layout in LAYOUTS:
        if set(layout.needed) <= set(archive.members):
            return layout
    raise SourceError(
        f"the arrays of the file are of no known layout: {', '.join(archive.members) or 'none'}",
        where=archive.name,
        allowed="; ".join(f"{', '.join(known.needed)} ({known.name})" for known in LAYOUTS),
    )


def _refuse_other_kinds(archive: _Archive) -> None:
    """Refuse what sGDML writes beside datasets."""
    kind = _unit(archive, "type")
    if kind in SGDML_KINDS:
        raise SourceError(
            f"the file is {SGDML_KINDS[kind]} of sGDML",
            where=archive.name,
            allowed='a dataset, whose type is "d"',
        )


def _size(archive: _Archive, layout: Layout) -> tuple[int, int]:
    """Structures, and places for atoms in each."""
    header = archive.numbers(layout.positions)
    if len(header.shape) != 3 or header.shape[2] != 3:
        raise SourceError(
            f'"{layout.positions}" is an array of shape {header.shape}',
            where=archive.name,
            allowed="shape (structures, atoms, 3)",
        )
    n, places = header.shape[:2]
    if layout.counts is not None:
        _check_whole_numbers(archive, layout.counts, (n,))
        _check_whole_numbers(archive, layout.species, (n, places))
    else:
        _check_whole_numbers(archive, layout.species, (places,))
    return n, places


def _check_whole_numbers(archive: _Archive, key: str, shape: tuple[int, ...]) -> None:
    header = archive.header(key)
    if header.dtype.kind not in "iu":
        _refuse_type(archive, key, "whole numbers")
    if header.shape != shape:
        raise SourceError(
            f'"{key}" is an array of shape {header.shape}, which does not go with the positions',
            where=archive.name,
            allowed=f"shape {shape}",
        )


def _labels(
    archive: _Archive, config: SourceConfig, n: int, places: int
) -> tuple[list[str], dict[str, np.ndarray]]:
    """Keys of the arrays with a row a structure, and the arrays that hold for all structures."""
    rows, shared = [], {}
    for name, label in config.labels.items():
        key = label.key
        if key is None or key not in archive.members:
            continue
        shape = archive.numbers(key).shape
        one = math.prod(label.stored_shape(LABELS[name]))
        one *= places if LABELS[name].per == "atom" else 1
        if shape[:1] == (n,) and (n == 1 or math.prod(shape) != one):
            rows.append(key)
        elif math.prod(shape) == one:
            shared[key] = archive.whole(key)[None]
        else:
            raise SourceError(
                f'"{key}" is an array of shape {shape}, but there are {n} structures',
                where=archive.name,
                allowed="a row a structure, or one value for all of them",
            )
    return rows, shared


def _shared_species(archive: _Archive, layout: Layout, places: int) -> np.ndarray | None:
    """Atomic numbers (places,) of all structures; None where each has its own."""
    if layout.counts is not None:
        return None
    species = archive.whole(layout.species).astype(np.int64)
    if not species.all():
        raise SourceError(
            f'"{layout.species}" has a place without an element', where=archive.where(0, 0)
        )
    return species.reshape(places)


def _padded_species(
    archive: _Archive, layout: Layout, part: Mapping[str, np.ndarray], start: int
) -> np.ndarray:
    """Atomic numbers, (m, places), with zeros behind the atoms of each structure."""
    assert layout.counts is not None
    species, counts = part[layout.species].astype(np.int64), part[layout.counts]
    expected = np.arange(species.shape[1]) < counts[:, None]
    wrong = ((species != 0) != expected).any(axis=1) | (counts != expected.sum(axis=1))
    if wrong.any():
        row = int(wrong.argmax())
        raise SourceError(
            f'"{layout.counts}" says {counts[row]} atoms, but "{layout.species}" is '
            f"{' '.join(map(str, species[row]))}",
            where=archive.where(start, row),
            allowed="the atomic numbers first, then zeros",
        )
    return species


def _cell(archive: _Archive, layout: Layout) -> np.ndarray | None:
    """Lattice vectors as rows; sGDML keeps them as columns."""
    if layout.name != "sGDML" or "lattice" not in archive.members:
        return None
    if archive.numbers("lattice").shape != (3, 3):
        raise SourceError('"lattice" is not nine numbers', where=archive.name)
    return archive.whole("lattice").astype(np.float64).T


def _groups(archive: _Archive, key: str, n: int) -> list[str]:
    """The name of each structure's group."""
    if key not in archive.members:
        hint = did_you_mean(key, archive.members)
        raise SourceError(
            f'the file has no array "{key}" to group by' + (f"; {hint}" if hint else ""),
            where=archive.name,
            remedy="correct prepare.split.group_by",
        )
    values = archive.whole(key)
    if values.shape[:1] != (n,) or values.size != n:
        raise SourceError(
            f'"{key}" is an array of shape {values.shape}, which cannot group {n} structures',
            where=archive.name,
            allowed="a value a structure",
        )
    return [_text(value) for value in values.ravel()]


def _text(value: Any) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


def _refuse_type(archive: _Archive, key: str, allowed: str) -> NoReturn:
    dtype = archive.header(key).dtype
    raise SourceError(f'"{key}" is of the type {dtype}', where=archive.name, allowed=allowed)


# --------------------------------------------------------------------------------------------------
# Archives
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Header:
    """What an array says of itself before its values; `start` is where these begin."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    by_columns: bool
    start: int


@dataclass(frozen=True)
class _Archive:
    """An open file.

    Attributes:
        name: the file.
        file: as `zipfile` has it.
        members: name in the archive of each array.
    """

    name: str
    file: zipfile.ZipFile
    members: dict[str, str]

    def where(self, start: int, index: int) -> str:
        """Names a structure."""
        return f"{self.name}, structure {start + index} (counted from 0)"

    def header(self, key: str) -> _Header:
        """Shape and type of an array, without its values."""
        with (
            refusing_damage(f"{self.name}, array {key}"),
            self.file.open(self.members[key]) as member,
        ):
            header = _read_header(member)
            size = self.file.getinfo(self.members[key]).file_size
        if header.dtype.hasobject:
            raise SourceError(
                f'"{key}" holds Python objects, which are not read: they could run any program',
                where=self.name,
                remedy="save it as an array of numbers or of strings",
            )
        if min(header.shape, default=0) < 0 or size != header.start + _bytes(header):
            raise SourceError(
                f'"{key}" is damaged: it has not as many values as it says', where=self.name
            )
        return header

    def numbers(self, key: str) -> _Header:
        """The header of an array that must hold real numbers."""
        header = self.header(key)
        if header.dtype.kind not in "iuf":
            _refuse_type(self, key, "numbers")
        return header

    def whole(self, key: str) -> np.ndarray:
        """An array."""
        self.header(key)
        with (
            refusing_damage(f"{self.name}, array {key}"),
            self.file.open(self.members[key]) as member,
        ):
            values: np.ndarray = np.lib.format.read_array(member, allow_pickle=False)
            member.read()  # at its end the checksum is compared
        return values

    def in_step(self, names: list[str], n: int) -> Iterator[dict[str, np.ndarray]]:
        """Rows of several arrays of n rows, some thousands at a time."""
        readers = {key: self._rows(key) for key in names}
        for _ in range(0, n, raw.CHUNK):
            yield {key: next(rows) for key, rows in readers.items()}
        for rows in readers.values():
            next(rows, None)  # to the end, where the checksum is compared

    def _rows(self, key: str) -> Iterator[np.ndarray]:
        """The rows of an array, some thousands at a time."""
        header = self.header(key)
        if header.by_columns:
            values = self.whole(key)
            for start in range(0, len(values), raw.CHUNK):
                yield values[start : start + raw.CHUNK]
            return
        inner = header.shape[1:]
        with (
            refusing_damage(f"{self.name}, array {key}"),
            self.file.open(self.members[key]) as member,
        ):
            member.read(header.start)
            for start in range(0, header.shape[0], raw.CHUNK):
                shape = (min(raw.CHUNK, header.shape[0] - start), *inner)
                buffer = member.read(math.prod(shape) * header.dtype.itemsize)
                yield np.frombuffer(buffer, header.dtype).reshape(shape)
            member.read()


def _bytes(header: _Header) -> int:
    return math.prod(header.shape) * header.dtype.itemsize


def _read_header(member: Any) -> _Header:
    """The header of an array in NumPy's format, version 1 or 2 (3 is for field names only)."""
    version = np.lib.format.read_magic(member)
    if version == (1, 0):
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(member)
    elif version == (2, 0):
        shape, by_columns, dtype = np.lib.format.read_array_header_2_0(member)
    else:
        raise ValueError(f"version {version} of the format of arrays")
    return _Header(shape, dtype, by_columns, member.tell())


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[_Archive]:
    """Open a file."""
    with refusing_damage(str(path)):
        with path.open("rb") as start:
            signature = start.read(4)
        if signature not in SIGNATURES or not zipfile.is_zipfile(path):
            raise SourceError(
                "this is not an npz file, or it is cut off",
                where=str(path),
                allowed="a file that numpy.savez or numpy.savez_compressed wrote",
            )
        file = zipfile.ZipFile(path)
    with file:
        members = {name.removesuffix(".npy"): name for name in file.namelist()}
        yield _Archive(str(path), file, members)
