"""How the cost of a training step grows: python tests/benchmarks/bench_growth.py

PaiNN, made-up molecules of one size at the density of liquids, forward, forces, loss, gradient and
AdamW, eager and compiled, on all cores. Beside the rates stands the arithmetic bound: the matrix
products of the eager step, counted, over the rate at which this machine does such products. It
prints tables and draws `growth.png` beside this file.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from runner.batches import Batch, Block
from runner.compiled import CompiledStep, Step
from runner.config import LossConfig, potential_config
from runner.losses import Loss
from runner.potentials import build_potential
from runner.structures import Structures

CUTOFF, FEATURES, ATOMS = 5.0, 64, 512
VOLUME = 10.0  # Å³ an atom
REPEATS = 5


def molecules(n_atoms: int, n: int) -> Structures:
    """Atoms on a jittered lattice, in a ball."""
    rng = np.random.default_rng(n_atoms)
    width = int(np.ceil((2 * n_atoms) ** (1 / 3))) + 2
    grid = (np.indices((width,) * 3).reshape(3, -1).T - (width - 1) / 2) * VOLUME ** (1 / 3)
    nearest = grid[np.argsort(np.linalg.norm(grid, axis=1), kind="stable")[:n_atoms]]
    positions = nearest[None] + rng.normal(0, 0.1, (n, n_atoms, 3))
    return Structures(
        np.arange(n + 1) * n_atoms,
        {
            "atomic_numbers": rng.choice([1, 6, 7, 8], n * n_atoms).astype(np.uint8),
            "positions": positions.reshape(-1, 3),
            "forces": rng.normal(size=(n * n_atoms, 3)),
        },
        {"energy": rng.normal(size=n)},
    )


class Measured:
    """A potential of so many features, eager and compiled."""

    def __init__(self, features: int) -> None:
        torch.manual_seed(0)
        table = {"name": "painn", "cutoff": f"{CUTOFF} angstrom", "features": features}
        potential = build_potential(potential_config(table), ["energy", "forces"], {}).train()
        loss = Loss(LossConfig.model_validate({"energy": {"per_atom": True}, "forces": {}}))
        self.eager = Step(potential, loss, {"forces": True, "stress": False})
        self.compiled = CompiledStep(self.eager)
        self.weights = loss.weights_at(0)
        self.optimizer = torch.optim.AdamW(potential.parameters(), lr=1e-4, fused=True)

    def run(self, step: Step | CompiledStep, batch: Batch) -> None:
        """One step of the training."""
        self.optimizer.zero_grad()
        step(batch, self.weights).total.backward()
        self.optimizer.step()

    def seconds(self, step: Step | CompiledStep, batch: Batch) -> float:
        """Median time of a step."""
        for _ in range(8):  # among them those that compare the compiled step
            self.run(step, batch)
        times = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            self.run(step, batch)
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def operations(self, batch: Batch) -> int:
        """Floating-point operations of the step's matrix products."""
        with FlopCounterMode(display=False) as counter:
            self.run(self.eager, batch)
        return int(counter.get_total_flops())


def matrix_rate(rows: int = 3000) -> float:
    """Operations a second in products such as the step's."""
    a, b = torch.randn(rows, FEATURES), torch.randn(FEATURES, 9 * FEATURES)
    times = []
    for _ in range(50):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * rows * 9 * FEATURES**2 / statistics.median(times)


def main() -> None:
    """Measure, print, draw."""
    rate = matrix_rate()
    threads = torch.get_num_threads()
    print(f"{threads} threads, matrix products at {rate / 1e9:.0f} Gflop/s\n")
    by_features = {features: Measured(features) for features in (16, 32, FEATURES, 128)}
    usual = by_features[FEATURES]
    sizes = [4, 8, 16, 32, 64, 128]
    tables = {
        f"atoms a structure (batches of {ATOMS} atoms, {FEATURES} features)": [
            (n, usual, ATOMS // n, n) for n in sizes
        ],
        "features (batches of 32 structures of 16 atoms)": [
            (features, measured, 32, 16) for features, measured in by_features.items()
        ],
        f"structures a batch (structures of 16 atoms, {FEATURES} features)": [
            (n, usual, n, 16) for n in (4, 8, 16, 32, 64, 128)
        ],
    }
    figure, axes = plt.subplots(1, len(tables), figsize=(12, 3.8), layout="constrained")
    for axis, (title, rows) in zip(axes, tables.items(), strict=True):
        _draw(axis, title, list(_measure(title, rows, rate)))
    axes[0].legend()
    figure.savefig(Path(__file__).parent / "growth.png", dpi=100)


def _measure(
    title: str, rows: Iterable[tuple[int, Measured, int, int]], rate: float
) -> Iterable[tuple[int, float, float, float]]:
    """(value, structures/s eager, compiled, at most), printed as a table."""
    name = title.partition(" (")[0]
    print(f"| {name} | pairs | eager, structures/s | compiled | arithmetic bound | of the bound |")
    print("|---|---|---|---|---|---|")
    for value, measured, n, n_atoms in rows:
        batch = Block.of(molecules(n_atoms, n), CUTOFF).batch()
        eager = n / measured.seconds(measured.eager, batch)
        compiled = n / measured.seconds(measured.compiled, batch)
        bound = n * rate / measured.operations(batch)
        pairs = batch.pairs.shape[1]
        print(
            f"| {value} | {pairs:,} | {eager:,.0f} | {compiled:,.0f} | {bound:,.0f} | "
            f"{100 * compiled / bound:.0f} % |",
            flush=True,
        )
        yield value, eager, compiled, bound
    print()


def _draw(axis: plt.Axes, title: str, rows: list[tuple[int, float, float, float]]) -> None:
    values, eager, compiled, bound = zip(*rows, strict=True)
    for label, rates, style in (
        ("arithmetic bound", bound, "k:"),
        ("compiled", compiled, "o-"),
        ("eager", eager, "s-"),
    ):
        axis.loglog(values, rates, style, label=label)
    name, _, rest = title.partition(" (")
    axis.set(xlabel=name, ylabel="structures/s", title=rest.rstrip(")"))
    axis.set_xticks(values, [str(v) for v in values], minor=False)
    axis.minorticks_off()


if __name__ == "__main__":
    main()
