"""Potentials against other programs that have them, with the same weights, in float64.

The environment variable `RUNNER_PEERS_PYTHON` names a Python that has graph-pes 1.0.2.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from molecules import random_structures
from torch import nn

from runner.batches import make_batch
from runner.config import ArchitectureConfig, potential_config
from runner.potentials import Potential, build_potential
from runner.potentials.components import N_ELEMENTS, mlp
from runner.potentials.painn import PaiNN
from runner.potentials.schnet import SchNet
from runner.structures import Structures

CUTOFF, FEATURES, INTERACTIONS, BASIS, SCALE = 4.0, 12, 2, 9, 0.75

GRAPH_PES = f"""
import sys
import ase
import numpy as np
import torch
from graph_pes import AtomicGraph
from graph_pes.models import PaiNN, SchNet
from graph_pes.models.components.distances import CosineEnvelope

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
given = np.load(sys.argv[1])
model = MODEL
for name, parameter in model.named_parameters():
    if "linear" in name:
        parameter.data.mul_(2.5)  # larger forces than from its initial weights
model.scaler.per_element_scaling.data.fill_({SCALE})
state = {{k: v.numpy() for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}}
state = {{k: v for k, v in state.items() if v.dtype == np.float64}}


class Smooth(torch.nn.Module):
    def __init__(self, filters):
        super().__init__()
        self.filters = filters
        self.envelope = CosineEnvelope({CUTOFF})

    def forward(self, r):
        return self.filters(r.unsqueeze(-1)) * self.envelope(r).unsqueeze(-1)


if ENVELOPE:
    for interaction in model.interactions:
        if isinstance(model, PaiNN):
            interaction.filter_generator.components[1] = CosineEnvelope({CUTOFF})
        else:
            interaction.cfconv.filter_generator = Smooth(interaction.cfconv.filter_generator)
energies, forces = [], []
for s, (first, last) in enumerate(zip(given["first_atom"], given["first_atom"][1:])):
    atoms = ase.Atoms(given["atomic_numbers"][first:last], given["positions"][first:last])
    if "cell" in given:
        atoms.set_cell(given["cell"][s])
        atoms.set_pbc(given["pbc"][s])
    predicted = model.predict(AtomicGraph.from_ase(atoms, {CUTOFF}), ["energy", "forces"])
    energies.append(predicted["energy"].item())
    forces.append(predicted["forces"].detach().numpy())
np.savez(sys.argv[2], energy=np.array(energies), forces=np.concatenate(forces), **state)
"""


SCHNET = f"SchNet({CUTOFF}, channels={FEATURES}, expansion_features={BASIS}, layers={INTERACTIONS})"
PAINN = f"PaiNN({FEATURES}, {BASIS}, {INTERACTIONS}, {CUTOFF})"


def _peer(script: str, structures: Structures, folder: Path) -> dict[str, np.ndarray]:
    """What the script makes of some structures, and the weights that it did it with."""
    python = os.environ.get("RUNNER_PEERS_PYTHON")
    if not python:
        pytest.skip("RUNNER_PEERS_PYTHON does not name a Python that has graph-pes")
    if subprocess.run([python, "-c", "import graph_pes"], capture_output=True).returncode:
        pytest.skip(f"graph-pes cannot be imported by {python}")
    arrays = structures.atoms | structures.structures
    np.savez(folder / "given.npz", first_atom=structures.first_atom, **arrays)
    files = [str(folder / "given.npz"), str(folder / "found.npz")]
    done = subprocess.run([python, "-c", script, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(np.load(folder / "found.npz"))


def _config(name: str) -> ArchitectureConfig:
    settings = {"features": FEATURES, "interactions": INTERACTIONS, "radial_basis": BASIS}
    return potential_config({"name": name, "cutoff": f"{CUTOFF} angstrom", **settings})


def _painn(found: dict[str, np.ndarray]) -> Potential:
    """Ours with graph-pes' weights, every one of which has to be used."""
    statistics = {"energy_per_atom_std": SCALE}
    potential = build_potential(_config("painn"), ["energy", "forces"], statistics)
    ours = potential.architecture
    assert isinstance(ours, PaiNN)
    ours.readouts["energies"] = mlp(FEATURES, FEATURES, 1)  # wider there
    potential = potential.double().eval()
    left = {k: torch.from_numpy(v) for k, v in found.items() if k not in ("energy", "forces")}
    left = {k: v for k, v in left.items() if k.partition(".")[2]}  # not cutoffs of the whole
    embeddings = left.pop("z_embedding._embeddings")
    ours.embedding.elements.weight.data = embeddings[:N_ELEMENTS]
    weights, biases = [], []

    def take(theirs: str, layers: nn.Sequential) -> None:
        for k, layer in enumerate((layers[0], layers[2])):
            layer.weight.data = left.pop(f"{theirs}.linear_layers.{k}.weight")
            layer.bias.data = left.pop(f"{theirs}.linear_layers.{k}.bias")

    for t, (message, update) in enumerate(zip(ours.messages, ours.updates, strict=True)):
        filters = f"interactions.{t}.filter_generator.components."
        normalised = (2 / CUTOFF) ** 0.5  # their basis
        weights.append(left.pop(filters + "0.1.weight") * normalised)
        biases.append(left.pop(filters + "0.1.bias"))
        ours.basis.frequencies = left.pop(filters + "0.0.frequencies")
        assert left.pop(filters + "0.0.cutoff") == CUTOFF
        left.pop(filters + "1.coefficients", None)  # of the envelope that is replaced
        left.pop(filters + "1.powers", None)
        take(f"interactions.{t}.Phi", message.phi)
        u, v = (left.pop(f"updates.{t}.{name}._linear.weight") for name in "UV")
        update.mix.weight.data = torch.cat([u, v])
        take(f"updates.{t}.mlp", update.a)
        for tensor in (update.a[2].weight, update.a[2].bias):  # a_vv, a_ss, a_sv there
            vv, ss, sv = tensor.data.chunk(3)
            tensor.data = torch.cat([vv, sv, ss])
    ours.filters[0].weight.data, ours.filters[0].bias.data = torch.cat(weights), torch.cat(biases)
    take("read_out", ours.readouts["energies"])
    assert set(left) == {"scaler.per_element_scaling"}
    return potential


def _schnet(found: dict[str, np.ndarray]) -> Potential:
    """Ours with graph-pes' weights, every one of which has to be used."""
    potential = build_potential(
        _config("schnet"), ["energy", "forces"], {"energy_per_atom_std": SCALE}
    )
    potential = potential.double().eval()
    ours = potential.architecture
    assert isinstance(ours, SchNet)
    left = {k: torch.from_numpy(v) for k, v in found.items() if k not in ("energy", "forces")}
    left = {k: v for k, v in left.items() if k.partition(".")[2]}  # not cutoffs of the whole
    embeddings = left.pop("chemical_embedding._embeddings")
    ours.embedding.elements.weight.data = embeddings[:N_ELEMENTS]
    first_weights, first_biases = [], []
    for t, interaction in enumerate(ours.interactions):
        name = f"interactions.{t}."
        filters = name + "cfconv.filter_generator."
        interaction.before.weight.data = left.pop(name + "linear.weight")
        for k, layer in enumerate((interaction.after[0], interaction.after[2])):
            layer.weight.data = left.pop(f"{name}mlp.linear_layers.{k}.weight")
            layer.bias.data = left.pop(f"{name}mlp.linear_layers.{k}.bias")
        first_weights.append(left.pop(filters + "1.linear_layers.0.weight"))
        first_biases.append(left.pop(filters + "1.linear_layers.0.bias"))
        ours.filters.weight.data[t] = left.pop(filters + "1.linear_layers.1.weight").T
        ours.filters.bias.data[t, 0] = left.pop(filters + "1.linear_layers.1.bias")
        ours.basis.centers = left.pop(filters + "0.centers")
        ours.basis.gamma = -left.pop(filters + "0.coef")
        assert left.pop(filters + "0.cutoff") == CUTOFF
    ours.filters.first.weight.data = torch.cat(first_weights)
    ours.filters.first.bias.data = torch.cat(first_biases)
    readout = ours.readouts["energies"]
    for k, layer in enumerate((readout[0], readout[2])):
        layer.weight.data = left.pop(f"read_out.linear_layers.{k}.weight")
        layer.bias.data = left.pop(f"read_out.linear_layers.{k}.bias")
    assert set(left) == {"scaler.per_element_scaling"}
    return potential


def _molecules() -> Structures:
    return random_structures([9, 1, 4, 14])


def _crystals() -> Structures:
    structures = random_structures([5, 3], seed=3)
    cells = np.array([np.eye(3) * 5.0, [[4.4, 0, 0], [1.3, 4.9, 0], [-0.6, 0.8, 5.2]]])
    periodic = {"cell": cells, "pbc": np.array([[True, True, True], [True, True, True]])}
    return replace(structures, structures=structures.structures | periodic)


def _compare(predicted: dict[str, torch.Tensor], found: dict[str, np.ndarray]) -> None:
    for name in ("energy", "forces"):
        largest = np.abs(found[name]).max()
        assert largest > 1e-2
        values = predicted[name].detach().numpy()
        print("deviation from graph-pes:", np.abs(values - found[name]).max() / largest)
        assert values == pytest.approx(found[name], rel=1e-8, abs=1e-10 * largest)


@pytest.mark.slow
@pytest.mark.parametrize("make", [_molecules, _crystals])
def test_painn_equals_that_of_graph_pes(make: Callable[[], Structures], tmp_path: Path) -> None:
    """Energies and forces with all its weights.

    Different there, and made alike here: its envelope is a polynomial, for which its
    `CosineEnvelope` is put; its basis has the factor √(2/cutoff), and frequencies that are learnt;
    its readout has a wider layer; its scale by element is one number, our `Potential`'s scale.
    """
    structures = make()
    script = GRAPH_PES.replace("MODEL", PAINN).replace("ENVELOPE", "True")
    found = _peer(script, structures, tmp_path)
    _compare(_painn(found)(make_batch(structures, CUTOFF, torch.float64)), found)


@pytest.mark.slow
@pytest.mark.parametrize("make", [_molecules, _crystals])
def test_schnet_equals_that_of_graph_pes(make: Callable[[], Structures], tmp_path: Path) -> None:
    """Energies and forces with all its weights, its basis, and its own cosine on its filters.

    Different there, and made alike here: it has no cutoff function, so that its `CosineEnvelope`
    is put on its filters; its Gaussians are σ = cutoff/N wide, with centres and width that are
    learnt, and are taken over; its scale by element is one number, our `Potential`'s scale.
    """
    structures = make()
    found = _peer(
        GRAPH_PES.replace("MODEL", SCHNET).replace("ENVELOPE", "True"), structures, tmp_path
    )
    _compare(_schnet(found)(make_batch(structures, CUTOFF, torch.float64)), found)


@pytest.mark.slow
def test_schnet_without_its_cutoff_function_equals_that_of_graph_pes_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same, where the cutoff function is taken off ours instead."""
    monkeypatch.setattr("runner.potentials.schnet.cosine_cutoff", lambda r, _: torch.ones_like(r))
    structures = _molecules()
    found = _peer(
        GRAPH_PES.replace("MODEL", SCHNET).replace("ENVELOPE", "False"), structures, tmp_path
    )
    _compare(_schnet(found)(make_batch(structures, CUTOFF, torch.float64)), found)
