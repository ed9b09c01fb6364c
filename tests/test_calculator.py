"""The ASE calculator and the predictor under it: absolute energies, forces, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.fd import calculate_numerical_stress
from molecules import SELF_ENERGIES, springs, write_experiment

from runner.batches import make_batch
from runner.calculator import NNPCalculator
from runner.config import load_config
from runner.errors import InputError, RunError, SelfEnergyError
from runner.predictor import Predictor
from runner.prepare import prepare
from runner.terminal import Terminal
from runner.train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experiment")
    config_file = write_experiment(folder)
    config = load_config(config_file)
    prepare(config, folder / "prepared", Terminal())
    return Path(train(config, config_file, folder / "prepared", Terminal(), [])["run"])


def _atoms() -> Atoms:
    return Atoms("OCH2", [[0, 0, 1.2], [0, 0, 0], [0.95, 0, -0.5], [-0.95, 0, -0.5]])


def test_energies_are_absolute(run: Path) -> None:
    atoms = _atoms()
    atoms.calc = NNPCalculator(run)
    expected = sum(SELF_ENERGIES[z] for z in atoms.numbers)  # −3,100 eV; the springs hold a few
    assert atoms.get_potential_energy() == pytest.approx(expected, abs=30)
    assert atoms.calc.results["dipole"].shape == (3,)
    charges = atoms.get_charges()
    assert atoms.get_dipole_moment() == pytest.approx(charges @ atoms.positions, abs=1e-5)


def test_self_energies_are_added_in_double_precision(run: Path) -> None:
    predictor = Predictor.load(run)
    structures = springs(seed=5, n=8)
    absolute = predictor.predict(structures)["energy"]
    relative = predictor.potential(make_batch(structures, predictor.potential.cutoff))["energy"]
    z, first = structures.atoms["atomic_numbers"], structures.first_atom
    values = {Atoms(symbol).numbers[0]: e for symbol, e in predictor.fit.values.items()}
    for index in range(8):
        offset = sum(values[a] for a in z[first[index] : first[index + 1]])
        expected = float(relative[index].detach().double()) + offset
        assert absolute[index] == pytest.approx(expected, abs=1e-9)
    assert absolute.dtype == np.float64


def test_forces_are_minus_the_gradient_of_the_energy(run: Path) -> None:
    calculator = NNPCalculator(run)
    calculator.predictor.potential.double()
    atoms = _atoms()
    atoms.calc = calculator
    forces = atoms.get_forces()
    for atom, axis in np.ndindex(4, 3):
        energies = []
        for step in (1e-4, -1e-4):
            moved = atoms.copy()
            moved.positions[atom, axis] += step
            moved.calc = calculator
            energies.append(moved.get_potential_energy())
        assert forces[atom, axis] == pytest.approx(-(energies[0] - energies[1]) / 2e-4, abs=1e-5)


def test_an_element_that_was_never_trained_is_refused_by_name(run: Path) -> None:
    atoms = Atoms("OS", [[0, 0, 0], [0, 0, 1.5]], calculator=NNPCalculator(run))
    with pytest.raises(SelfEnergyError, match=r"S in OS(.|\n)*H, C, N, O"):
        atoms.get_potential_energy()


def test_the_stress_of_a_crystal_is_in_ases_sign_and_order(run: Path) -> None:
    atoms = Atoms("OCH", [[0.1, 0, 0], [1.2, 0.3, 0.2], [0.2, 1.6, 3.9]], pbc=True)
    atoms.set_cell([[3.1, 0, 0], [0.6, 3.3, 0], [-0.4, 0.5, 3.6]])
    atoms.calc = NNPCalculator(run)
    atoms.calc.predictor.potential.double()
    expected = calculate_numerical_stress(atoms, eps=1e-5)
    assert atoms.get_stress() == pytest.approx(expected, abs=1e-6)
    assert np.abs(expected).max() > 1e-3
    isolated = _atoms()
    isolated.calc = atoms.calc
    with pytest.raises(PropertyNotImplementedError):
        isolated.get_stress()


def test_a_run_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no checkpoint at .*best.ckpt(.|\n)*a run directory"):
        NNPCalculator(tmp_path)


def test_a_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "x.ckpt")
    with pytest.raises(RunError, match="not written by this version"):
        Predictor.load(tmp_path / "x.ckpt")


def test_without_charges_the_calculator_offers_none(tmp_path: Path) -> None:
    config_file = write_experiment(tmp_path)
    config_file.write_text(config_file.read_text().replace("[train.loss.dipole]\n", ""))
    config = load_config(config_file, ["train.epochs=1"])
    prepare(config, tmp_path / "prepared", Terminal())
    result = train(config, config_file, tmp_path / "prepared", Terminal(), [])
    assert NNPCalculator(result["run"]).implemented_properties == [
        "energy",
        "free_energy",
        "forces",
        "stress",
    ]


def test_atoms_that_are_nowhere_have_no_energy(run: Path) -> None:
    atoms = _atoms()
    atoms.positions[1] = np.nan
    atoms.calc = NNPCalculator(run)
    with pytest.raises(InputError, match=r"positions are not finite(.|\n)*OCH2"):
        atoms.get_potential_energy()
    nothing = Atoms(calculator=NNPCalculator(run))
    with pytest.raises(InputError, match="there are no atoms"):
        nothing.get_potential_energy()
