"""Structures of different size in flat arrays: the form in which data moves through the program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, Shaped

from runner.errors import SourceError


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


def concatenate(parts: Sequence[Structures]) -> Structures:
    """All structures of several parts; a label that a part lacks is NaN for its structures."""
    if not parts:
        raise SourceError("there are no structures")
    counts = np.concatenate([np.diff(part.first_atom) for part in parts])
    groups = [part.group or [""] * len(part) for part in parts]
    return Structures(
        first_atom=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        atoms=_joined([part.atoms for part in parts], [part.n_atoms for part in parts]),
        structures=_joined([part.structures for part in parts], [len(part) for part in parts]),
        group=None
        if all(part.group is None for part in parts)
        else [name for group in groups for name in group],
    )


def _joined(tables: Sequence[dict[str, np.ndarray]], rows: Sequence[int]) -> dict[str, np.ndarray]:
    """Arrays of the same name end to end, in a table's order of names."""
    shapes = {name: array.shape[1:] for table in tables for name, array in table.items()}
    return {
        name: np.concatenate(
            [
                table[name] if name in table else np.full((n, *shape), np.nan)
                for table, n in zip(tables, rows, strict=True)
            ]
        )
        for name, shape in shapes.items()
    }
