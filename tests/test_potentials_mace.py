"""The adapter of MACE against mace-torch itself, with the same weights, in float64."""

from __future__ import annotations

import importlib.util
import io
import os
import subprocess
import sys
from dataclasses import replace

import ase
import numpy as np
import pytest
import torch
from ase.data import atomic_numbers
from molecules import random_structures

from runner.batches import make_batch
from runner.config import LossConfig, potential_config
from runner.conformance import examine
from runner.errors import ConfigError, InputError
from runner.losses import Loss
from runner.potentials import Potential, build_potential
from runner.potentials.mace import UNSAFE
from runner.structures import Structures, concatenate

FRESH = """
import os
from runner.config import potential_config
from runner.potentials import build_potential

config = potential_config({"name": "mace", "features": 2, "max_ell": 1})
build_potential(config, ["forces"], {}, ["H"])
assert "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" not in os.environ
"""
ELEMENTS = ["O", "H", "C", "N"]
CUTOFF = 4.0
TABLE = {"name": "mace", "cutoff": "4 angstrom", "features": 4, "max_ell": 2, "max_l": 1}


def _built(**more: object) -> Potential:
    if importlib.util.find_spec("mace") is None:  # importing it would hide what the adapter lacks
        pytest.skip("mace-torch is not installed: the extra `mace`")
    torch.manual_seed(0)
    config = potential_config(TABLE | more)
    return build_potential(config, ["energy", "forces"], {"energy_per_atom_std": 0.7}, ELEMENTS)


def _crystal() -> Structures:
    atoms = {
        "atomic_numbers": np.array([6, 1, 8], np.uint8),
        "positions": np.array([[0.1, 0, 0], [1.2, 0.3, 0.2], [0.2, 1.6, 3.9]]),
    }
    cell = np.array([[[3.1, 0, 0], [0.6, 3.3, 0], [-0.4, 0.5, 3.6]]])
    return Structures(np.array([0, 3]), atoms, {"cell": cell, "pbc": np.ones((1, 3), bool)})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of mace-torch's own data pipeline
def test_energies_and_forces_are_those_of_mace_torch() -> None:
    potential = _built().double().eval()
    from mace.data import AtomicData, config_from_atoms
    from mace.tools import AtomicNumberTable
    from mace.tools.torch_geometric import Batch as Graphs

    molecules = random_structures([5, 3, 7])
    mixed = concatenate([molecules, _crystal()])
    found = potential(make_batch(mixed, CUTOFF, torch.float64), stress=True)
    table = AtomicNumberTable(sorted(atomic_numbers[symbol] for symbol in ELEMENTS))
    given = []
    torch.set_default_dtype(torch.float64)
    try:
        for s in range(4):
            rows = slice(mixed.first_atom[s], mixed.first_atom[s + 1])
            atoms = ase.Atoms(mixed.atoms["atomic_numbers"][rows], mixed.atoms["positions"][rows])
            if mixed.structures["pbc"][s].any():
                atoms.set_cell(mixed.structures["cell"][s])
                atoms.pbc = True
            given.append(AtomicData.from_config(config_from_atoms(atoms), table, CUTOFF))
        graph = Graphs.from_data_list(given).to_dict()
    finally:
        torch.set_default_dtype(torch.float)
    network, scale = potential.architecture.network, float(potential.energy.scale)
    expected = network(graph, compute_force=True, compute_stress=True)
    assert found["energy"].tolist() == pytest.approx(
        (scale * expected["energy"]).tolist(), rel=1e-9
    )
    off = (found["forces"] - scale * expected["forces"]).abs().max()
    assert off < 1e-9 * found["forces"].abs().max()
    stress = scale * expected["stress"][3]
    assert (found["stress"][3] - stress).abs().max() < 1e-9 * stress.abs().max()


@pytest.mark.slow
def test_it_conforms() -> None:
    findings = examine(_built(), ELEMENTS)
    assert [(f.check, f.detail) for f in findings if f.passed is False] == []


@pytest.mark.slow
def test_it_is_built_where_nothing_imported_mace_before() -> None:
    if importlib.util.find_spec("mace") is None:
        pytest.skip("mace-torch is not installed: the extra `mace`")
    environment = {k: v for k, v in os.environ.items() if k != UNSAFE}
    command = [sys.executable, "-c", FRESH]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""  # it may be that of --json
    assert "Warning" not in done.stderr


@pytest.mark.slow
def test_a_few_steps_on_energies_and_forces_lower_the_loss() -> None:
    potential = _built().double().train()
    structures = random_structures([4, 5, 6])
    rng = np.random.default_rng(0)
    labels = {"forces": rng.normal(0, 0.1, structures.atoms["positions"].shape)}
    energies = {"energy": rng.normal(0, 0.1, 3)}
    labelled = replace(
        structures, atoms=structures.atoms | labels, structures=structures.structures | energies
    )
    batch = make_batch(labelled, CUTOFF, torch.float64)
    loss = Loss(LossConfig.model_validate({"energy": {}, "forces": {}}))
    optimizer, values = torch.optim.Adam(potential.parameters(), lr=0.01), []
    for _ in range(10):
        terms = loss(potential(batch), batch)
        optimizer.zero_grad()
        sum(terms[name] for name in ("energy", "forces")).backward()
        optimizer.step()
        values.append({name: terms[name].item() for name in ("energy", "forces")})
    assert values[-1]["forces"] < values[0]["forces"]
    assert sum(values[-1].values()) < sum(values[0].values())


@pytest.mark.slow
def test_its_weights_go_through_a_file() -> None:
    first, second, file = _built(), _built(), io.BytesIO()
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.mul_(1.1)
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    batch = make_batch(random_structures([5]), CUTOFF)
    assert torch.equal(first.eval()(batch)["forces"], second.eval()(batch)["forces"])


@pytest.mark.slow
def test_an_element_that_it_was_not_built_for_is_named() -> None:
    batch = make_batch(random_structures([4], elements=(1, 17)), CUTOFF)
    with pytest.raises(InputError, match=r"it was not built for Cl(.|\n)*allowed: +H C N O"):
        _built()(batch)


def test_without_mace_torch_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("mace", "e3nn"):
        monkeypatch.setitem(sys.modules, module, None)
    text = r"mace cannot be built: (.|\n)*pip install 'nnp-runner\[mace\]'"
    with pytest.raises(ConfigError, match=text):
        build_potential(potential_config(TABLE), ["energy"], {}, ELEMENTS)
