"""How much of the bare step's rate `runner train` keeps: python tests/benchmarks/bench_epoch.py

The work: PaiNN of bench_step.py on 1,890 small molecules (of RUNNER_BENCH_G2, an extended XYZ file
with energies and forces, or made-up ones) in batches of 64, 210 more for the validation. A run is
started twice, with few and with many epochs: what more epochs take, divided by their number, is an
epoch with everything in it: batches, metrics, validation, logs, checkpoints. What is left of the
short run is the time to start and to end. A third run tells when its first step is done, from the
start of the process; once also where no program is kept yet, so that it is compiled. Bare steps
are measured before and after, in turns.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ase.io
from bench_loader import small_molecules
from bench_step import N_STRUCTURES, TABLES, Ours

ROUNDS = 5
N_TRAIN, N_VAL, BATCH = 1890, 210, 64
EPOCHS = {"eager": (1, 11), "compiled": (3, 33)}
CONFIG = """
[prepare]
name = "bench-epoch"
[[prepare.source]]
path = "{path}"
energy = {{ key = "energy", unit = "eV" }}
forces = {{ key = "forces", unit = "eV/angstrom" }}
[prepare.split]
train = {n_train}
val = {n_val}
test = 0
[train]
batch = {{ structures = {batch} }}
[train.potential]
name = "painn"
cutoff = "5 angstrom"
features = 64
interactions = 3
radial_basis = 20
[train.loss.energy]
per_atom = true
[train.loss.forces]
weight = 10.0
reduction = "atom"
[train.trainer]
accelerator = "cpu"
"""

FIRST_STEP = """
import contextlib, os, sys, time
from runner import cli
def end(*_):
    print(time.perf_counter(), flush=True)
    os._exit(0)
@contextlib.contextmanager
def importing(before=cli._importing):
    with before():
        yield
    if "runner.training" in sys.modules:
        sys.modules["runner.training"].Training.on_train_batch_end = end
cli._importing = importing
cli.main()
"""


def command(folder: Path, mode: str, epochs: int) -> list[str]:
    """The words behind `python`."""
    compiled = str(mode == "compiled").lower()
    settings = [f"train.epochs={epochs}", f"train.compile={compiled}"]
    words = [word for setting in settings for word in ("--set", setting)]
    return ["train", str(folder), "--json", *words]


def first_step(folder: Path, mode: str) -> float:
    """Seconds from the start of the process to the end of its first step."""
    start = time.perf_counter()  # all processes have the same clock
    words = [sys.executable, "-c", FIRST_STEP, *command(folder, mode, 1)]
    return float(subprocess.run(words, check=True, capture_output=True).stdout) - start


def train(folder: Path, mode: str, epochs: int) -> float:
    """Seconds that the command takes."""
    words = [sys.executable, "-m", "runner", *command(folder, mode, epochs)]
    start = time.perf_counter()
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if json.loads(done.stdout)["epochs"] != epochs:
        raise RuntimeError(f"not {epochs} epochs:\n{done.stdout}")
    return seconds


def main() -> None:
    """Measure both ways in turns, print medians."""
    given = os.environ.get("RUNNER_BENCH_G2")
    frames = (ase.io.read(given, ":") if given else small_molecules(N_TRAIN + N_VAL))[
        : N_TRAIN + N_VAL
    ]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        ase.io.write(folder / "all.extxyz", frames)
        ase.io.write(folder / "step.extxyz", frames[:N_STRUCTURES])
        (folder / "config.toml").write_text(
            CONFIG.format(path="all.extxyz", n_train=N_TRAIN, n_val=N_VAL, batch=BATCH)
        )
        os.environ["RUNNER_DATA_DIR"] = str(folder / "prepared")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "programs")
        prepare = [sys.executable, "-m", "runner", "prepare", str(folder)]
        subprocess.run(prepare, check=True, capture_output=True)
        cold = first_step(folder, "compiled")
        cores = os.cpu_count() or 1
        table = TABLES["painn"] | {"name": "painn", "cutoff": "5 angstrom"}
        bare = {
            mode: Ours(table, folder / "step.extxyz", compiled=mode == "compiled", threads=cores)
            for mode in EPOCHS
        }
        train(folder, "compiled", 3)  # its programs are kept
        rates: dict[str, list[float]] = {mode: [] for mode in EPOCHS}
        epochs: dict[str, list[float]] = {mode: [] for mode in EPOCHS}
        rest: dict[str, list[float]] = {mode: [] for mode in EPOCHS}
        first: dict[str, list[float]] = {mode: [] for mode in EPOCHS}
        for _ in range(ROUNDS):
            for mode, (few, many) in EPOCHS.items():
                rates[mode].append(bare[mode].rate())
                short, long = (train(folder, mode, n) for n in (few, many))
                rates[mode].append(bare[mode].rate())
                epochs[mode].append((long - short) / (many - few))
                rest[mode].append(short - few * epochs[mode][-1])
                first[mode].append(first_step(folder, mode))
        for step in bare.values():
            step.close()
    print(f"PaiNN, {N_TRAIN} + {N_VAL} structures, batches of {BATCH}, {cores} threads")
    for mode in EPOCHS:
        rate, epoch = statistics.median(rates[mode]), statistics.median(epochs[mode])
        print(
            f"  {mode:9} bare step {rate:6,.0f} structures/s; an epoch {epoch:.2f} s, "
            f"{N_TRAIN / epoch:6,.0f} trained structures/s, {N_TRAIN / epoch / rate:.0%}; "
            f"first step done after {statistics.median(first[mode]):.1f} s, "
            f"start and end {statistics.median(rest[mode]):.1f} s"
        )
    print(f"  the first time that it is compiled, the first step was done after {cold:.1f} s")


if __name__ == "__main__":
    sys.exit(main())
