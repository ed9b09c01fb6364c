"""Which structures are left out, and why; which of them are the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float64, Int64

from runner.config import FilterConfig
from runner.errors import InputError
from runner.self_energies import distinct_compositions
from runner.structures import Structures

SAME_ENERGY = 1e-6  # eV
SAME_DISTANCE = 1e-5  # Å
PAIRS_AT_ONCE = 1 << 22


def dropped_structures(
    structures: Structures,
    config: FilterConfig,
    elements: Sequence[str],
    composition: Int64[np.ndarray, "n_structures n_elements"],
) -> dict[str, Int64[np.ndarray, " n_dropped"]]:
    """The structures that the filters drop, by the first reason that applies to each.

    A structure that lacks the label of a filter is kept.

    Args:
        structures: in the program's units.
        config: the filters.
        elements: symbols, in the order of the columns of `composition`.
        composition: atoms of each element in each structure.

    Raises:
        InputError: a filter of a label that no source maps.
    """
    kept = np.ones(len(structures), bool)
    dropped = {}
    for reason, bad in _reasons(structures, config, elements, composition):
        here = np.flatnonzero(kept & bad)
        kept[here] = False
        if len(here):
            dropped[reason] = here
    if config.duplicates == "drop":
        remaining = np.flatnonzero(kept)
        same = first_of_duplicates(structures, remaining, composition)
        repeated = remaining[same != np.arange(len(remaining))]
        if len(repeated):
            dropped["duplicates"] = repeated
    return dropped


def _reasons(
    structures: Structures, config: FilterConfig, elements: Sequence[str], composition: np.ndarray
) -> Iterator[tuple[str, Bool[np.ndarray, " n_structures"]]]:
    """Each filter of the config, and the structures that it does not let through."""
    n_atoms = np.diff(structures.first_atom)
    if config.elements is not None:
        foreign = [symbol not in config.elements for symbol in elements]
        yield (
            f"elements other than {', '.join(config.elements)}",
            np.asarray(composition[:, foreign].any(axis=1)),
        )
    if config.min_atoms is not None:
        yield f"fewer than {config.min_atoms} atoms", n_atoms < config.min_atoms
    if config.max_atoms is not None:
        yield f"more than {config.max_atoms} atoms", n_atoms > config.max_atoms
    if config.max_force is not None:
        longest = _longest_force(structures)
        yield f"a force above {config.max_force:g} eV/Å", longest > config.max_force
    lowest, highest = config.min_energy_per_atom, config.max_energy_per_atom
    if lowest is not None or highest is not None:
        energy = _label(structures, "energy", "energy_per_atom") / n_atoms
        if lowest is not None:
            yield f"an energy below {lowest:g} eV an atom", energy < lowest
        if highest is not None:
            yield f"an energy above {highest:g} eV an atom", energy > highest
    if config.total_charge is not None:
        charge = _label(structures, "total_charge", "total_charge")
        foreign_charge = np.isfinite(charge) & ~np.isclose(
            charge[:, None], config.total_charge, rtol=0, atol=1e-3
        ).any(1)
        allowed = ", ".join(f"{value:g}" for value in config.total_charge)
        yield f"a charge other than {allowed} e", foreign_charge


def _label(structures: Structures, name: str, key: str) -> np.ndarray:
    if name not in structures.structures:
        raise _unmapped(name, key)
    return np.asarray(structures.structures[name])


def _unmapped(name: str, key: str) -> InputError:
    return InputError(
        f"there is a filter of the {name}, and no source has the label {name}",
        where=f"prepare.filter.{key}",
        remedy=f"map {name} in a source, or take the filter out",
    )


def _longest_force(structures: Structures) -> Float64[np.ndarray, " n_structures"]:
    """Length of the longest force of each structure, eV/Å; NaN where it has none."""
    if "forces" not in structures.atoms:
        raise _unmapped("forces", "max_force")
    longest = np.empty(len(structures))
    for start, stop in blocks_of(np.diff(structures.first_atom)):
        rows = slice(structures.first_atom[start], structures.first_atom[stop])
        lengths = np.linalg.norm(structures.atoms["forces"][rows], axis=1)
        first = structures.first_atom[start:stop] - structures.first_atom[start]
        longest[start:stop] = np.fmax.reduceat(lengths, first)
    return longest


def blocks_of(
    sizes: Int64[np.ndarray, " n"], at_once: int = PAIRS_AT_ONCE
) -> Iterator[tuple[int, int]]:
    """Ranges of structures whose sizes sum to about `at_once`, so that memory stays bounded."""
    ends = np.cumsum(sizes)
    start = 0
    while start < len(sizes):
        before = int(ends[start - 1]) if start else 0
        stop = max(int(np.searchsorted(ends, before + at_once, side="right")), start + 1)
        yield start, stop
        start = stop


def first_of_duplicates(
    structures: Structures,
    chosen: Int64[np.ndarray, " n_chosen"],
    composition: Int64[np.ndarray, "n_structures n_elements"],
) -> Int64[np.ndarray, " n_chosen"]:
    """For each chosen structure the first one that is the same, by its place in `chosen`.

    The same are structures of one composition whose interatomic distances agree to 10⁻⁵ Å, element
    pair by element pair, and whose energies agree to 10⁻⁶ eV: turned, moved, mirrored and with
    their atoms in another order they stay the same.

    Args:
        structures: in the program's units.
        chosen: those to compare.
        composition: atoms of each element in each of `structures`.
    """
    energy = structures.structures.get("energy", np.full(len(structures), np.nan))[chosen]
    kind = distinct_compositions(composition[chosen])[1]
    candidates = _energy_recurs(kind, np.asarray(energy))
    same: list[tuple[int, int]] = []
    extent = _extents(structures, chosen[candidates])
    order = np.lexsort((candidates, extent, kind[candidates]))
    for position, one in enumerate(order):
        for other in order[position + 1 :]:
            a, b = int(candidates[one]), int(candidates[other])
            n_pairs = _n_atoms(structures, int(chosen[a])) ** 2
            if kind[a] != kind[b] or extent[other] - extent[one] > SAME_DISTANCE * n_pairs:
                break
            if _same_energy(energy[a], energy[b]) and _same_distances(
                structures, int(chosen[a]), int(chosen[b])
            ):
                same.append((a, b))
                break  # the next one is compared with that one
    return _first_of_each(same, len(chosen))


def _first_of_each(same: Sequence[tuple[int, int]], n: int) -> np.ndarray:
    """The lowest number of those that each of n is linked to, by whatever way."""
    links = np.array(same, np.int64).reshape(-1, 2)
    from scipy.sparse import coo_array  # a fifth of a second, which a training need not take
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(links), bool), (links[:, 0], links[:, 1])), shape=(n, n))
    owner = connected_components(graph, directed=False)[1]
    first = np.full(n, n)
    np.minimum.at(first, owner, np.arange(n))
    result: np.ndarray = first[owner]
    return result


def _n_atoms(structures: Structures, index: int) -> int:
    return int(structures.first_atom[index + 1] - structures.first_atom[index])


def _energy_recurs(kind: np.ndarray, energy: np.ndarray) -> np.ndarray:
    """Structures whose composition has another structure of the same energy, or of none."""
    order = np.lexsort((energy, kind))  # NaN last
    gap = np.diff(energy[order])
    close = (np.diff(kind[order]) == 0) & ((np.abs(gap) <= SAME_ENERGY) | np.isnan(gap))
    recurs = np.zeros(len(kind), bool)
    recurs[order[1:][close]] = True
    recurs[order[:-1][close]] = True
    return np.flatnonzero(recurs)


def _same_energy(one: float, other: float) -> bool:
    return bool(abs(one - other) <= SAME_ENERGY or (np.isnan(one) and np.isnan(other)))


def _extents(
    structures: Structures, chosen: Int64[np.ndarray, " n_chosen"]
) -> Float64[np.ndarray, " n_chosen"]:
    """Sum of all interatomic distances of each structure, Å."""
    extents = np.empty(len(chosen))
    for number, index in enumerate(chosen.tolist()):
        extents[number] = _distances(structures, index)[0].sum()
    return extents


def _distances(structures: Structures, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Distances of all pairs of atoms, and which pair of elements each belongs to."""
    rows = slice(structures.first_atom[index], structures.first_atom[index + 1])
    positions = np.asarray(structures.atoms["positions"][rows])
    numbers = structures.atoms["atomic_numbers"][rows].astype(np.int64)
    i, j = np.triu_indices(len(positions), k=1)
    low, high = np.minimum(numbers[i], numbers[j]), np.maximum(numbers[i], numbers[j])
    return np.linalg.norm(positions[i] - positions[j], axis=1), low * 256 + high


def _same_distances(structures: Structures, one: int, other: int) -> bool:
    for name in ("cell", "pbc"):
        if name in structures.structures:
            array = structures.structures[name]
            if not np.allclose(array[one], array[other], rtol=0, atol=SAME_DISTANCE):
                return False
    sorted_distances = []
    for index in (one, other):
        distance, pair = _distances(structures, index)
        sorted_distances.append(distance[np.lexsort((distance, pair))])
    return bool(np.abs(sorted_distances[0] - sorted_distances[1]).max(initial=0) <= SAME_DISTANCE)
