"""Ragged arrays against lists of structures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from molecules import random_structures

from runner.errors import SourceError
from runner.structures import Gathering, Structures, concatenate, ragged_rows


def test_rows_of_chosen_structures() -> None:
    first_atom = np.array([0, 3, 4, 9])
    assert ragged_rows(first_atom, np.array([2, 0])).tolist() == [4, 5, 6, 7, 8, 0, 1, 2]
    assert ragged_rows(first_atom, np.array([], np.int64)).tolist() == []


def test_take_equals_picking_one_by_one() -> None:
    structures = random_structures([3, 1, 5, 2])
    taken = structures.take(np.array([3, 1, 3]))
    assert taken.first_atom.tolist() == [0, 2, 3, 5]
    assert (len(taken), taken.n_atoms) == (3, 5)
    for row, index in enumerate([3, 1, 3]):
        mine = slice(taken.first_atom[row], taken.first_atom[row + 1])
        theirs = slice(structures.first_atom[index], structures.first_atom[index + 1])
        for name, array in structures.atoms.items():
            assert np.array_equal(taken.atoms[name][mine], array[theirs])
        for name, array in structures.structures.items():
            assert np.array_equal(taken.structures[name][row], array[index])


def test_parts_are_joined_and_a_label_that_one_lacks_is_nan() -> None:
    full, bare = random_structures([2, 3], seed=1), random_structures([4], seed=2)
    del bare.atoms["forces"], bare.structures["dipole"]
    joined = concatenate([full, bare])
    assert joined.first_atom.tolist() == [0, 2, 5, 9]
    assert np.array_equal(joined.atoms["forces"][:5], full.atoms["forces"])
    assert np.isnan(joined.atoms["forces"][5:]).all()
    assert np.isnan(joined.structures["dipole"][2]).all()
    assert joined.atoms["atomic_numbers"].dtype == np.uint8


def test_groups_are_kept() -> None:
    one = random_structures([2, 3])
    named = Structures(one.first_atom, one.atoms, one.structures, ["a", "b"])
    assert concatenate([named, named]).take(np.array([3, 0])).group == ["b", "a"]
    assert concatenate([one]).group is None


def test_nothing_is_an_error() -> None:
    with pytest.raises(SourceError, match="there are no structures"):
        concatenate([])


@pytest.mark.parametrize("on_disk", [False, True])
def test_gathering_fills_what_a_part_lacks(tmp_path: Path, on_disk: bool) -> None:
    sizes = ([2, 3], [4], [1, 1])
    first, second, third = (random_structures(n, seed=i) for i, n in enumerate(sizes))
    bare = replace(first, atoms={k: v for k, v in first.atoms.items() if k != "forces"})
    crystal = replace(
        second,
        structures=second.structures | {"cell": np.eye(3)[None], "pbc": np.ones((1, 3), bool)},
        group=["g"],
    )
    gathering = Gathering(tmp_path if on_disk else None)
    for part in (bare, crystal, third):
        gathering.append(part)
    found = gathering.structures()
    assert found.first_atom.tolist() == [0, 2, 5, 9, 10, 11]
    assert isinstance(found.atoms["positions"], np.memmap) == on_disk
    forces = found.atoms["forces"]
    assert np.isnan(forces[:5]).all()
    known = [second.atoms["forces"], third.atoms["forces"]]
    assert np.array_equal(forces[5:], np.concatenate(known))
    assert found.structures["cell"].sum(axis=(1, 2)).tolist() == [0, 0, 3, 0, 0]
    assert found.structures["pbc"].any(axis=1).tolist() == [False, False, True, False, False]
    assert found.group == ["", "", "g", "", ""]
    energies = np.concatenate([part.structures["energy"] for part in (first, second, third)])
    assert np.array_equal(found.structures["energy"], energies)


def test_gathering_nothing_is_an_error() -> None:
    with pytest.raises(SourceError, match="there are no structures"):
        Gathering().structures()
