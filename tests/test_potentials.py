"""Potentials and their pieces; the laws of physics are asked in test_conformance.py."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from molecules import random_structures

from runner.batches import make_batch
from runner.config import ARCHITECTURES, LossConfig, PaiNNConfig, potential_config
from runner.losses import Loss
from runner.potentials import POTENTIALS, Potential, build_potential
from runner.potentials.components import (
    BesselBasis,
    ExpNormalBasis,
    GaussianBasis,
    ShiftedSoftplus,
    cosine_cutoff,
)
from runner.potentials.physics import charge_moments
from runner.potentials.tensornet import Matrices, matrix_product, part_norms
from runner.structures import Structures, concatenate

CUTOFF = 4.0


@pytest.fixture(scope="module", params=list(POTENTIALS))
def potential(request: pytest.FixtureRequest) -> Potential:
    torch.manual_seed(0)
    config = potential_config(
        {"name": request.param, "cutoff": "4 angstrom", "features": 16, "radial_basis": 8}
    )
    built = build_potential(config, ["energy", "forces", "dipole"], {"energy_per_atom_std": 0.7})
    return built.double().eval()


def _predict(potential: Potential, structures: Structures) -> dict[str, np.ndarray]:
    batch = make_batch(structures, CUTOFF, torch.float64)
    return {name: value.detach().numpy() for name, value in potential(batch).items()}


def _moved(structures: Structures, positions: np.ndarray) -> Structures:
    return replace(structures, atoms=structures.atoms | {"positions": positions})


def _of(numbers: list[int], positions: list[list[float]]) -> Structures:
    atoms = {
        "atomic_numbers": np.array(numbers, np.uint8),
        "positions": np.array(positions, np.float64),
    }
    return Structures(np.array([0, len(numbers)]), atoms, {})


def _crystal(pbc: tuple[bool, bool, bool] = (True, True, True)) -> Structures:
    """Three atoms in a triclinic cell that is smaller than the cutoff."""
    atoms = {
        "atomic_numbers": np.array([6, 1, 8], np.uint8),
        "positions": np.array([[0.1, 0, 0], [1.2, 0.3, 0.2], [0.2, 1.6, 3.9]]),
    }
    cell = np.array([[[3.1, 0, 0], [0.6, 3.3, 0], [-0.4, 0.5, 3.6]]])
    return Structures(np.array([0, 3]), atoms, {"cell": cell, "pbc": np.array([pbc])})


def test_molecules_and_crystals_in_one_batch(potential: Potential) -> None:
    none = {"cell": np.zeros((1, 3, 3)), "pbc": np.zeros((1, 3), bool)}
    molecule = replace(_of([8, 1], [[0, 0, 0], [0.9, 0, 0.2]]), structures=none)
    crystal = _crystal()
    batch = make_batch(concatenate([molecule, crystal]), CUTOFF, torch.float64)
    together = potential(batch, stress=True)
    alone = potential(make_batch(crystal, CUTOFF, torch.float64), stress=True)
    free = _predict(potential, _of([8, 1], [[0, 0, 0], [0.9, 0, 0.2]]))
    assert together["stress"][0].isnan().all()  # a molecule has no volume
    assert torch.allclose(together["stress"][1], alone["stress"][0])
    assert together["energy"].tolist() == pytest.approx(
        [free["energy"][0], alone["energy"].item()], abs=1e-11
    )
    assert torch.allclose(together["forces"][2:], alone["forces"])


def test_the_stress_can_be_trained_on_beside_molecules(potential: Potential) -> None:
    none = {"cell": np.zeros((1, 3, 3)), "pbc": np.zeros((1, 3), bool)}
    molecule = replace(_of([8, 1], [[0, 0, 0], [0.9, 0, 0.2]]), structures=none)
    labels = {"stress": np.full((1, 3, 3), 0.1)}
    crystal = replace(_crystal(), structures=_crystal().structures | labels)
    batch = make_batch(concatenate([molecule, crystal]), CUTOFF, torch.float64)
    loss = Loss(LossConfig.model_validate({"stress": {}}))
    try:
        value = loss(potential.train()(batch, stress=True), batch)["stress"]
    finally:
        potential.eval()
    predicted = potential(batch, stress=True)["stress"][1]
    assert value.item() == pytest.approx((predicted - 0.1).square().mean().item())
    gradients = torch.autograd.grad(value, list(potential.parameters()), allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in gradients)
    assert any(g is not None and g.abs().max() > 0 for g in gradients)


def test_the_graph_of_the_forces_is_kept_only_in_training(potential: Potential) -> None:
    batch = make_batch(random_structures([3]), CUTOFF, torch.float64)
    assert not potential.eval()(batch)["forces"].requires_grad
    try:
        assert potential.train()(batch)["forces"].requires_grad
    finally:
        potential.eval()


def test_forces_come_out_without_gradients_switched_on(potential: Potential) -> None:
    batch = make_batch(random_structures([3]), CUTOFF, torch.float64)
    with torch.no_grad():
        forces = potential(batch)["forces"]
        assert "forces" not in potential(batch, forces=False)
    assert torch.equal(forces, potential(batch)["forces"])


def test_charges_are_there_only_if_something_asks_for_them() -> None:
    config = PaiNNConfig(name="painn", features=8)
    batch = make_batch(random_structures([3]), CUTOFF)
    plain = build_potential(config, ["energy", "forces"], {})
    assert set(plain(batch)) == {"energy", "forces"}
    charged = build_potential(config, ["energy", "total_charge"], {})
    assert set(charged(batch)) == {"energy", "forces", "charges", "total_charge", "dipole"}


def test_moments_of_charges_equal_a_loop() -> None:
    structures = random_structures([3, 4])
    batch = make_batch(structures, CUTOFF, torch.float64)
    charges = torch.randn(7, dtype=torch.float64)
    moments = charge_moments(batch, charges)
    for index, rows in enumerate((range(3), range(3, 7))):
        expected = sum(charges[i] * batch.positions[i] for i in rows)
        assert torch.allclose(moments["dipole"][index], torch.as_tensor(expected))
        assert torch.allclose(moments["total_charge"][index], charges[list(rows)].sum())


def test_the_bessel_basis_vanishes_at_the_cutoff_and_equals_its_formula() -> None:
    basis = BesselBasis(5, CUTOFF).double()
    distance = torch.linspace(0.5, CUTOFF, 9, dtype=torch.float64)
    expected = [
        [np.sin(n * np.pi * r / CUTOFF) / r for n in range(1, 6)] for r in distance.tolist()
    ]
    assert basis(distance).numpy() == pytest.approx(np.array(expected), abs=1e-6)
    assert basis(distance)[-1].abs().max() < 1e-6


def test_the_gaussian_basis_is_the_published_one_at_its_spacing() -> None:
    basis = GaussianBasis(31, 3.0).double()
    distance = torch.linspace(0.0, 3.0, 7, dtype=torch.float64)
    expected = np.exp(-10.0 * (distance.numpy()[:, None] - np.arange(31) / 10) ** 2)
    assert basis(distance).numpy() == pytest.approx(expected, abs=1e-6)
    assert GaussianBasis(1, 3.0)(torch.zeros(2)).tolist() == [[1.0], [1.0]]


def test_the_shifted_softplus_equals_its_formula_and_has_two_slopes() -> None:
    x = torch.linspace(-30, 30, 13, dtype=torch.float64, requires_grad=True)
    values = ShiftedSoftplus()(x)
    expected = np.log(0.5 * np.exp(x.detach().numpy()) + 0.5)
    assert values.detach().numpy() == pytest.approx(expected, abs=1e-8)
    assert torch.autograd.gradgradcheck(ShiftedSoftplus(), (x[4:9].detach().requires_grad_(),))


def test_the_exponential_normal_basis_equals_its_formula_and_has_no_subnormal_values() -> None:
    basis = ExpNormalBasis(32, CUTOFF)
    distance = torch.linspace(0.0, CUTOFF, 300)
    start = np.exp(-CUTOFF)
    closeness = np.exp(-5 * distance.numpy().astype(np.float64) / CUTOFF)[:, None]
    beta = (2 / 32 * (1 - start)) ** -2
    expected = np.exp(-beta * (closeness - np.linspace(start, 1, 32)) ** 2)
    values = basis(distance).numpy()
    assert values == pytest.approx(expected, abs=2e-5)
    assert (expected < np.finfo(values.dtype).tiny).any()
    assert values[values > 0].min() > 1e-18


def test_parts_of_matrices_are_the_trace_the_antisymmetric_and_the_traceless_symmetric() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 3, 2, dtype=torch.float64)
    matrices = Matrices().double()
    (t, a, s), eye = matrices.decompose(x), torch.eye(3, dtype=torch.float64)[:, :, None]
    trace = torch.einsum("niic->nc", x)[:, None, None] * eye / 3
    antisymmetric = (x - x.transpose(1, 2)) / 2
    parts = (trace, antisymmetric, (x + x.transpose(1, 2)) / 2 - trace)
    zeros = [torch.zeros_like(part) for part in (t, a, s)]
    for index, expected in enumerate(parts):
        alone = [part if n == index else zeros[n] for n, part in enumerate((t, a, s))]
        assert torch.allclose(matrices.compose((alone[0], alone[1], alone[2])), expected)
    norms = torch.cat([(part**2).sum((1, 2)) for part in parts], dim=-1)
    assert torch.allclose(part_norms((t, a, s)), norms)


def test_the_product_of_matrices_and_its_two_slopes() -> None:
    torch.manual_seed(0)
    x, y = (torch.randn(2, 3, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.allclose(matrix_product(x, y), torch.einsum("nijc,njkc->nikc", x, y))
    assert torch.autograd.gradcheck(matrix_product, (x, y))
    assert torch.autograd.gradgradcheck(matrix_product, (x, y))


def test_the_cutoff_function_and_its_slope_vanish_at_the_cutoff() -> None:
    r = torch.tensor([0.0, 2.0, CUTOFF, 5.0], dtype=torch.float64, requires_grad=True)
    values = cosine_cutoff(r, CUTOFF)
    assert values.tolist() == pytest.approx([1.0, 0.5, 0.0, 0.0], abs=1e-12)
    (slope,) = torch.autograd.grad(values.sum(), r)
    assert slope[2:].tolist() == pytest.approx([0.0, 0.0], abs=1e-12)


def test_the_table_of_potentials_equals_what_the_config_allows() -> None:
    allowed = [a.model_fields["name"].annotation.__args__[0] for a in ARCHITECTURES]  # type: ignore[union-attr]
    assert list(POTENTIALS) == allowed
