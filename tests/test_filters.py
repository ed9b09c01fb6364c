"""What is dropped, why, and what is the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from molecules import random_structures, without
from scipy.spatial.transform import Rotation

from runner.config import FilterConfig
from runner.errors import InputError
from runner.filters import blocks_of, dropped_structures, first_of_duplicates
from runner.self_energies import compositions
from runner.structures import Structures, concatenate

SIZES = [3, 1, 5, 2, 7, 4, 4, 6]


def _composition(structures: Structures) -> tuple[list[str], np.ndarray]:
    return compositions(structures.first_atom, structures.atoms["atomic_numbers"])


def _dropped(structures: Structures, **settings: Any) -> dict[str, list[int]]:
    config = FilterConfig.model_validate(settings)
    found = dropped_structures(structures, config, *_composition(structures))
    return {reason: rows.tolist() for reason, rows in found.items()}


def _rows(structures: Structures, index: int) -> slice:
    return slice(structures.first_atom[index], structures.first_atom[index + 1])


def test_each_filter_equals_a_naive_computation() -> None:
    structures = random_structures(SIZES, seed=3)
    forces, numbers = structures.atoms["forces"], structures.atoms["atomic_numbers"]
    energy, charge = structures.structures["energy"], structures.structures["total_charge"]
    every = range(len(SIZES))
    assert _dropped(structures) == {}
    has_n = [i for i in every if 7 in numbers[_rows(structures, i)]]
    assert _dropped(structures, elements=["H", "C", "O"]) == {"elements other than H, C, O": has_n}
    assert _dropped(structures, min_atoms=3) == {"fewer than 3 atoms": [1, 3]}
    assert _dropped(structures, max_atoms=5) == {"more than 5 atoms": [4, 7]}
    longest = [np.linalg.norm(forces[_rows(structures, i)], axis=1).max() for i in every]
    strong = [i for i in every if longest[i] > 2.5]
    assert 0 < len(strong) < len(SIZES)
    assert _dropped(structures, max_force="2.5 eV/angstrom") == {"a force above 2.5 eV/Å": strong}
    low = [i for i in every if energy[i] / SIZES[i] < -0.1]
    assert _dropped(structures, min_energy_per_atom="-100 meV") == {
        "an energy below -0.1 eV an atom": low
    }
    high = [i for i in every if energy[i] / SIZES[i] > 0.1]
    assert _dropped(structures, max_energy_per_atom="0.1 eV") == {
        "an energy above 0.1 eV an atom": high
    }
    ions = [i for i in every if charge[i] not in (0, 1)]
    assert _dropped(structures, total_charge=[0, 1]) == {"a charge other than 0, 1 e": ions}


def test_a_structure_is_counted_once_by_its_first_reason() -> None:
    structures = random_structures(SIZES, seed=3)
    found = _dropped(structures, min_atoms=3, max_atoms=5, max_force="0.001 eV/angstrom")
    rows = [row for reason in found.values() for row in reason]
    assert sorted(rows) == list(range(len(SIZES)))
    assert found["fewer than 3 atoms"] == [1, 3]


def test_a_structure_without_the_label_of_a_filter_is_kept() -> None:
    structures = random_structures(SIZES, seed=3)
    for name in ("forces", "energy", "total_charge"):
        structures = without(structures, name, [0, 4])
    limits = {"max_force": "0.001 eV/angstrom", "min_energy_per_atom": "1e9 eV"}
    found = _dropped(structures, **limits, total_charge=[5])
    assert not {0, 4} & {row for rows in found.values() for row in rows}


@pytest.mark.parametrize(
    ("settings", "name", "key"),
    [
        ({"max_force": "1 eV/angstrom"}, "forces", "max_force"),
        ({"total_charge": [0]}, "total_charge", "total_charge"),
        ({"max_energy_per_atom": "1 eV"}, "energy", "energy_per_atom"),
    ],
)
def test_a_filter_of_a_label_that_nobody_maps_is_refused(
    settings: dict[str, Any], name: str, key: str
) -> None:
    structures = random_structures([2, 3])
    bare = replace(
        structures,
        atoms={k: v for k, v in structures.atoms.items() if k != name},
        structures={k: v for k, v in structures.structures.items() if k != name},
    )
    with pytest.raises(InputError, match=rf"no source has the label {name}(.|\n)*filter.{key}"):
        _dropped(bare, **settings)


def test_blocks_cover_everything_once() -> None:
    sizes = np.array([3, 9, 1, 1, 20, 2])
    found = list(blocks_of(sizes, at_once=10))
    assert found == [(0, 1), (1, 3), (3, 4), (4, 5), (5, 6)]
    assert list(blocks_of(np.zeros(0, np.int64))) == []


def _copy_of(structures: Structures, index: int, seed: int) -> Structures:
    """One structure turned, moved, with its atoms in another order."""
    one = structures.take(np.array([index]))
    rng = np.random.default_rng(seed)
    order = rng.permutation(one.n_atoms)
    turn = Rotation.random(rng=rng).as_matrix()
    atoms = {name: array[order] for name, array in one.atoms.items()}
    atoms["positions"] = atoms["positions"] @ turn.T + rng.normal(size=3)
    return replace(one, atoms=atoms)


def test_duplicates_are_found_turned_moved_and_permuted() -> None:
    structures = random_structures(SIZES, seed=3)
    copies = [_copy_of(structures, index, seed) for seed, index in enumerate((4, 0, 4))]
    every = concatenate([structures, *copies])
    chosen = np.arange(len(every))
    first = first_of_duplicates(every, chosen, _composition(every)[1])
    assert first.tolist() == [*range(8), 4, 0, 4]
    assert _dropped(every, duplicates="drop") == {"duplicates": [8, 9, 10]}
    backwards = first_of_duplicates(every, chosen[::-1].copy(), _composition(every)[1])
    assert backwards.tolist() == [0, 1, 0, 3, 4, 5, 0, 7, 8, 9, 1]


@pytest.mark.parametrize("change", ["energy", "position", "element"])
def test_what_differs_is_no_duplicate(change: str) -> None:
    structures = random_structures([5], seed=1)
    other = _copy_of(structures, 0, 1)
    if change == "energy":
        other.structures["energy"][0] += 1e-4
    elif change == "position":
        other.atoms["positions"][2, 1] += 1e-3
    else:
        i, j = np.flatnonzero(np.diff(other.atoms["atomic_numbers"]))[0] + np.array([0, 1])
        other.atoms["atomic_numbers"][[i, j]] = other.atoms["atomic_numbers"][[j, i]]
    every = concatenate([structures, other])
    assert first_of_duplicates(every, np.arange(2), _composition(every)[1]).tolist() == [0, 1]


def test_without_energies_geometry_alone_decides() -> None:
    structures = without(random_structures([5, 5, 4], seed=1), "energy", [0, 1, 2])
    every = concatenate([structures, _copy_of(structures, 1, 0)])
    assert first_of_duplicates(every, np.arange(4), _composition(every)[1]).tolist() == [0, 1, 2, 1]


def test_the_same_places_in_another_cell_are_no_duplicate() -> None:
    one = random_structures([4], seed=1)
    cell = {"cell": np.eye(3)[None] * 9, "pbc": np.ones((1, 3), bool)}
    parts = [
        replace(one, structures=one.structures | cell | {"cell": cell["cell"] * scale})
        for scale in (1.0, 1.1, 1.0)
    ]
    every = concatenate(parts)
    assert first_of_duplicates(every, np.arange(3), _composition(every)[1]).tolist() == [0, 1, 0]
