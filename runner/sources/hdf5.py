"""HDF5 files with a group a molecule: ANI-1, ANI-1x, ANI-2x, SPICE, modelforge.

The groups are found wherever they lie. Of each, only the datasets that the config names are read,
some thousands of conformers at a time.
"""

from __future__ import annotations

import functools
import math
import mmap
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import h5py
import numpy as np
from ase.data import atomic_numbers as ATOMIC_NUMBER_OF
from ase.data import chemical_symbols

from runner.config import SourceConfig
from runner.errors import SourceError, did_you_mean
from runner.fields import LABELS
from runner.sources import raw
from runner.sources.raw import Conformers, Raw, from_conformers, printable, refusing_damage

LAYOUTS = (  # (name, key of the positions, key of the species)
    ("ANI-1, ANI-2x", "coordinates", "species"),
    ("ANI-1x", "coordinates", "atomic_numbers"),
    ("SPICE", "conformations", "atomic_numbers"),
    ("modelforge", "positions", "atomic_numbers"),
)
UNIT_ATTRIBUTES = ("u", "units", "unit")
HEAP = b"GCOL\x01"  # signature and version of a heap of strings
MOLECULE = "molecule"  # the group key that means the name of the HDF5 group


def read(path: Path, config: SourceConfig, group_key: str | None) -> Iterator[Raw]:
    """The structures of a file, group by group, some thousands at a time.

    Args:
        path: the file.
        config: keys of the labels.
        group_key: `molecule` for the name of the HDF5 group (with the formula where a group mixes
            molecules), or a dataset of each group, with one value or one a conformer.

    Raises:
        SourceError: a file that is damaged, cut off or of no known layout.
    """
    yield from from_conformers(_blocks(path, config, group_key), config)


def keys(path: Path) -> list[str]:
    """The keys of the first group that could be labels."""
    for group in _groups(path, ()):
        with refusing_damage(group.where):
            others = [n for n in group.names if n not in (group.positions_key, group.species_key)]
            return [name for name in others if _could_be_a_label(group.member(name))]
    return []


def units(path: Path) -> dict[str, str]:
    """The units that the file states, each in the first group that has the key."""
    found: dict[str, str | None] = {}
    for group in _groups(path, ()):
        with refusing_damage(group.where):
            if "positions" not in found:
                found["positions"] = group.unit(group.dataset(group.positions_key))
            for key in group.names:
                if key not in found:
                    member = group.member(key)
                    found[key] = group.unit(member) if isinstance(member, h5py.Dataset) else None
    return {key: unit for key, unit in found.items() if unit}


def _could_be_a_label(member: Any) -> bool:
    return isinstance(member, h5py.Dataset) and member.dtype.kind in "iuf"


# --------------------------------------------------------------------------------------------------
# Groups
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """A group that holds conformers.

    Attributes:
        path: the file.
        name: its path within the file.
        group: as h5py has it.
        names: all that lies in it.
        positions_key: name of the dataset of the positions.
        species_key: name of the dataset of the atomic numbers or symbols.
    """

    path: Path
    name: str
    group: Any
    names: list[str]
    positions_key: str
    species_key: str

    @property
    def where(self) -> str:
        """Its name in an error."""
        return f"{self.path}, group {self.name}"

    def member(self, key: str) -> Any:
        """What the group holds under a key."""
        return _member(self.group, key, self.where)

    def dataset(self, key: str) -> Any:
        """The dataset under a key, sure to be one that was written whole."""
        dataset = self.member(key)
        if not isinstance(dataset, h5py.Dataset) or dataset.shape is None:
            raise SourceError(f'"{key}" is not a dataset with values', where=self.where)
        self._check_readable(key, dataset.dtype)
        _check_stored(dataset, key, self.where)
        return dataset

    def unit(self, dataset: Any) -> str | None:
        """The unit that a dataset of the group states in an attribute."""
        for name in UNIT_ATTRIBUTES:
            if name in dataset.attrs:
                self._check_readable(name, dataset.attrs.get_id(name).dtype)
                value = np.ravel(dataset.attrs[name])
                return _text(value[0]).strip() or None if len(value) else None
        return None

    def _check_readable(self, key: str, dtype: np.dtype[Any]) -> None:
        """Refuse what the HDF5 library would hang or crash at."""
        text = h5py.check_string_dtype(dtype)
        if dtype.kind in "OV" and text is None:
            _refuse_type(dtype, key, "numbers or strings", self.where)
        if text is not None and text.length is None:
            _check_heaps(self.path)


def _groups(path: Path, wanted: Collection[str]) -> Iterator[_Group]:
    """The groups with conformers; an error where there is none, or one that lacks its positions."""
    found = False
    with refusing_damage(str(path)):
        if not h5py.is_hdf5(path):
            raise SourceError("this is not an HDF5 file", where=str(path))
        with h5py.File(path, "r", locking="best-effort") as file:
            for group in _walk(path, "/", file, wanted, set()):
                found = True
                yield group
    if not found:
        raise SourceError(
            "no group of the file has a known layout",
            where=str(path),
            allowed="groups with the datasets "
            + "; ".join(f"{p} and {s} ({name})" for name, p, s in LAYOUTS),
        )


def _walk(
    path: Path, name: str, group: Any, wanted: Collection[str], seen: set[int]
) -> Iterator[_Group]:
    """The groups with conformers at and below a group, in the order of the file."""
    where = f"{path}, group {name}"
    address = h5py.h5o.get_info(group.id).addr
    if address in seen:  # a link back up would have no end
        raise SourceError("two names lead to the same group", where=where)
    seen.add(address)
    names = list(group)
    for _, positions, species in LAYOUTS:
        if positions in names and species in names:
            yield _Group(path, name, group, names, positions, species)
            return
    _refuse_half_a_layout(names, wanted, where)
    for below in names:
        member = _member(group, below, where)
        if isinstance(member, h5py.Group):
            yield from _walk(path, printable(f"{name}/{below}").strip("/"), member, wanted, seen)


def _refuse_half_a_layout(names: list[str], wanted: Collection[str], where: str) -> None:
    """Refuse a group that has labels, or positions or species, but not all that it takes."""
    known = {key for _, *keys in LAYOUTS for key in keys} | set(wanted)
    found = sorted(known & set(names))
    if found:
        raise SourceError(
            f'the group has "{found[0]}" but not both positions and species',
            where=where,
            allowed="; ".join(f"{p} and {s} ({name})" for name, p, s in LAYOUTS),
        )


def _member(group: Any, key: str, where: str) -> Any:
    """What a group holds under a name, unless it lies in another file."""
    if isinstance(group.get(key, getlink=True), h5py.ExternalLink):
        raise SourceError(
            f'"{printable(key)}" is a link into another file',
            where=where,
            remedy="name the other file in the source",
        )
    return group[key]


# --------------------------------------------------------------------------------------------------
# Conformers
# --------------------------------------------------------------------------------------------------


def _blocks(path: Path, config: SourceConfig, group_key: str | None) -> Iterator[Conformers]:
    """The conformers of every group, in slices."""
    wanted = {label.key: name for name, label in config.labels.items() if label.key is not None}
    seen: dict[str, str | None] = {}
    for group in _groups(path, wanted):
        with refusing_damage(group.where):
            datasets = {key: group.dataset(key) for key in wanted if key in group.names}
            positions = group.dataset(group.positions_key)
            for key, dataset in (*datasets.items(), (group.positions_key, positions)):
                _check_unit(group.unit(dataset), key, seen, group.where)
            yield from _slices(group, positions, datasets, config, group_key)


def _slices(
    group: _Group, positions: Any, datasets: dict[str, Any], config: SourceConfig, key: str | None
) -> Iterator[Conformers]:
    """The conformers of one group, in slices."""
    n, places = _size(positions, group)
    species = _species(group, n, places)
    mixed = group.dataset(group.species_key).shape == (n, places)
    in_rows = {k: _is_in_rows(d, k, n, places, config, group) for k, d in datasets.items()}
    for start in range(0, n, raw.CHUNK):
        part = slice(start, min(start + raw.CHUNK, n))
        rows = np.broadcast_to(
            species if len(species) == 1 else species[part], (_len(part), places)
        )
        yield Conformers(
            where=partial(_where, group.where, start),
            species=rows,
            positions=positions[part].astype(np.float64),
            values={k: d[part] if in_rows[k] else d[()][None] for k, d in datasets.items()},
            group=None if key is None else _group_names(group, key, rows, part, n, mixed),
        )


def _len(part: slice) -> int:
    return int(part.stop - part.start)


def _where(group: str, start: int, index: int) -> str:
    return f"{group}, conformer {start + index} (counted from 0)"


def _size(positions: Any, group: _Group) -> tuple[int, int]:
    """Conformers and atoms of a group."""
    shape = positions.shape
    if positions.dtype.kind not in "iuf":
        _refuse_type(positions.dtype, group.positions_key, "numbers", group.where)
    if len(shape) != 3 or shape[2] != 3:
        raise SourceError(
            f'"{group.positions_key}" is an array of shape {shape}',
            where=group.where,
            allowed="shape (conformers, atoms, 3)",
        )
    return int(shape[0]), int(shape[1])


def _species(group: _Group, n: int, places: int) -> np.ndarray:
    """Atomic numbers, (n, atoms), or (1, atoms) where all conformers share them."""
    key = group.species_key
    dataset = group.dataset(key)
    shape = tuple(dataset.shape)
    if shape not in ((n, places), (places,), (places, 1), (1, places)):
        raise SourceError(
            f'"{key}" is an array of shape {shape}, but there are {places} atoms',
            where=group.where,
            allowed=f"shape {(places,)} or {(n, places)}",
        )
    if dataset.dtype.kind in "iu":
        species = np.asarray(dataset[()]).astype(np.int64)
    elif _is_text(dataset):
        species = _numbers_of(np.ravel(dataset[()]), group)
    else:
        _refuse_type(dataset.dtype, key, "whole numbers or symbols", group.where)
    species = species.reshape(n if shape == (n, places) else 1, places)
    empty = (species == 0).any(axis=1)
    if empty.any():  # elsewhere a 0 means a place without an atom
        raise SourceError(
            f'"{key}" has a place without an element',
            where=_where(group.where, 0, int(empty.argmax())),
        )
    return species


def _numbers_of(symbols: np.ndarray, group: _Group) -> np.ndarray:
    """Atomic numbers of chemical symbols."""
    distinct, inverse = np.unique([_text(symbol) for symbol in symbols], return_inverse=True)
    numbers = [ATOMIC_NUMBER_OF.get(str(symbol), 0) for symbol in distinct]
    if 0 in numbers:
        raise SourceError(
            f'"{distinct[numbers.index(0)]}" is not an element',
            where=group.where,
            allowed="chemical symbols such as H, C, Cl",
        )
    return np.array(numbers, np.int64)[inverse.ravel()]


def _is_in_rows(
    dataset: Any, key: str, n: int, places: int, config: SourceConfig, group: _Group
) -> bool:
    """Whether a dataset has a row a conformer, rather than one value for all of them."""
    if dataset.dtype.kind not in "iuf":
        _refuse_type(dataset.dtype, key, "numbers", group.where)
    shape = tuple(dataset.shape)
    is_one = any(
        math.prod(shape)
        == (places if LABELS[name].per == "atom" else 1)
        * math.prod(label.stored_shape(LABELS[name]))
        for name, label in config.labels.items()
        if label.key == key
    )
    if shape[:1] != (n,) and not is_one:
        raise SourceError(
            f'"{key}" is an array of shape {shape}, but there are {n} conformers',
            where=group.where,
            allowed="a row a conformer, or one value for all of them",
        )
    return shape[:1] == (n,) and (n == 1 or not is_one)


def _refuse_type(dtype: np.dtype[Any], key: str, allowed: str, where: str) -> NoReturn:
    raise SourceError(f'"{key}" is of the type {dtype}', where=where, allowed=allowed)


# --------------------------------------------------------------------------------------------------
# Groups to split by
# --------------------------------------------------------------------------------------------------


def _group_names(
    group: _Group, key: str, species: np.ndarray, part: slice, n: int, mixed: bool
) -> list[str]:
    """The name of each conformer's group; `mixed`: each conformer has species of its own."""
    if key == MOLECULE:
        return _molecules(group.name, species) if mixed else [group.name] * len(species)
    if key not in group.names:
        hint = did_you_mean(key, group.names)
        raise SourceError(
            f'the group has no dataset "{key}" to group by' + (f"; {hint}" if hint else ""),
            where=group.where,
            remedy=f'correct prepare.split.group_by; "{MOLECULE}" is the name of the HDF5 group',
        )
    dataset = group.dataset(key)
    if dataset.size == 1:
        return [_text(np.ravel(dataset[()])[0])] * _len(part)
    if dataset.shape[0] != n or dataset.size != n:
        raise SourceError(
            f'"{key}" is an array of shape {dataset.shape}, which cannot group {n} conformers',
            where=group.where,
            allowed="one value, or one a conformer",
        )
    return [_text(value) for value in np.ravel(dataset[part])]


def _molecules(name: str, species: np.ndarray) -> list[str]:
    """Name of the HDF5 group and formula of each conformer."""
    distinct, inverse = np.unique(species, axis=0, return_inverse=True)
    formulas = [f"{name} {_formula(row)}" for row in distinct]
    return [formulas[number] for number in inverse.ravel()]


def _formula(species: np.ndarray) -> str:
    """Symbols and how many there are of each: C1H4."""
    distinct, counts = np.unique(species, return_counts=True)
    symbols = [chemical_symbols[z] if 0 < z < len(chemical_symbols) else z for z in distinct]
    return "".join(sorted(f"{symbol}{n}" for symbol, n in zip(symbols, counts, strict=True)))


def _is_text(dataset: Any) -> bool:
    return h5py.check_string_dtype(dataset.dtype) is not None


def _text(value: Any) -> str:
    """A string or number of a file as text."""
    return printable(
        value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)
    )


# --------------------------------------------------------------------------------------------------
# Datasets
# --------------------------------------------------------------------------------------------------


def _check_unit(unit: str | None, key: str, seen: dict[str, str | None], where: str) -> None:
    """Refuse a unit that is not that of the groups before."""
    first = seen.setdefault(key, unit)
    if unit != first:
        raise SourceError(
            f'"{key}" is in {_quoted(unit)} here, but in {_quoted(first)} in the groups before',
            where=where,
            remedy="convert the file to one unit for each key",
        )


def _quoted(unit: str | None) -> str:
    return "no stated unit" if unit is None else f'"{unit}"'


def _check_stored(dataset: Any, key: str, where: str) -> None:
    """Refuse a dataset of which a part was never written: HDF5 would make it up, as zeros."""
    if dataset.is_virtual or dataset.external:
        raise SourceError(f'the values of "{key}" lie in another file', where=where)
    if dataset.chunks is None and h5py.check_vlen_dtype(dataset.dtype) is not None:
        whole = dataset.size == 0 or dataset.id.get_storage_size() > 0
    elif dataset.chunks is None:
        whole = dataset.size * dataset.id.get_type().get_size() == dataset.id.get_storage_size()
    else:
        steps = zip(dataset.shape, dataset.chunks, strict=True)
        whole = dataset.id.get_num_chunks() == math.prod(-(-n // step) for n, step in steps)
    if not whole:
        raise SourceError(f'"{key}" is damaged, or was never written whole', where=where)


def _check_heaps(path: Path) -> None:
    """Refuse a file at whose strings the HDF5 library would hang.

    Strings of any length lie in heaps: the library walks through the objects of a heap by their
    sizes, and never comes to an end where a damaged size leads nowhere or back.
    """
    state = path.stat()
    if not _heaps_end(path, state.st_size, state.st_mtime_ns):
        raise SourceError("the file is damaged: its strings cannot be read", where=str(path))


@functools.lru_cache(maxsize=64)
def _heaps_end(path: Path, size: int, changed: int) -> bool:  # noqa: ARG001 (they tell contents)
    """Whether a walk through each heap of a file, by the format's rules, has an end."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = content.find(HEAP)
        while start >= 0:
            if not _heap_ends(content, start):
                return False
            start = content.find(HEAP, start + len(HEAP))
    return True


def _heap_ends(content: mmap.mmap, start: int) -> bool:
    """Follow the sizes of one heap, which are unsigned and wrap round as they do in the library."""
    place = start + 16
    while place + 16 <= len(content):
        (length,) = struct.unpack_from("<Q", content, start + 8)
        if place + 16 > start + length:
            return True
        index, size = struct.unpack_from("<H6xQ", content, place)
        step = (16 + (size + 7) % 2**64 // 8 * 8) % 2**64 if index else size
        if not 0 < step < 2**63:
            return False
        place += step
    return True
