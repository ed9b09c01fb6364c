"""Terms of physics against their closed forms, pair by pair."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from molecules import random_structures
from torch import Tensor

from runner.batches import Batch, make_batch
from runner.config import EnergyConfig, potential_config
from runner.errors import DatasetError
from runner.potentials import Potential, build_potential, strained
from runner.potentials.components import half_pair_vectors
from runner.potentials.physics import (
    BOHR,
    COULOMB,
    ZBL,
    AtomicEnergies,
    DampedCoulomb,
    charge_moments,
    equalised,
    quintic_cutoff,
)
from runner.structures import Structures

CUTOFF = 4.0
SIZES = [2, 5, 1, 4]


def _mixed(elements: tuple[int, ...] = (1, 6, 17, 79)) -> Structures:
    return random_structures(SIZES, seed=3, elements=elements)


def _by_pairs(
    structures: Structures, energy: Callable[[int, int, float], tuple[float, float]]
) -> tuple[np.ndarray, np.ndarray]:
    """Energies and forces of a pair law, from its value and its slope, by a loop."""
    energies = np.zeros(len(structures))
    forces = np.zeros((structures.n_atoms, 3))
    positions = structures.atoms["positions"]
    for s in range(len(structures)):
        for i in range(structures.first_atom[s], structures.first_atom[s + 1]):
            for j in range(structures.first_atom[s], i):
                separation = positions[i] - positions[j]
                r = float(np.linalg.norm(separation))
                value, slope = energy(i, j, r)
                energies[s] += value
                forces[i] -= slope * separation / r
                forces[j] += slope * separation / r
    return energies, forces


def _found(batch: Batch, per_atom: Callable[[Batch], Tensor]) -> tuple[np.ndarray, np.ndarray]:
    positions = batch.positions.clone().requires_grad_()
    energy = batch.sum_by_structure(per_atom(batch.at(positions)))
    (gradient,) = torch.autograd.grad(energy.sum(), positions)
    return energy.detach().numpy(), -gradient.numpy()


def _quintic(r: float, cutoff: float) -> tuple[float, float]:
    x = r / cutoff
    if x >= 1:
        return 0.0, 0.0
    return 1 - 6 * x**5 + 15 * x**4 - 10 * x**3, (-30 * x**4 + 60 * x**3 - 30 * x**2) / cutoff


def test_the_repulsion_of_nuclei_is_that_of_each_pairs_own_elements() -> None:
    structures = _mixed()
    z = structures.atoms["atomic_numbers"].astype(float)

    def law(i: int, j: int, r: float) -> tuple[float, float]:
        a = 0.8854 * 0.52917721 / (z[i] ** 0.23 + z[j] ** 0.23)
        weights, rates = np.array(ZBL.WEIGHTS), np.array(ZBL.RATES)
        terms = weights * np.exp(-rates * r / a)
        phi, slope = terms.sum(), -(rates / a * terms).sum()
        bare = 14.399645 * z[i] * z[j] / r
        cut, cut_slope = _quintic(r, CUTOFF)
        return bare * phi * cut, bare * (slope * cut - phi * cut / r + phi * cut_slope)

    expected = _by_pairs(structures, law)
    found = _found(make_batch(structures, CUTOFF, torch.float64), ZBL(CUTOFF))
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found[1] == pytest.approx(expected[1], rel=1e-5, abs=1e-6)
    assert expected[0].max() > 1


def test_two_carbon_atoms_repel_as_published_screening_says() -> None:
    # x = 1 where r = a: the screening function is the sum of its four exponentials there
    a = 0.8854 * BOHR / (2 * 6**0.23)
    structures = Structures(
        np.array([0, 2]),
        {
            "atomic_numbers": np.array([6, 6], np.uint8),
            "positions": np.array([[0, 0, 0], [a, 0, 0]]),
        },
        {},
    )
    energy, _ = _found(make_batch(structures, 100.0, torch.float64), ZBL(1e4))
    phi = sum(w * np.exp(-b) for w, b in zip(ZBL.WEIGHTS, ZBL.RATES, strict=True))
    assert phi == pytest.approx(0.4164, abs=1e-4)
    assert energy[0] == pytest.approx(36 * COULOMB / a * phi, rel=1e-9)


@pytest.mark.parametrize("far", [np.inf, 6.0])
def test_the_coulomb_energy_is_damped_near_and_exact_further_away(far: float) -> None:
    structures = _mixed()
    charges = structures.atoms["charges"]

    def law(i: int, j: int, r: float) -> tuple[float, float]:
        def inverse(x: float) -> tuple[float, float]:
            if np.isinf(far):
                return 1 / x, -1 / x**2
            return 1 / x + x / far**2 - 2 / far, -1 / x**2 + 1 / far**2

        root = np.sqrt(r * r + 1)
        damped, damped_slope = inverse(root)
        bare, bare_slope = inverse(r)
        phi, phi_slope = _quintic(2 * r, CUTOFF)
        chi = phi * damped + (1 - phi) * bare
        slope = 2 * phi_slope * (damped - bare) + phi * damped_slope * r / root
        slope += (1 - phi) * bare_slope
        factor = 14.399645 * charges[i] * charges[j] * (r < far)
        return factor * chi, factor * slope

    expected = _by_pairs(structures, law)
    given = torch.as_tensor(charges)
    coulomb = DampedCoulomb(CUTOFF, far)
    batch = make_batch(structures, min(far, 100.0), torch.float64, near=CUTOFF)
    found = _found(batch, lambda b: coulomb(b, given))
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found[1] == pytest.approx(expected[1], rel=1e-5, abs=1e-6)
    assert abs(expected[0]).max() > 1


def test_two_ions_far_apart_attract_by_coulombs_law() -> None:
    structures = Structures(
        np.array([0, 2]),
        {
            "atomic_numbers": np.array([11, 17], np.uint8),
            "positions": np.array([[0, 0, 0], [0, 0, 30.0]]),
        },
        {},
    )
    batch = make_batch(structures, np.inf, torch.float64, near=CUTOFF)
    assert batch.pairs.shape == (2, 2)
    assert batch.nearest().pairs.shape == (2, 0)
    charges = torch.tensor([1.0, -1.0], dtype=torch.float64)
    energy, forces = _found(batch, lambda b: DampedCoulomb(CUTOFF)(b, charges))
    assert energy[0] == pytest.approx(-14.399645 / 30, rel=1e-6)
    assert forces[0, 2] == pytest.approx(14.399645 / 900, rel=1e-6)


def test_the_quintic_cutoff_ends_with_slope_and_curvature() -> None:
    r = torch.tensor([0.0, 2.0, CUTOFF - 1e-9, 5.0], dtype=torch.float64, requires_grad=True)
    values = quintic_cutoff(r, CUTOFF)
    assert values.tolist() == pytest.approx([1.0, 0.5, 0.0, 0.0], abs=1e-12)
    (slope,) = torch.autograd.grad(values.sum(), r, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), r)
    assert slope[[0, 2, 3]].tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-12)
    assert curvature[[0, 2, 3]].tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-7)


def test_equalised_charges_sum_to_the_total_charge() -> None:
    structures = _mixed()
    batch = make_batch(structures, CUTOFF, torch.float64)
    free = torch.randn(sum(SIZES), dtype=torch.float64)
    found = equalised(free, batch)
    for s in range(len(SIZES)):
        rows = slice(structures.first_atom[s], structures.first_atom[s + 1])
        total = structures.structures["total_charge"][s]
        assert found[rows].sum().item() == pytest.approx(total, abs=1e-12)
        spread = found[rows] - free[rows]
        assert (spread - spread[0]).abs().max() < 1e-12


@pytest.mark.parametrize("convention", ["traced", "traceless"])
def test_quadrupoles_equal_a_loop(convention: str) -> None:
    structures = _mixed()
    batch = make_batch(structures, CUTOFF, torch.float64)
    charges = torch.as_tensor(structures.atoms["charges"])
    found = charge_moments(batch, charges, convention)["quadrupole"]  # type: ignore[arg-type]
    for s in range(len(SIZES)):
        expected = np.zeros((3, 3))
        for i in range(structures.first_atom[s], structures.first_atom[s + 1]):
            r = structures.atoms["positions"][i]
            expected += structures.atoms["charges"][i] * np.outer(r, r)
        if convention == "traceless":
            expected -= np.eye(3) * np.trace(expected) / 3
        assert found[s].numpy() == pytest.approx(expected, abs=1e-10)
    assert (abs(np.trace(found[1].numpy())) < 1e-10) == (convention == "traceless")


STATISTICS = {
    "energy_per_atom_std": 0.5,
    "energy_per_atom_mean": -0.25,
    "energy_by_element": {"H": -0.1, "O": 0.3},
    "forces_rms": 2.0,
    "forces_rms_by_element": {"H": 1.0, "O": 4.0},
}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"scale": "none"}, [1.0, 2.0, 3.0]),
        ({}, [0.5, 1.0, 1.5]),
        ({"shift": "one"}, [0.25, 0.75, 1.25]),
        ({"scale": "per_element"}, [0.25, 2.0, 1.5]),  # carbon was not in the data
        ({"scale": "none", "shift": "per_element"}, [0.9, 2.3, 3.0]),
    ],
)
@pytest.mark.parametrize("learnt", [False, True])
def test_energies_are_scaled_and_shifted(
    config: dict[str, object], expected: list[float], learnt: bool
) -> None:
    module = AtomicEnergies(EnergyConfig(**config, learnt=learnt), STATISTICS)  # type: ignore[arg-type]
    found = module(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1, 8, 6]))
    assert found.tolist() == pytest.approx(expected)
    assert [name for name, _ in module.named_parameters()] == ["scale", "shift"] * learnt
    assert set(module.state_dict()) == {"scale", "shift"}


@pytest.mark.parametrize("kind", ["one", "per_element"])
def test_scale_and_shift_are_as_exact_as_the_weights(kind: str) -> None:
    mean, std = -2841.123456789012, 1 / 3
    statistics = {
        "energy_per_atom_mean": mean,
        "energy_per_atom_std": std,
        "energy_by_element": {"H": mean},
        "forces_rms": 3.0,
        "forces_rms_by_element": {"H": 0.7},
    }
    table = {"name": "painn", "cutoff": "4 angstrom", "energy": {"scale": kind, "shift": kind}}
    built = build_potential(potential_config(table), ["energy"], statistics, dtype=torch.float64)
    energy, hydrogen = built.energy, torch.tensor([1])
    zero, one = (energy(torch.tensor([y], dtype=torch.float64), hydrogen) for y in (0.0, 1e6))
    assert zero.item() == pytest.approx(mean, rel=1e-15)
    slope = std if kind == "one" else std * 0.7 / 3.0
    assert (one - zero).item() == pytest.approx(1e6 * slope, rel=1e-12)
    assert {weight.dtype for weight in built.parameters()} == {torch.float64}


def test_a_statistic_that_is_not_there_is_named() -> None:
    text = r"no forces from which a value of each element(.|\n)*energy.scale(.|\n)*prepare again"
    with pytest.raises(DatasetError, match=text):
        AtomicEnergies(EnergyConfig(scale="per_element"), {"energy_per_atom_std": 1.0})
    with pytest.raises(DatasetError, match=r"no energies from which(.|\n)*energy.shift"):
        AtomicEnergies(EnergyConfig(shift="per_element"), {})


def _potential(more: dict[str, object]) -> Potential:
    torch.manual_seed(0)
    table = {"name": "painn", "cutoff": "4 angstrom", "features": 8, "radial_basis": 4} | more
    built = build_potential(potential_config(table), ["energy", "dipole"], {"forces_rms": None})
    return built.double().eval()


def test_terms_add_to_what_the_architecture_gives() -> None:
    structures = random_structures([12, 3, 20])
    plain = _potential({"charges": {"equalise": True}})
    full = _potential(
        {"charges": {"equalise": True}, "coulomb": {}, "zbl": {"cutoff": "2 angstrom"}}
    )
    assert (full.cutoff, full.near, plain.cutoff, plain.near) == (np.inf, 4.0, 4.0, None)
    batch = make_batch(structures, np.inf, torch.float64, near=CUTOFF)
    assert batch.half_near is not None
    assert 0 < len(batch.half_near) < batch.half_pairs.shape[1]
    alone = plain(make_batch(structures, CUTOFF, torch.float64))
    together = full(batch)
    terms = ZBL(2.0)(batch) + DampedCoulomb(CUTOFF)(batch, alone["charges"])
    expected = alone["energy"] + batch.sum_by_structure(terms)
    assert torch.allclose(together["energy"], expected, rtol=1e-12)
    assert torch.equal(together["charges"], alone["charges"])
    total = together["total_charge"].detach().numpy()
    assert total == pytest.approx(structures.structures["total_charge"])


def test_an_input_is_nothing_where_it_is_zero_and_has_a_sign() -> None:
    structures = replace(_mixed(), structures=_mixed().structures | {"total_charge": np.zeros(4)})
    told, plain = _potential({"inputs": ["total_charge"]}), _potential({})
    missing = told.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert all("electrons" in name for name in missing)
    energies = []
    for charge in (0.0, 1.0, -1.0):
        charged = {"total_charge": np.full(4, charge)}
        batch = make_batch(replace(structures, structures=charged), CUTOFF, torch.float64)
        energies.append(told(batch)["energy"].detach().numpy())
        if charge == 0:
            assert energies[0] == pytest.approx(plain(batch)["energy"].detach().numpy())
    assert min(abs(a - b).min() for a, b in itertools.pairwise(energies)) > 1e-6


def test_lengths_are_not_rounded_in_bfloat16() -> None:
    rng = np.random.default_rng(0)
    structures = random_structures([4, 5])
    cells = {
        "cell": np.eye(3) * 4 + rng.uniform(-0.5, 0.5, (2, 3, 3)),
        "pbc": np.ones((2, 3), bool),
    }
    periodic = Structures(structures.first_atom, structures.atoms, structures.structures | cells)
    batch = make_batch(periodic, 4.0)
    strain = torch.from_numpy(rng.normal(0, 0.01, (2, 3, 3))).float()
    expected, moved = half_pair_vectors(batch), strained(batch, strain)
    with torch.autocast("cpu", torch.bfloat16):
        found, moved_too = half_pair_vectors(batch), strained(batch, strain)
    assert batch.half_shifts is not None
    assert batch.half_shifts.abs().max() > 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(moved.positions, moved_too.positions)
    assert torch.equal(moved.cell, moved_too.cell)
