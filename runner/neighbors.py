"""Pairs of atoms that see each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import vesin
from ase.geometry import complete_cell
from jaxtyping import Bool, Float, Int8, Int32, Int64

from runner.errors import DatasetError

ALL_PAIRS_UP_TO = 256  # atoms of a molecule; for larger ones a cell list is faster
AT_ONCE = 1 << 15  # distances, so that they stay in the processor's cache
SMALLEST_GRAM = 1e-12  # of unit vectors; zero if they are linearly dependent
FURTHEST_IMAGE = 127  # cells; what an int8 holds


@dataclass(frozen=True)
class NeighborLists:
    """Who sees whom, each pair once: of each atom its neighbours of higher number, atom after atom.

    Of an atom's own images, one of each two that lie opposite to each other is its neighbour.

    Attributes:
        counts: such neighbours of each atom.
        neighbors: their numbers within their structure, from 0.
        shifts: how many of the three cell vectors further on each neighbour is; None if no
            structure is periodic.
    """

    counts: Int32[np.ndarray, " n_atoms"]
    neighbors: Int32[np.ndarray, " n_pairs"]
    shifts: Int8[np.ndarray, "n_pairs 3"] | None

    def distances(
        self,
        positions: Float[np.ndarray, "n_atoms 3"],
        first_atom: Int64[np.ndarray, " n_structures_plus_1"],
        cell: Float[np.ndarray, "n_structures 3 3"] | None = None,
    ) -> Float[np.ndarray, " n_pairs"]:
        """How far apart the pairs are, Å; the arguments are those of `find_neighbors`."""
        sizes = np.diff(first_atom)
        center = np.repeat(np.arange(len(positions)), self.counts)
        structure = np.repeat(np.arange(len(sizes)), sizes)[center]
        separation = positions[self.neighbors + first_atom[structure]] - positions[center]
        if self.shifts is not None and cell is not None:
            separation += np.einsum("pk,pkx->px", self.shifts, cell[structure])
        lengths: np.ndarray = np.linalg.norm(separation, axis=-1)
        return lengths


def find_neighbors(
    positions: Float[np.ndarray, "n_atoms 3"],
    first_atom: Int64[np.ndarray, " n_structures_plus_1"],
    cutoff: float,
    cell: Float[np.ndarray, "n_structures 3 3"] | None = None,
    pbc: Bool[np.ndarray, "n_structures 3"] | None = None,
) -> NeighborLists:
    """All pairs of atoms of one structure, images included, closer than the cutoff.

    For molecules of up to 256 atoms all distances are computed, those of many molecules of like
    size at once; larger and periodic structures have vesin's cell lists.

    Args:
        positions: Å; atoms may be outside the cell.
        first_atom: the atoms of structure s are the rows from `first_atom[s]` to
            `first_atom[s + 1]`; the first entry is 0.
        cutoff: Å; a pair at this distance is left out. Infinite: all pairs of each molecule.
        cell: Å, rows are the vectors; those of directions that are not periodic do not count.
        pbc: along which vectors each structure repeats; none, if not given.

    Raises:
        DatasetError: vectors along which a structure is periodic are zero or linearly dependent;
            a neighbour is more than 127 cells away; a periodic structure and no finite cutoff.
    """
    sizes = np.diff(first_atom)
    periodic = np.zeros(len(sizes), bool)
    if pbc is not None:
        periodic |= pbc.any(axis=1)
    molecules = np.flatnonzero(~periodic & (sizes <= ALL_PAIRS_UP_TO))
    counts = np.zeros(len(positions), np.int32)
    neighbors: list[np.ndarray] = [np.empty(0, np.int32)] * len(sizes)
    shifts: list[np.ndarray] | None = None
    if pbc is not None:
        shifts = [np.empty((0, 3), np.int8)] * len(sizes)
    for chosen in _of_like_size(sizes, molecules):
        atoms, per_atom, found = _all_pairs(positions, first_atom, chosen, cutoff)
        counts[atoms] = per_atom
        ends = np.cumsum(per_atom)[np.cumsum(sizes[chosen]) - 1].tolist()
        for s, start, stop in zip(chosen.tolist(), [0, *ends], ends, strict=False):
            neighbors[s] = found[start:stop]
            if shifts is not None:
                shifts[s] = np.zeros((stop - start, 3), np.int8)
    if np.isinf(cutoff):
        _refuse_periodic(periodic)
        cutoff = 1.0 + float(np.linalg.norm(np.ptp(positions, axis=0))) if len(positions) else 1.0
    search = vesin.NeighborList(cutoff=cutoff, full_list=True, sorted=True, n_threads=1)
    for s in np.flatnonzero(periodic | (sizes > ALL_PAIRS_UP_TO)).tolist():
        rows = slice(first_atom[s], first_atom[s + 1])
        points, box, repeats = positions[rows], np.zeros((3, 3)), np.zeros(3, bool)
        if periodic[s] and cell is not None and pbc is not None:
            repeats = pbc[s]
            points, box = _box(cell[s], repeats, points, cutoff, s)
        i, j, images = search.compute(
            points=points, box=box, periodic=repeats.tolist(), quantities="ijS"
        )
        i, j, images = (found[_once(i, j, images)] for found in (i, j, images))
        counts[rows] = np.bincount(i.astype(np.int64), minlength=sizes[s])
        neighbors[s] = j.astype(np.int32)
        if shifts is not None:
            shifts[s] = _as_int8(images, cutoff, s)
    return NeighborLists(
        counts,
        np.concatenate(neighbors) if neighbors else np.empty(0, np.int32),
        None if shifts is None else np.concatenate([np.empty((0, 3), np.int8), *shifts]),
    )


def _once(i: np.ndarray, j: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """Which of the pairs, that are there both ways round, are kept: those whose i is lower.

    Of an atom and its own image that whose first shift that is not zero is positive.
    """
    first = shifts[np.arange(len(shifts)), np.argmax(shifts != 0, axis=1)]
    kept: np.ndarray = (i < j) | ((i == j) & (first > 0))
    return kept


def _refuse_periodic(periodic: np.ndarray) -> None:
    """All pairs of a periodic structure are infinitely many."""
    if periodic.any():
        raise DatasetError(
            "a periodic structure has infinitely many pairs of atoms",
            where=f"structure {int(periodic.argmax())} (counted from 0)",
            remedy="give the long-range term a cutoff, such as train.potential.coulomb.cutoff = "
            '"10 angstrom"',
        )


def _of_like_size(sizes: np.ndarray, chosen: np.ndarray) -> Iterator[np.ndarray]:
    """The chosen structures by size, so many at once that their distances fit in cache."""
    by_size = chosen[np.argsort(sizes[chosen], kind="stable")]
    ascending = sizes[by_size]
    start = 0
    while start < len(by_size):
        smallest = int(ascending[start])
        alike = int(np.searchsorted(ascending, 1.25 * smallest + 1, side="right"))
        stop = min(alike, start + max(1, AT_ONCE // max(1, smallest**2)))
        yield by_size[start:stop]
        start = stop


def _all_pairs(
    positions: np.ndarray, first_atom: np.ndarray, chosen: np.ndarray, cutoff: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of the atoms of the chosen structures, how many neighbours each has, and which."""
    sizes = first_atom[chosen + 1] - first_atom[chosen]
    width = int(sizes.max(initial=0))
    there = np.arange(width) < sizes[:, None]
    atoms = (first_atom[chosen, None] + np.arange(width))[there]
    padded = np.full((3, len(chosen), width), np.nan)  # an atom that is not there is near none
    padded[:, there] = positions[atoms].T
    separation = padded[:, :, :, None] - padded[:, :, None, :]
    near = np.einsum("ksij,ksij->sij", separation, separation) < cutoff**2
    near &= np.arange(width) > np.arange(width)[:, None]
    per_atom = np.count_nonzero(near, axis=2)[there].astype(np.int32)
    return atoms, per_atom, (np.flatnonzero(near) % max(width, 1)).astype(np.int32)


def _box(
    cell: np.ndarray, repeats: np.ndarray, positions: np.ndarray, cutoff: float, number: int
) -> tuple[np.ndarray, np.ndarray]:
    """The cell with vectors that hold all atoms where it is not periodic, and the atoms in it.

    A search in cells takes time and memory by the box, so empty room between atoms along these
    vectors is cut down to what keeps them apart: the same pairs are near.
    """
    periodic = cell[repeats]
    lengths = np.linalg.norm(periodic, axis=1)
    real = bool(np.isfinite(periodic).all() and (lengths > 0).all())
    if real:
        units = periodic / lengths[:, None]
        real = bool(np.linalg.det(units @ units.T) > SMALLEST_GRAM)
    if not real:
        raise DatasetError(
            "a structure is periodic along vectors that are zero or linearly dependent: "
            f"{periodic.tolist()} Å",
            where=f"structure {number} (counted from 0)",
            remedy="give its cell, or pbc = False for a molecule",
        )
    box: np.ndarray = complete_cell(np.where(repeats[:, None], cell, 0.0))
    along = positions @ np.linalg.inv(box)  # in Å where the cell is not periodic
    order = np.argsort(along, axis=0)
    gaps = np.diff(np.take_along_axis(along, order, axis=0), axis=0)
    surplus = np.where(repeats, 0.0, np.maximum(gaps - 2 * cutoff, 0.0))
    if surplus.any():
        closed = np.zeros_like(along)
        np.put_along_axis(closed, order[1:], surplus.cumsum(axis=0), axis=0)
        along -= closed
        positions = along @ box
    extent = np.ptp(along, axis=0) + 2 * cutoff
    return positions, np.where(repeats[:, None], box, box * extent[:, None])


def _as_int8(shifts: np.ndarray, cutoff: float, number: int) -> np.ndarray:
    if shifts.size and np.abs(shifts).max() > FURTHEST_IMAGE:
        raise DatasetError(
            f"a neighbour within {cutoff:g} Å is more than {FURTHEST_IMAGE} cells away",
            where=f"structure {number} (counted from 0)",
            remedy="wrap the positions into the cell; if the cell is tiny, repeat it, or lower "
            "train.potential.cutoff",
        )
    return shifts.astype(np.int8)
