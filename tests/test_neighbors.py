"""Pairs within the cutoff, against ASE's neighbour list and a naïve double loop."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms
from ase.neighborlist import neighbor_list

from runner.neighbors import pairs_within


def _random_structures(rng: np.random.Generator, sizes: list[int]) -> list[np.ndarray]:
    return [rng.uniform(-3, 3, size=(n, 3)) for n in sizes]


@pytest.mark.parametrize("cutoff", [0.5, 2.0, 5.0, 50.0])
def test_equal_to_ase_structure_by_structure(cutoff: float) -> None:
    parts = _random_structures(np.random.default_rng(0), [1, 7, 2, 30, 1, 3])
    first_atom = np.concatenate([[0], np.cumsum([len(p) for p in parts])])
    expected = []
    for start, part in zip(first_atom, parts, strict=False):
        i, j = neighbor_list("ij", Atoms("H" * len(part), part), cutoff)
        expected += [(start + a, start + b) for a, b in zip(i, j, strict=True)]
    i, j = pairs_within(np.concatenate(parts), first_atom, cutoff)
    found = list(zip(i.tolist(), j.tolist(), strict=True))
    assert found == sorted(expected)  # sorted by centre, then by neighbour; none twice


def test_a_pair_at_the_cutoff_is_out_and_just_inside_is_in() -> None:
    first_atom = np.array([0, 2])
    at = np.array([[0.0, 0, 0], [3.0, 0, 0]])
    assert pairs_within(at, first_atom, 3.0).shape == (2, 0)
    assert pairs_within(at, first_atom, 3.0 + 1e-9).tolist() == [[0, 1], [1, 0]]


def test_single_atoms_have_no_pairs() -> None:
    assert pairs_within(np.zeros((3, 3)), np.array([0, 1, 2, 3]), 5.0).shape == (2, 0)
