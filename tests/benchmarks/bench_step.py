"""How fast a training step is, beside peers: python tests/benchmarks/bench_step.py [painn …]

The work: 2,048 small molecules (those of RUNNER_BENCH_G2, an extended XYZ file with energies and
forces, or made-up ones), 32 prebuilt batches of 64, with the hyperparameters below, 5 Å; forward,
forces, loss, gradient, AdamW. Peers run in environments of their own (see bench_loader.py), with
the same batches and loss, in turns with ours. Memory is the largest resident set of each process;
ours has a process for each way, so that none has another's.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import torch
from bench_loader import CUTOFF, PEERS, Peer, of_ase, small_molecules

from runner.batches import Block
from runner.compiled import CompiledStep, Step
from runner.config import LossConfig, potential_config
from runner.losses import Loss
from runner.potentials import build_potential

ROUNDS = 5
N_STRUCTURES, BATCH = 2048, 64
TABLES: dict[str, dict[str, Any]] = {
    "painn": {"features": 64, "interactions": 3, "radial_basis": 20},
    "schnet": {"features": 64, "interactions": 3, "radial_basis": 50},
    "tensornet": {"features": 64, "interactions": 2, "radial_basis": 32},
}
GRAPH_PES_MODELS = {
    "painn": "PaiNN(channels=64, radial_features=20, layers=3, cutoff=cutoff)",
    "schnet": "SchNet(channels=64, expansion_features=50, layers=3, cutoff=cutoff)",
    "tensornet": "TensorNet(channels=64, radial_features=32, layers=2, cutoff=cutoff)",
}

GRAPH_PES = """
import sys, time, json, ase.io, torch, warnings
warnings.filterwarnings("ignore")
torch.set_num_threads(THREADS)
from graph_pes.data.datasets import ASEToGraphsConverter
from graph_pes.atomic_graph import to_batch, structure_sizes
from graph_pes.models import PaiNN, SchNet, TensorNet
path, cutoff, batch, _ = sys.argv[1], *map(float, sys.argv[2:])
convert = ASEToGraphsConverter(ase.io.read(path, ":"), cutoff)
graphs = [convert[i] for i in range(len(convert))]
batches = [to_batch(graphs[i : i + int(batch)]) for i in range(0, len(graphs), int(batch))]
model = MODEL
model.pre_fit_all_components(graphs[:200])
model.train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
def step(b):
    found = model.predict(b, ["energy", "forces"])
    n = structure_sizes(b)
    loss = (((found["energy"] - b.properties["energy"]) / n) ** 2).mean()
    loss = loss + 10 * ((found["forces"] - b.properties["forces"]) ** 2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""
TORCHMD = """
import sys, time, json, ase.io, torch, warnings
import numpy as np
warnings.filterwarnings("ignore")
torch.set_num_threads(THREADS)
from torchmdnet.models.model import create_model
path, cutoff, batch, _ = sys.argv[1], *map(float, sys.argv[2:])
frames = ase.io.read(path, ":")
model = create_model(dict(
    model="tensornet", embedding_dimension=64, num_layers=2, num_rbf=32, rbf_type="expnorm",
    trainable_rbf=False, activation="silu", cutoff_lower=0.0, cutoff_upper=cutoff, max_z=100,
    max_num_neighbors=64, equivariance_invariance_group="O(3)", derivative=True, precision=32,
    prior_model=None, output_model="Scalar", reduce_op="add", static_shapes=False,
    check_errors=False, vector_cutoff=False, q_dim=None, atom_filter=-1))
model.train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
batches = []
for k in range(0, len(frames), int(batch)):
    few = frames[k : k + int(batch)]
    n = torch.tensor([len(a) for a in few])
    batches.append((
        torch.tensor(np.concatenate([a.numbers for a in few])),
        torch.tensor(np.concatenate([a.positions for a in few]), dtype=torch.float32),
        torch.repeat_interleave(torch.arange(len(few)), n), n,
        torch.tensor([a.get_potential_energy() for a in few], dtype=torch.float32),
        torch.tensor(np.concatenate([a.get_forces() for a in few]), dtype=torch.float32)))
graphs = frames
def step(b):
    z, pos, which, n, energy, forces = b
    e, f = model(z, pos, which)
    loss = (((e.flatten() - energy) / n) ** 2).mean() + 10 * ((f - forces) ** 2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""
LOOP = """
for b in batches[:4]:
    step(b)
print("ready", flush=True)
for _ in sys.stdin:
    start = time.perf_counter()
    for b in batches:
        step(b)
    rate = len(graphs) / (time.perf_counter() - start)
    print(json.dumps(rate), flush=True)
"""


class Ours:
    """Our step in a process of its own, eager or compiled, with so many threads."""

    def __init__(self, table: dict[str, Any], path: Path, *, compiled: bool, threads: int) -> None:
        self.name = f"runner, {'compiled' if compiled else 'eager'}, {threads} threads"
        self.pipe, other = multiprocessing.Pipe()
        arguments = (other, table, path, compiled, threads)
        self.process = multiprocessing.get_context("spawn").Process(target=_serve, args=arguments)
        self.process.start()
        print(f"{self.name}: {self.pipe.recv():.0f} s to start", flush=True)

    def rate(self) -> float:
        """Structures a second."""
        self.pipe.send("run")
        rate: float = self.pipe.recv()
        return rate

    def close(self) -> None:
        """End the process."""
        self.pipe.send("")
        self.process.join()


def largest_memory(pid: int | None) -> float:
    """Largest resident set of a running process, MB."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) / 1024


def _serve(pipe: Any, table: dict[str, Any], path: Path, compiled: bool, threads: int) -> None:
    """Take steps whenever it is asked for."""
    torch.set_num_threads(threads)
    frames = ase.io.read(path, ":")
    for atoms in frames:
        atoms.info["energy"] = atoms.get_potential_energy()
        atoms.arrays["forces"] = atoms.get_forces()
        atoms.calc = None
    block = Block.of(of_ase(frames), CUTOFF)
    starts = range(0, len(block), BATCH)
    batches = [block.take(np.arange(i, min(i + BATCH, len(block)))).batch() for i in starts]
    torch.manual_seed(0)
    potential = build_potential(potential_config(table), ["energy", "forces"], {}).train()
    terms = {"energy": {"per_atom": True}, "forces": {"weight": 10.0, "reduction": "atom"}}
    loss = Loss(LossConfig.model_validate(terms))
    eager = Step(potential, loss, {"forces": True, "stress": False})
    step = CompiledStep(eager) if compiled else eager
    weights = loss.weights_at(0)
    if compiled:
        torch.set_num_threads(1)
    optimizer = torch.optim.AdamW(potential.parameters(), lr=1e-3, fused=True)

    def run(batches: list[Any]) -> float:
        start = time.perf_counter()
        for batch in batches:
            optimizer.zero_grad()
            step(batch, weights).total.backward()
            optimizer.step()
        return time.perf_counter() - start

    pipe.send(run(batches[:4]))
    while pipe.recv():
        pipe.send(N_STRUCTURES / run(batches))


def compare(name: str, frames: list[Any], work: Path) -> None:
    """Measure one architecture and its peers in turns, print medians and ratios."""
    path = work / "step.extxyz"
    ase.io.write(path, frames)
    table = TABLES[name] | {"name": name, "cutoff": f"{CUTOFF} angstrom"}
    cores = os.cpu_count() or 1
    runs: list[Ours | Peer] = []
    for threads in sorted({1, cores}):
        runs += [Ours(table, path, compiled=c, threads=threads) for c in (False, True)]
        scripts = {"graph-pes==1.0.2": GRAPH_PES.replace("MODEL", GRAPH_PES_MODELS[name])}
        if name == "tensornet":
            scripts["torchmd-net==3.1.0"] = TORCHMD
        for package, script in scripts.items():
            peer = f"{package.replace('==', ' ')}, {threads} threads"
            PEERS[peer] = (package, script.replace("THREADS", str(threads)) + LOOP)
            runs.append(Peer(peer, work, path, BATCH, 0.0))
    found: dict[str, list[float]] = {run.name: [] for run in runs}
    for _ in range(ROUNDS):
        for run in runs:
            found[run.name].append(run.rate())
    memory = {run.name: largest_memory(run.process.pid) for run in runs}
    for run in runs:
        run.close()
    middle = {name: statistics.median(values) for name, values in found.items()}
    best = max(value for name, value in middle.items() if not name.startswith("runner"))
    print(f"{name}, {len(frames)} molecules: structures/s, of the fastest peer, MB at most")
    for run_name, value in middle.items():
        print(f"  {run_name:34} {value:8,.0f} {value / best:6.2f}× {memory[run_name]:7,.0f}")


def main() -> None:
    """Measure what is asked for."""
    given = os.environ.get("RUNNER_BENCH_G2")
    frames = ase.io.read(given, ":")[:N_STRUCTURES] if given else small_molecules(N_STRUCTURES)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(os.environ.get("RUNNER_BENCH_DIR", temporary))
        work.mkdir(parents=True, exist_ok=True)
        for name in sys.argv[1:] or TABLES:
            compare(name, frames, work)


if __name__ == "__main__":
    sys.exit(main())
