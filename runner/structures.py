"""Structures of different size in flat arrays: the form in which data moves through the program."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, Shaped

from runner.errors import SourceError

FILLED_AT_ONCE = 1 << 16  # rows


def ragged_rows(
    first_atom: Int64[np.ndarray, " n_structures_plus_1"], chosen: Int64[np.ndarray, " n_chosen"]
) -> Int64[np.ndarray, " n_chosen_atoms"]:
    """Rows of all atoms of the chosen structures, in their order."""
    counts = first_atom[chosen + 1] - first_atom[chosen]
    starts = np.cumsum(counts) - counts
    rows: np.ndarray = np.arange(counts.sum()) + np.repeat(first_atom[chosen] - starts, counts)
    return rows


@dataclass(frozen=True)
class Structures:
    """Many structures; arrays as `runner.fields` names them, NaN where a label is missing.

    Attributes:
        first_atom: (n_structures + 1,) int64; the atoms of structure s are the rows from
            `first_atom[s]` to `first_atom[s + 1]` of each array in `atoms`.
        atoms: arrays with a row an atom; `atomic_numbers` (uint8) and `positions` (Å) at least.
        structures: arrays with a row a structure; `source` (int16) and `source_index` (int64),
            which say where each structure came from, at least.
        group: name of each structure's group, where the source has one.
    """

    first_atom: Int64[np.ndarray, " n_structures_plus_1"]
    atoms: dict[str, Shaped[np.ndarray, "n_atoms ..."]]
    structures: dict[str, Shaped[np.ndarray, "n_structures ..."]]
    group: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.first_atom) - 1

    @property
    def n_atoms(self) -> int:
        """Atoms of all structures together."""
        return int(self.first_atom[-1] - self.first_atom[0])

    def take(self, chosen: Int64[np.ndarray, " n_chosen"]) -> Structures:
        """The chosen structures, in the order in which they are named."""
        rows = ragged_rows(self.first_atom, chosen)
        counts = np.diff(self.first_atom)[chosen]
        return Structures(
            first_atom=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            atoms={name: array[rows] for name, array in self.atoms.items()},
            structures={name: array[chosen] for name, array in self.structures.items()},
            group=None if self.group is None else [self.group[index] for index in chosen],
        )


FILL: dict[str, float | bool] = {"cell": 0.0, "pbc": False}
"""What stands for an array that a structure does not have; for labels that is NaN."""


class Gathering:
    """Parts of many structures put end to end, in memory or in the files of a folder.

    In a folder memory stays bounded: the structures that come out are mapped from its files, which
    have to stay as long as these are used.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """Begin with nothing.

        Args:
            folder: where the arrays grow; in memory if None.
        """
        self._folder = folder
        self._columns: dict[str, _Column] = {}
        self._counts: list[np.ndarray] = []
        self._group: list[str] = []
        self._grouped = False
        self._n_atoms = 0

    def append(self, part: Structures) -> None:
        """Put a part after those that are there; what it lacks is filled."""
        n_structures = sum(map(len, self._counts))
        for table, before, n in (
            ("atoms", self._n_atoms, part.n_atoms),
            ("structures", n_structures, len(part)),
        ):
            arrays = part.atoms if table == "atoms" else part.structures
            for name, array in arrays.items():
                key = f"{table}/{name}"
                if key not in self._columns:
                    self._columns[key] = _Column.begun(key, array, self._folder)
                    self._columns[key].skip(before)
                self._columns[key].append(array)
            for key, column in self._columns.items():
                if key.startswith(f"{table}/") and key.partition("/")[2] not in arrays:
                    column.skip(n)
        self._counts.append(np.diff(part.first_atom))
        self._n_atoms += part.n_atoms
        self._group.extend(part.group or [""] * len(part))
        self._grouped |= part.group is not None

    def structures(self) -> Structures:
        """All of them.

        Raises:
            SourceError: there are none.
        """
        if not self._counts:
            raise SourceError("there are no structures")
        counts = np.concatenate(self._counts)
        arrays = {key: column.array() for key, column in self._columns.items()}
        tables: dict[str, dict[str, np.ndarray]] = {"atoms": {}, "structures": {}}
        for key, array in arrays.items():
            table, _, name = key.partition("/")
            tables[table][name] = array
        return Structures(
            first_atom=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            atoms=tables["atoms"],
            structures=tables["structures"],
            group=self._group if self._grouped else None,
        )


@dataclass
class _Column:
    """One array that grows, in a file or in memory."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fill: float | bool
    path: Path | None
    parts: list[np.ndarray]
    rows: int = 0

    @classmethod
    def begun(cls, key: str, array: np.ndarray, folder: Path | None) -> _Column:
        fill = FILL.get(key.partition("/")[2], np.nan)
        path = None if folder is None else folder / key.replace("/", "-")
        return cls(array.shape[1:], array.dtype, fill, path, [])

    def append(self, array: np.ndarray) -> None:
        self.rows += len(array)
        if self.path is None:
            self.parts.append(array)
            return
        with self.path.open("ab") as file:
            np.ascontiguousarray(array, self.dtype).tofile(file)

    def skip(self, n: int) -> None:
        for start in range(0, n, FILLED_AT_ONCE):
            rows = min(FILLED_AT_ONCE, n - start)
            self.append(np.full((rows, *self.shape), self.fill, self.dtype))

    def array(self) -> np.ndarray:
        if self.path is None:
            return np.concatenate(self.parts)
        return np.memmap(self.path, self.dtype, "r", shape=(self.rows, *self.shape))


def concatenate(parts: Iterable[Structures]) -> Structures:
    """All structures of several parts; a label that a part lacks is NaN for its structures."""
    gathering = Gathering()
    for part in parts:
        gathering.append(part)
    return gathering.structures()
