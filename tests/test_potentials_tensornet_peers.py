"""TensorNet against two other programs, with their weights.

Slow, and skipped unless the environment names a Python that has them: RUNNER_TORCHMDNET_PYTHON
with torchmd-net 3.1.0, RUNNER_PEERS_PYTHON with graph-pes 1.0.2.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from molecules import random_structures

from runner.batches import Batch, make_batch
from runner.config import TensorNetConfig, potential_config
from runner.potentials import Potential
from runner.potentials.components import half_pair_vectors
from runner.potentials.tensornet import Embedding, Interaction, TensorNet

pytestmark = pytest.mark.slow

CUTOFF, FEATURES, LAYERS, RADIAL_BASIS = 4.0, 12, 2, 9

TORCHMDNET = """
import sys
import numpy, torch
from torchmdnet.models.output_modules import Scalar
from torchmdnet.models.tensornet import TensorNet

given = {name: torch.as_tensor(array) for name, array in numpy.load(sys.argv[1]).items()}
torch.manual_seed(1)
representation = TensorNet(
    hidden_channels=int(given["features"]), num_layers=int(given["layers"]),
    num_rbf=int(given["radial_basis"]), cutoff_upper=float(given["cutoff"]), max_z=119,
    static_shapes=False, dtype=torch.float64,
).double()
representation.distance_expansion.dtype = torch.float64
representation.distance_expansion.reset_parameters()
output = Scalar(int(given["features"]), dtype=torch.float64)
with torch.no_grad():
    for parameter in [*representation.parameters(), *output.parameters()]:
        parameter += 0.1 * torch.randn_like(parameter)
positions = given["positions"].requires_grad_()
x, _, z, _, _ = representation(given["atomic_numbers"], positions, given["structure"])
energies = output.pre_reduce(x, None, z, positions, given["structure"]).squeeze(-1)
(gradient,) = torch.autograd.grad(energies.sum(), positions)
numpy.savez(
    sys.argv[2], energies=energies.detach().numpy(), forces=-gradient.numpy(),
    **{"weight " + name: t.numpy() for name, t in representation.state_dict().items()},
    **{"weight " + name: t.numpy() for name, t in output.state_dict().items()},
)
"""

WITHOUT_WARP = """
from torchmdnet.extensions import warp_ops
del warp_ops.fn_compose_tensor  # without which it falls back
"""

GRAPH_PES = """
import sys
import numpy, torch
from graph_pes import AtomicGraph
from graph_pes.atomic_graph import neighbour_distances
from graph_pes.models import TensorNet
from graph_pes.models.tensornet import frobenius_norm

given = {name: torch.as_tensor(array) for name, array in numpy.load(sys.argv[1]).items()}
torch.manual_seed(1)
features = int(given["features"])
model = TensorNet(
    float(given["cutoff"]), int(given["radial_basis"]), channels=features,
    layers=int(given["layers"]),
).double()
graph = AtomicGraph(
    Z=given["atomic_numbers"], R=given["positions"], cell=torch.zeros(3, 3).double(),
    neighbour_list=given["pairs"],
    neighbour_cell_offsets=torch.zeros(given["pairs"].shape[1], 3).double(),
    properties={}, other={}, cutoff=float(given["cutoff"]),
)
with torch.no_grad():
    for layer in model.interactions:  # its messages carry X and ours Y: so that they are the same
        for mix in (layer.W_I_pre, layer.W_A_pre, layer.W_S_pre):
            mix.linear.weight.copy_(torch.eye(features))
    r = neighbour_distances(graph)
    found = {"first filters": model.embedding.edge_embedding.distance_embedding(r)}
    x = model.embedding(graph)
    found["X"] = x
    for number, layer in enumerate(model.interactions):
        x = x / (frobenius_norm(x)[..., None, None] + 1)
        x = x + layer(x, graph)
        found[f"X {number}"] = x
        found[f"filters {number}"] = layer.distance_embedding(r)
found |= {"weight " + name: p for name, p in model.named_parameters()}
numpy.savez(sys.argv[2], **{k: v.detach().numpy() for k, v in found.items()})
"""


def _batch(sizes: list[int]) -> Batch:
    return make_batch(random_structures(sizes), CUTOFF, torch.float64)


def _peer(variable: str, script: str, batch: Batch, folder: Path) -> dict[str, np.ndarray]:
    """What a peer's script makes of a batch, and its weights."""
    if variable not in os.environ:
        pytest.skip(f"{variable} does not name the Python of an environment with the peer")
    fields = ("atomic_numbers", "positions", "structure", "pairs")
    arrays = {name: getattr(batch, name).numpy() for name in fields}
    sizes = {"features": FEATURES, "layers": LAYERS, "radial_basis": RADIAL_BASIS}
    np.savez(folder / "given.npz", cutoff=np.array(CUTOFF), **arrays, **sizes)  # type: ignore[arg-type]
    command = [os.environ[variable], "-c", script, folder / "given.npz", folder / "found.npz"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(folder / "found.npz") as file:
        return dict(file)


class _Weights(dict[str, torch.Tensor]):
    """A peer's weights, of which each is to be used."""

    def __init__(self, found: dict[str, np.ndarray]) -> None:
        prefix = "weight "
        named = {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}
        super().__init__({name: torch.as_tensor(array) for name, array in named.items()})

    def linear(self, theirs: str, ours: str) -> dict[str, torch.Tensor]:
        """Weight and bias under another name."""
        kinds = [kind for kind in ("weight", "bias") if f"{theirs}.{kind}" in self]
        return {f"{ours}.{kind}": self.pop(f"{theirs}.{kind}") for kind in kinds}

    def stacked(self, names: list[str], ours: str) -> dict[str, torch.Tensor]:
        """Several linear layers as one."""
        return {
            f"{ours}.{kind}": torch.cat([self.pop(f"{name}.{kind}") for name in names])
            for kind in ("weight", "bias")
        }

    def halves(self, theirs: str, *ours: str) -> dict[str, torch.Tensor]:
        """A linear layer of two vectors side by side as one for each."""
        pieces = self.pop(f"{theirs}.weight").chunk(2, dim=1)
        return {f"{name}.weight": piece for name, piece in zip(ours, pieces, strict=True)}


def _torchmdnet_state(found: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Its weights under our names."""
    theirs = _Weights(found)
    e = "tensor_embedding"
    state = theirs.linear(f"{e}.emb", "embedding.elements.elements")
    state |= theirs.halves(f"{e}.emb2", "embedding.centre", "embedding.neighbor")
    state["embedding.centre.bias"] = theirs.pop(f"{e}.emb2.bias")
    state |= theirs.linear(f"{e}.init_norm", "embedding.norm")
    state |= theirs.linear(f"{e}.linears_scalar.0", "embedding.gates.0")
    state |= theirs.linear(f"{e}.linears_scalar.1", "embedding.gates.2")
    for part in range(3):
        state |= theirs.linear(f"{e}.linears_tensor.{part}", f"embedding.mix.weights.{part}")
    first = [f"{e}.distance_proj{n}" for n in (1, 2, 3)]
    first += [f"layers.{layer}.linears_scalar.0" for layer in range(LAYERS)]
    state |= theirs.stacked(first, "filters.first")
    for n in range(LAYERS):
        state |= theirs.linear(f"layers.{n}.linears_scalar.1", f"filters.second.{n}")
        state |= theirs.linear(f"layers.{n}.linears_scalar.2", f"filters.third.{n}")
        for part in range(3):
            mix = f"layers.{n}.linears_tensor"
            state |= theirs.linear(f"{mix}.{part}", f"interactions.{n}.before.weights.{part}")
            state |= theirs.linear(f"{mix}.{3 + part}", f"interactions.{n}.after.weights.{part}")
    state |= theirs.linear("out_norm", "norm")
    state |= theirs.linear("linear", "readout")
    for layer in (0, 2):
        state |= theirs.linear(f"output_network.layers.{layer}", f"readouts.energies.{layer}")
    assert set(theirs) == {
        "distance_expansion.means",
        "distance_expansion.betas",
        "distance.box",
    }
    return state


@pytest.mark.parametrize(
    ("before", "tolerance"),
    [
        pytest.param("", 1e-5, id="Warp's kernels, whose constants are float32"),
        pytest.param(WITHOUT_WARP, 1e-10, id="torch's operations"),
    ],
)
def test_energies_and_forces_equal_torchmdnet_s(
    tmp_path: Path, before: str, tolerance: float
) -> None:
    batch = _batch([7, 5, 1, 9, 2])
    found = _peer("RUNNER_TORCHMDNET_PYTHON", before + TORCHMDNET, batch, tmp_path)
    table = {"name": "tensornet", "cutoff": "4 angstrom", "features": FEATURES}
    config = potential_config(table | {"interactions": LAYERS, "radial_basis": RADIAL_BASIS})
    assert isinstance(config, TensorNetConfig)
    ours = TensorNet(config, []).double()
    basis = ours.filters.basis
    means, betas = (found[f"weight distance_expansion.{name}"] for name in ("means", "betas"))
    assert basis.centres.numpy() == pytest.approx(means, abs=1e-7)
    assert np.full(RADIAL_BASIS, basis.sharpness) == pytest.approx(betas, rel=1e-12)
    basis.centres.copy_(torch.as_tensor(means))  # ours are rounded to float32
    ours.load_state_dict(_torchmdnet_state(found))
    prediction = Potential(ours, config)(batch)
    energies = ours(batch)["energies"].detach().numpy()
    forces = prediction["forces"].detach().numpy()
    print("deviations from torchmd-net:", np.abs(energies / found["energies"] - 1).max(), end=" ")
    print(np.abs(forces - found["forces"]).max() / np.abs(forces).max())
    largest = np.abs(forces).max()
    assert largest > 1e-2
    assert energies == pytest.approx(found["energies"], rel=tolerance)
    assert forces == pytest.approx(found["forces"], rel=tolerance, abs=tolerance * largest)


def _graph_pes_embedding(theirs: _Weights) -> Embedding:
    """Ours with its weights; Z_ij has no bias there."""
    e = "embedding"
    known = {
        "norm": "layer_norm",
        "gates.0": "mlp.linear_layers.0",
        "gates.2": "mlp.linear_layers.1",
    }
    state = theirs.halves(f"{e}.edge_embedding.z_map", "centre", "neighbor")
    state["centre.bias"] = torch.zeros(FEATURES)
    state["elements.elements.weight"] = theirs.pop(f"{e}.edge_embedding.z_embedding._embeddings")
    for ours, name in known.items():
        state |= theirs.linear(f"{e}.{name}", ours)
    for part, letter in enumerate("IAS"):
        state |= theirs.linear(f"{e}.W_{letter}.linear", f"mix.weights.{part}")
    embedding = Embedding(FEATURES, []).double()
    embedding.load_state_dict(state)
    return embedding


def _graph_pes_interaction(theirs: _Weights, number: int) -> Interaction:
    """Ours with its weights."""
    state = {}
    for part, letter in enumerate("IAS"):
        for ours, name in (("before", "pre"), ("after", "post")):
            path = f"interactions.{number}.W_{letter}_{name}.linear"
            state |= theirs.linear(path, f"{ours}.weights.{part}")
    interaction = Interaction(FEATURES).double()
    interaction.load_state_dict(state)
    return interaction


def test_embedding_and_interactions_equal_graph_pes_s_between_its_filters(tmp_path: Path) -> None:
    batch = _batch([8])
    found = _peer("RUNNER_PEERS_PYTHON", GRAPH_PES, batch, tmp_path)
    theirs = _Weights(found)

    def filters(name: str) -> torch.Tensor:
        half = torch.as_tensor(found[name])[: batch.half_pairs.shape[1]]
        return half.unflatten(-1, (3, FEATURES))

    def compare(x: torch.Tensor, name: str) -> None:
        expected = found[name].transpose(0, 2, 3, 1)
        largest = np.abs(expected).max()
        print("deviation from graph-pes:", np.abs(x.numpy() - expected).max() / largest)
        assert x.numpy() == pytest.approx(expected, rel=1e-5, abs=1e-5 * largest)

    none = torch.zeros(1, 3, FEATURES, dtype=torch.float64)  # no atom is its own neighbour there
    _, direction = half_pair_vectors(batch)
    with torch.no_grad():
        embedding = _graph_pes_embedding(theirs)
        x = embedding(batch, filters("first filters"), none, direction)
        compare(x, "X")
        for number in range(LAYERS):
            interaction = _graph_pes_interaction(theirs, number)
            x = interaction(x, filters(f"filters {number}"), none, batch.pairs)
            compare(x, f"X {number}")
    others = ("distance_embedding", "energy_read_out", "scaler")
    assert all(any(part in name for part in others) for name in theirs)
