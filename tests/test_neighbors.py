"""Pairs within the cutoff, against ASE's neighbour list."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.geometry import complete_cell
from ase.neighborlist import neighbor_list
from hypothesis import given, settings
from hypothesis import strategies as st

from runner import neighbors, sources
from runner.config import SourceConfig
from runner.errors import DatasetError
from runner.neighbors import find_neighbors

SHARED = Path(os.environ.get("RUNNER_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
Pair = tuple[int, ...]


def _found(
    positions: np.ndarray,
    first_atom: np.ndarray,
    cutoff: float,
    cell: np.ndarray | None = None,
    pbc: np.ndarray | None = None,
) -> Iterator[list[Pair]]:
    """(i, j, shift) of the pairs of each structure, both ways round; each is found once."""
    lists = find_neighbors(positions, first_atom, cutoff, cell, pbc)
    assert (lists.shifts is None) == (pbc is None)
    first_pair = np.concatenate([[0], np.cumsum(lists.counts)])
    for start, stop in itertools.pairwise(first_atom):
        rows = slice(first_pair[start], first_pair[stop])
        i = np.repeat(np.arange(stop - start), lists.counts[start:stop])
        j = lists.neighbors[rows]
        shifts = np.zeros((len(j), 3), int) if lists.shifts is None else lists.shifts[rows]
        once = list(zip(i.tolist(), j.tolist(), *shifts.T.tolist(), strict=True))
        assert all(i < j or (i == j and image > [0, 0, 0]) for i, j, *image in once)
        yield once + [(j, i, *(-k for k in image)) for i, j, *image in once]


def _ase(atoms: Atoms, cutoff: float) -> list[Pair]:
    i, j, shifts = neighbor_list("ijS", atoms, cutoff)
    return sorted(zip(i.tolist(), j.tolist(), *shifts.T.tolist(), strict=True))


@pytest.mark.parametrize("cutoff", [0.5, 2.0, 5.0, 50.0])
def test_molecules_of_all_sizes_have_ases_pairs(cutoff: float) -> None:
    rng = np.random.default_rng(0)
    sizes = [1, 7, 2, 30, 1, 3, 300, 29, 12, 257, 7]
    parts = [rng.uniform(-3, 3, size=(n, 3)) for n in sizes]
    first_atom = np.concatenate([[0], np.cumsum(sizes)])
    for part, pairs in zip(parts, _found(np.concatenate(parts), first_atom, cutoff), strict=True):
        assert sorted(pairs) == _ase(Atoms("H" * len(part), part), cutoff)


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(1, 6),
    cutoff=st.floats(0.5, 7),
    pbc=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    size=st.floats(2, 8),
    skew=st.floats(0, 0.9),
    spread=st.floats(0, 3),
    zeros=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_any_cell_has_ases_pairs(
    n: int,
    cutoff: float,
    pbc: tuple[bool, bool, bool],
    size: float,
    skew: float,
    spread: float,
    zeros: bool,
    seed: int,
) -> None:
    """Triclinic, partial, left-handed, smaller than the cutoff, atoms outside."""
    rng = np.random.default_rng(seed)
    cutoff += 1.2345e-7  # not the length of a vector to the last bit
    cell = size * (np.eye(3)[rng.permutation(3)] + skew * rng.uniform(-0.5, 0.5, (3, 3)))
    if zeros:
        cell[~np.array(pbc)] = 0
    positions = rng.uniform(-spread, 1 + spread, (n, 3)) * size
    (pairs,) = _found(positions, np.array([0, n]), cutoff, cell[None], np.array([pbc]))
    expected = _ase(Atoms("H" * n, positions, cell=cell, pbc=pbc), cutoff)
    assert sorted(pairs) == expected
    assert len(set(pairs)) == len(pairs)


def test_molecules_and_crystals_in_one_call() -> None:
    positions = np.array([[0, 0, 0], [1.5, 0, 0], [0, 0, 0], [9, 9, 9.0], [0, 0, 1]])
    cell = np.array([np.zeros((3, 3)), np.eye(3) * 2, np.zeros((3, 3))])
    pbc = np.array([[False] * 3, [True] * 3, [False] * 3])
    molecule, atom, other = _found(positions, np.array([0, 2, 3, 5]), 2.5, cell, pbc)
    assert molecule == [(0, 1, 0, 0, 0), (1, 0, 0, 0, 0)]
    steps = [(1, 0, 0), (0, 1, 0), (0, 0, 1)]
    steps += [(-x, -y, -z) for x, y, z in steps]
    assert sorted(atom) == sorted((0, 0, *step) for step in steps)
    assert other == []


def test_a_pair_at_the_cutoff_is_out_and_just_inside_is_in() -> None:
    first_atom = np.array([0, 2])
    at = np.array([[0.0, 0, 0], [3.0, 0, 0]])
    assert list(_found(at, first_atom, 3.0)) == [[]]
    assert list(_found(at, first_atom, 3.0 + 1e-9)) == [[(0, 1, 0, 0, 0), (1, 0, 0, 0, 0)]]


def test_no_structure_and_no_atom() -> None:
    none = find_neighbors(np.zeros((0, 3)), np.array([0]), 5.0)
    assert len(none.counts) == len(none.neighbors) == 0
    assert list(_found(np.zeros((3, 3)), np.array([0, 1, 2, 3]), 5.0)) == [[], [], []]


def test_more_images_than_can_be_counted_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbors, "FURTHEST_IMAGE", 3)
    cell, pbc = np.eye(3)[None], np.array([[True, False, False]])
    find_neighbors(np.zeros((1, 3)), np.array([0, 1]), 3.5, cell, pbc)
    with pytest.raises(
        DatasetError, match=r"within 4\.5 Å is more than 3 cells away(.|\n)*structure 0"
    ):
        find_neighbors(np.zeros((1, 3)), np.array([0, 1]), 4.5, cell, pbc)


FILES = sorted(
    path for path in SHARED.rglob("*") if path.suffix in {".xyz", ".extxyz", ".npz", ".db", ".hdf5"}
)
NAMES = [str(path.relative_to(SHARED)) for path in FILES] or ["none"]


@pytest.mark.parametrize(
    ("name", "most"),
    [(name, 25) for name in NAMES]
    + [pytest.param(name, 5000, marks=pytest.mark.slow) for name in NAMES],
)
@pytest.mark.parametrize("cutoff", [5.0])
def test_real_data_has_ases_pairs(name: str, most: int, cutoff: float) -> None:
    if not (SHARED / name).is_file():
        pytest.skip(f"{SHARED / name} is not there")
    config = SourceConfig.model_validate({"path": str(SHARED / name)})
    every = sources.read(sources.locate([config]), [config], None)
    chosen = np.random.default_rng(0).permutation(len(every))[:most]
    some = every.take(chosen)
    arrays = some.structures
    found = _found(
        some.atoms["positions"], some.first_atom, cutoff, arrays.get("cell"), arrays.get("pbc")
    )
    for s, pairs in enumerate(found):
        rows = slice(some.first_atom[s], some.first_atom[s + 1])
        atoms = Atoms(some.atoms["atomic_numbers"][rows], some.atoms["positions"][rows])
        if "pbc" in arrays:
            atoms.set_cell(arrays["cell"][s])
            atoms.set_pbc(arrays["pbc"][s])
        assert sorted(pairs) == _ase(atoms, cutoff)


@pytest.mark.parametrize(
    "vectors",
    [
        [[0, 0, 0], [0, 4, 0], [0, 0, 4]],
        [[4, 0, 0], [4, 0, 0], [0, 0, 4]],
        [[np.nan, 0, 0], [0, 4, 0], [0, 0, 4]],
    ],
)
def test_cells_that_are_none_are_refused_by_number(vectors: list[list[float]]) -> None:
    cell, pbc = np.array([np.eye(3) * 9, vectors]), np.array([[True] * 3, [True, True, False]])
    with pytest.raises(DatasetError, match=r"zero or linearly dependent(.|\n)*structure 1 \("):
        find_neighbors(np.zeros((2, 3)), np.array([0, 1, 2]), 4.0, cell, pbc)


@pytest.mark.parametrize("pbc", [[True, False, False], [False, True, True]])
def test_groups_of_atoms_far_from_each_other_have_the_pairs_of_each(pbc: list[bool]) -> None:
    rng = np.random.default_rng(0)
    cell = np.array([[10.0, 1, 2], [0, 9, 3], [1, 0, 8]])
    away = complete_cell(np.where(np.array(pbc)[:, None], cell, 0))[~np.array(pbc)].sum(axis=0)
    groups = [rng.uniform(0, 10, (20, 3)) + far * away for far in (0, -800, 1000)]
    mixed = rng.permutation(60)
    back = np.argsort(mixed)
    (pairs,) = _found(
        np.concatenate(groups)[mixed], np.array([0, 60]), 4.0, cell[None], np.array([pbc])
    )
    expected = []
    for g, group in enumerate(groups):
        alone = _ase(Atoms("H20", group, cell=cell, pbc=pbc), 4.0)
        expected += [(back[i + 20 * g], back[j + 20 * g], *shift) for i, j, *shift in alone]
    assert sorted(pairs) == sorted(expected)
