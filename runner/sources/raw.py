"""Structures as a data file has them: its keys and its units, nothing checked yet.

A reader yields `Raw` parts. Files that hold one structure after another give `Frame`s, those that
hold many structures of one size in an array give `Conformers`; both become `Raw`.
`runner.sources.labels` checks and converts them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64, Shaped

from runner.config import LabelConfig, SourceConfig
from runner.errors import InputError, SourceError, did_you_mean
from runner.fields import LABELS, Field

CHUNK = 4096  # structures that are converted together

Where = Callable[[int], str]
"""Names a structure, by its number within the part at hand, for an error."""


@dataclass(frozen=True)
class Raw:
    """Some structures of a file, flat.

    Attributes:
        counts: atoms of each structure.
        species: atomic numbers (integers) or chemical symbols (strings) of all atoms.
        positions: in the file's unit.
        labels: raw values by the name of the label, in the file's unit; NaN where a structure has
            none. A row an atom, or a row a structure.
        present: which structures have each label.
        where: names a structure.
        cell: lattice vectors as rows, in the unit of the positions; None where nothing is periodic.
        pbc: along which lattice vectors each structure is periodic.
        group: name of each structure's group, where there are groups.
    """

    counts: Int64[np.ndarray, " n_structures"]
    species: Shaped[np.ndarray, " n_atoms"]
    positions: Float64[np.ndarray, "n_atoms 3"]
    labels: dict[str, Float64[np.ndarray, "n_rows ..."]]
    present: dict[str, Bool[np.ndarray, " n_structures"]]
    where: Where
    cell: Float64[np.ndarray, "n_structures 3 3"] | None = None
    pbc: Bool[np.ndarray, "n_structures 3"] | None = None
    group: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.counts)


# --------------------------------------------------------------------------------------------------
# One structure after another
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    """One structure.

    Attributes:
        where: its name in an error.
        species: atomic numbers or chemical symbols.
        positions: in the file's unit.
        per_structure: values by the file's keys: numbers, arrays, texts.
        per_atom: arrays with a row an atom, by the file's keys.
        cell: lattice vectors as rows.
        pbc: along which of them the structure is periodic.
    """

    where: str
    species: Shaped[np.ndarray, " n_atoms"]
    positions: Float64[np.ndarray, "n_atoms 3"]
    per_structure: Mapping[str, Any]
    per_atom: Mapping[str, np.ndarray]
    cell: Float64[np.ndarray, "3 3"] = field(default_factory=lambda: np.zeros((3, 3)))
    pbc: Bool[np.ndarray, " 3"] = field(default_factory=lambda: np.zeros(3, bool))


def from_frames(
    frames: Iterable[Frame], config: SourceConfig, group_key: str | None
) -> Iterator[Raw]:
    """Frames as flat arrays, some thousands at a time.

    Raises:
        SourceError: a value that cannot be the label it is said to be; a structure without group.
    """
    iterator = iter(frames)
    while chunk := list(islice(iterator, CHUNK)):
        yield _raw_of(chunk, config, group_key)


def _raw_of(frames: list[Frame], config: SourceConfig, group_key: str | None) -> Raw:
    counts = np.array([len(frame.species) for frame in frames], np.int64)
    labels, present = {}, {}
    for name, label in config.labels.items():
        found = [_value_of(frame, LABELS[name], label) for frame in frames]
        present[name] = np.array([value is not None for value in found])
        labels[name] = np.concatenate(
            [
                value if value is not None else np.full(_shape(LABELS[name], label, int(n)), np.nan)
                for value, n in zip(found, counts, strict=True)
            ]
        )
    pbc = np.array([frame.pbc for frame in frames])
    periodic = bool(pbc.any())
    return Raw(
        counts=counts,
        species=np.concatenate([frame.species for frame in frames]),
        positions=np.concatenate([frame.positions for frame in frames]),
        labels=labels,
        present=present,
        where=lambda index: frames[index].where,
        cell=np.array([frame.cell for frame in frames]) if periodic else None,
        pbc=pbc if periodic else None,
        group=None if group_key is None else [_group_of(frame, group_key) for frame in frames],
    )


def _shape(quantity: Field, label: LabelConfig, n_atoms: int) -> tuple[int, ...]:
    """Shape of the rows of one structure."""
    return (n_atoms if quantity.per == "atom" else 1, *label.stored_shape(quantity))


def _value_of(frame: Frame, quantity: Field, label: LabelConfig) -> np.ndarray | None:
    """The rows of one label of one structure, or None where it has none."""
    shape = _shape(quantity, label, len(frame.species))
    if label.value is not None:
        return np.full(shape, label.value)
    assert label.key is not None
    mine, other = frame.per_structure, frame.per_atom
    if quantity.per == "atom":
        mine, other = other, mine
    raw = mine.get(label.key)
    stray = other.get(label.key)
    if raw is None and quantity.per == "atom" and _size(stray) == np.prod(shape):
        raw = stray  # a list in the comment line
    if raw is None:
        if stray is not None:
            raise refusal(quantity, label.key, f"a value a {_other(quantity)}", frame.where)
        return None
    value = as_numbers(raw)
    if value is None:
        raise refusal(quantity, label.key, repr(raw), frame.where)
    if not _fits(value.shape, shape):
        raise refusal(quantity, label.key, f"an array of shape {value.shape}", frame.where)
    return value.reshape(shape)


def _size(value: Any) -> int:
    return 0 if value is None else int(np.size(value))


def _other(quantity: Field) -> str:
    return "structure" if quantity.per == "atom" else "atom"


def _group_of(frame: Frame, key: str) -> str:
    if key not in frame.per_structure:
        hint = did_you_mean(key, frame.per_structure)
        raise SourceError(
            f'the structure has no key "{key}" to group by' + (f"; {hint}" if hint else ""),
            where=frame.where,
            remedy="correct prepare.split.group_by",
        )
    return str(frame.per_structure[key])


# --------------------------------------------------------------------------------------------------
# Many structures in an array
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conformers:
    """Structures that lie in arrays with as many places for atoms each.

    Attributes:
        where: names a structure by its number here.
        species: atomic numbers or symbols, a row a structure; 0 marks a place without an atom.
        positions: in the file's unit.
        values: arrays by the file's keys, as the file has them: with a row a structure, or one for
            all of them. Those of a label of the atoms have the places for atoms next.
        group: name of each structure's group, where there are groups.
        cell: lattice vectors as rows, where the file has them.
        pbc: along which of them the structures are periodic.
    """

    where: Where
    species: Shaped[np.ndarray, "n_structures n_places"]
    positions: Float64[np.ndarray, "n_structures n_places 3"]
    values: Mapping[str, np.ndarray]
    group: Sequence[str] | None = None
    cell: Float64[np.ndarray, "n_structures 3 3"] | None = None
    pbc: Bool[np.ndarray, "n_structures 3"] | None = None

    def __len__(self) -> int:
        return len(self.species)


def from_conformers(blocks: Iterable[Conformers], config: SourceConfig) -> Iterator[Raw]:
    """Blocks as flat arrays; small ones are put together, some thousands of structures at a time.

    Raises:
        SourceError: a value that cannot be the label it is said to be.
    """
    waiting: list[Raw] = []
    for block in blocks:
        waiting.append(_flat(block, config))
        if sum(map(len, waiting)) >= CHUNK:
            yield joined(waiting)
            waiting = []
    if waiting:
        yield joined(waiting)


def _flat(block: Conformers, config: SourceConfig) -> Raw:
    real = block.species != 0 if block.species.dtype.kind in "iu" else block.species != ""
    n, places = real.shape
    labels, present = {}, {}
    for name, label in config.labels.items():
        values = _block_values(block, LABELS[name], label)
        present[name] = np.full(n, values is not None)
        rows = (n, places) if LABELS[name].per == "atom" else (n,)
        if values is None:
            values = np.full((*rows, *label.stored_shape(LABELS[name])), np.nan)
        labels[name] = values[real] if LABELS[name].per == "atom" else values
    return Raw(
        counts=real.sum(axis=1).astype(np.int64),
        species=block.species[real],
        positions=block.positions[real],
        labels=labels,
        present=present,
        where=block.where,
        cell=block.cell,
        pbc=block.pbc,
        group=block.group,
    )


def _block_values(block: Conformers, quantity: Field, label: LabelConfig) -> np.ndarray | None:
    """One label of a block: (n, …) or (n, places, …); None where the block has none."""
    n, places = block.species.shape
    inner = label.stored_shape(quantity)
    one = (places, *inner) if quantity.per == "atom" else inner
    if label.value is not None:
        return np.full((n, *one), label.value)
    assert label.key is not None
    if label.key not in block.values:
        return None
    raw = block.values[label.key]
    values = as_numbers(raw)
    if values is None:
        found = repr(raw) if np.size(raw) < 5 else f"an array of {np.asarray(raw).dtype}"
        raise refusal(quantity, label.key, found, block.where(0))
    if values.shape[:1] == (n,) and _fits(values.shape[1:], one):
        return values.reshape(n, *one)
    if _fits(values.shape, one):  # one for all
        return np.broadcast_to(values.reshape(one), (n, *one)).copy()
    expected = (n, *one)
    raise refusal(
        quantity,
        label.key,
        f"an array of shape {values.shape} instead of {expected}",
        block.where(0),
    )


def _fits(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether an array is of the wanted shape, but for axes of length 1 and a flat 3 × 3 tensor."""
    shape, other = (tuple(n for n in lengths if n != 1) for lengths in (found, wanted))
    return shape == other or (other == (3, 3) and shape == (9,))


def joined(parts: Sequence[Raw]) -> Raw:
    """Several parts as one."""
    if len(parts) == 1:
        return parts[0]
    starts = np.cumsum([0, *map(len, parts)])

    def where(index: int) -> str:
        part = int(np.searchsorted(starts, index, side="right")) - 1
        return parts[part].where(index - int(starts[part]))

    periodic = any(part.pbc is not None for part in parts)
    cells = [np.zeros((len(p), 3, 3)) if p.cell is None else p.cell for p in parts]
    pbcs = [np.zeros((len(p), 3), bool) if p.pbc is None else p.pbc for p in parts]
    return Raw(
        counts=np.concatenate([part.counts for part in parts]),
        species=np.concatenate([part.species for part in parts]),
        positions=np.concatenate([part.positions for part in parts]),
        labels={k: np.concatenate([part.labels[k] for part in parts]) for k in parts[0].labels},
        present={k: np.concatenate([part.present[k] for part in parts]) for k in parts[0].present},
        where=where,
        cell=np.concatenate(cells) if periodic else None,
        pbc=np.concatenate(pbcs) if periodic else None,
        group=None
        if parts[0].group is None
        else [name for part in parts for name in part.group or []],
    )


# --------------------------------------------------------------------------------------------------
# Values
# --------------------------------------------------------------------------------------------------


def as_numbers(raw: Any) -> np.ndarray | None:
    """A value of a file as float64; None where it is no number, nor an array of numbers."""
    try:
        value = np.asarray(raw)
        if value.dtype.kind in "bcmMV":
            return None
        if value.dtype.kind in "USO" and any("_" in str(text) for text in value.ravel()):
            return None  # Python would read 1_000 as a number
        return value.astype(np.float64)
    except (TypeError, ValueError):
        return None


def refusal(quantity: Field, key: str, found: str, where: str) -> SourceError:
    """Says that what a key holds cannot be a label."""
    size = f"an array of shape {quantity.shape}" if quantity.shape else "one number"
    if quantity.shape == (3, 3):
        size += ', or six numbers whose order the config states (order = "xx yy zz yz xz xy")'
    return SourceError(
        f'the key "{key}" holds {found}, which cannot be the label {quantity.name}',
        where=where,
        allowed=f"{size} {'an atom' if quantity.per == 'atom' else 'a structure'}",
    )


@contextlib.contextmanager
def refusing_damage(where: str, what: str = "the file is damaged or cut off") -> Iterator[None]:
    """Say of whatever a library raises at damaged bytes, which may be any kind of error, where."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        text = printable(" ".join(str(error).split())) or type(error).__name__
        raise SourceError(
            f"{what}: {text}",
            where=where,
            remedy="if the file is damaged, get it again",
        ) from None


def printable(text: str) -> str:
    """A text that can be printed even if its bytes are no UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()
