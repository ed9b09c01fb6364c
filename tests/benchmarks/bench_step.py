"""How fast a training step is, beside peers: python tests/benchmarks/bench_step.py

The work: 2,048 small molecules (those of RUNNER_BENCH_G2, an extended XYZ file with energies and
forces, or made-up ones), 32 prebuilt batches of 64, PaiNN with 64 features, 3 interactions and 20
radial functions, 5 Å; forward, forces, loss, gradient, AdamW. Peers run in environments of their
own (see bench_loader.py), with the same batches and loss, in turns with ours.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import ase.io
import numpy as np
import torch
from bench_loader import CUTOFF, PEERS, Peer, of_ase, small_molecules

from runner.batches import Batch, Block
from runner.compiled import CompiledStep, Step
from runner.config import LossConfig, potential_config
from runner.losses import Loss
from runner.potentials import build_potential

ROUNDS = 5
N_STRUCTURES, BATCH = 2048, 64

GRAPH_PES = """
import sys, time, json, ase.io, torch, warnings
warnings.filterwarnings("ignore")
torch.set_num_threads(THREADS)
from graph_pes.data.datasets import ASEToGraphsConverter
from graph_pes.atomic_graph import to_batch, number_of_atoms, structure_sizes
from graph_pes.models import PaiNN
path, cutoff, batch, _ = sys.argv[1], *map(float, sys.argv[2:])
convert = ASEToGraphsConverter(ase.io.read(path, ":"), cutoff)
graphs = [convert[i] for i in range(len(convert))]
batches = [to_batch(graphs[i : i + int(batch)]) for i in range(0, len(graphs), int(batch))]
model = PaiNN(channels=64, radial_features=20, layers=3, cutoff=cutoff)
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
for b in batches[:4]:
    step(b)
print("ready", flush=True)
for _ in sys.stdin:
    start = time.perf_counter()
    for b in batches:
        step(b)
    print(json.dumps(len(graphs) / (time.perf_counter() - start)), flush=True)
"""


class Ours:
    """Our step, eager or compiled, with so many threads."""

    def __init__(self, batches: list[Batch], *, compiled: bool, threads: int) -> None:
        torch.manual_seed(0)
        config = potential_config(
            {"name": "painn", "cutoff": f"{CUTOFF} angstrom", "features": 64, "radial_basis": 20}
        )
        potential = build_potential(config, ["energy", "forces"], {}).train()
        terms = {"energy": {"per_atom": True}, "forces": {"weight": 10.0, "reduction": "atom"}}
        loss = Loss(LossConfig.model_validate(terms))
        step = Step(potential, loss, {"forces": True, "stress": False})
        self.name = f"runner, {'compiled' if compiled else 'eager'}, {threads} threads"
        self.step = CompiledStep(step) if compiled else step
        self.weights = loss.weights_at(0)
        self.optimizer = torch.optim.AdamW(potential.parameters(), lr=1e-3)
        self.batches, self.threads = batches, threads
        start = time.perf_counter()
        self.run(batches[:4])
        print(f"{self.name}: {time.perf_counter() - start:.0f} s to start", flush=True)

    def run(self, batches: list[Batch]) -> None:
        torch.set_num_threads(self.threads)
        for batch in batches:
            self.optimizer.zero_grad()
            self.step(batch, self.weights).total.backward()
            self.optimizer.step()

    def rate(self) -> float:
        """Structures a second."""
        start = time.perf_counter()
        self.run(self.batches)
        return sum(int(batch.n_structures) for batch in self.batches) / (
            time.perf_counter() - start
        )

    def close(self) -> None:
        """Nothing to end."""


def main() -> None:
    """Measure in turns, print medians and ratios."""
    given = os.environ.get("RUNNER_BENCH_G2")
    frames = ase.io.read(given, ":")[:N_STRUCTURES] if given else small_molecules(N_STRUCTURES)
    if given:
        for atoms in frames:
            atoms.info["energy"] = atoms.get_potential_energy()
            atoms.arrays["forces"] = atoms.get_forces()
            atoms.calc = None
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(os.environ.get("RUNNER_BENCH_DIR", temporary))
        work.mkdir(parents=True, exist_ok=True)
        path = work / "step.extxyz"
        ase.io.write(path, frames)
        block = Block.of(of_ase(frames), CUTOFF)
        starts = range(0, len(block), BATCH)
        batches = [block.take(np.arange(i, min(i + BATCH, len(block)))).batch() for i in starts]
        cores = os.cpu_count() or 1
        runs: list[Ours | Peer] = []
        for threads in sorted({1, cores}):
            runs += [Ours(batches, compiled=c, threads=threads) for c in (False, True)]
            name = f"graph-pes 1.0.2, {threads} threads"
            PEERS[name] = ("graph-pes==1.0.2", GRAPH_PES.replace("THREADS", str(threads)))
            runs.append(Peer(name, work, path, BATCH, 0.0))
        found: dict[str, list[float]] = {run.name: [] for run in runs}
        for _ in range(ROUNDS):
            for run in runs:
                found[run.name].append(run.rate())
        for run in runs:
            run.close()
    print(f"PaiNN, {len(frames)} molecules, {block.first_pair[-1]} pairs, structures/s")
    middle = {name: statistics.median(values) for name, values in found.items()}
    best = max(value for name, value in middle.items() if name.startswith("graph-pes"))
    for name, value in middle.items():
        print(f"  {name:30} {value:8,.0f}   {value / best:5.2f}× the best of graph-pes")


if __name__ == "__main__":
    sys.exit(main())
