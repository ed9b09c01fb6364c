"""Error against time, beside peers: tests/benchmarks/bench_accuracy.py ethanol 60 120 240 480

Trains the experiment named, and peers through their own commands on the same split, one after the
other, and prints the MAE of validation forces that each has reached after so many seconds of
training: epochs with all that belongs to them, without the time to start and to compile. A run of
ours has a schedule that ends with it, so there is one for each time; a peer runs once, with its
defaults, and the best epoch so far counts. `NNP_DATA` names the folder of the data,
`RUNNER_BENCH_DIR` that of the environments, `graph-pes-1.0.2` and `mace-torch`; one that is not
there is left out.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ase
import ase.io
import numpy as np

from runner.runs import read_rows
from runner.store import PreparedDataset

ROOT = Path(__file__).parents[2]
GRAPH_PES = """
model:
  offset: +LearnableOffset()
  many-body:
    +{model}: {{channels: 64, radial_features: {radial}, layers: {layers}, cutoff: 5.0}}
data:
  train: {{path: train.xyz, cutoff: 5.0}}
  valid: {{path: val.xyz, cutoff: 5.0, shuffle: false}}
loss: [+PerAtomEnergyLoss(), +ForceRMSE()]
fitting:
  trainer_kwargs: {{max_epochs: 100000, accelerator: cpu, enable_model_summary: false}}
  optimizer: {{+Optimizer: {{name: Adam, lr: 0.001}}}}
  scheduler: {{+LRScheduler: {{name: ReduceLROnPlateau, factor: 0.5, patience: 10}}}}
  loader_kwargs: {{batch_size: 32, num_workers: 0, persistent_workers: false}}
general: {{progress: logged, root_dir: {name}, run_id: run, seed: 1}}
wandb: null
"""
GRAPH_PES_MODELS = {
    "PaiNN": {"model": "PaiNN", "radial": 20, "layers": 3},
    "TensorNet": {"model": "TensorNet", "radial": 32, "layers": 2},
}
MACE = (  # its options, one after the other
    "--name m --train_file train_m.xyz --valid_file val_m.xyz --E0s average --model MACE "
    "--hidden_irreps 64x0e --r_max 5 --max_ell 3 --num_interactions 2 --correlation 3 "
    "--batch_size 10 --max_num_epochs 100000 --default_dtype float32 --device cpu "
    "--energy_key REF_energy --forces_key REF_forces --seed 1 --work_dir mace"
)
WELL_WITHIN = 0.94  # of the time: machines that are shared drift
Points = list[tuple[float, float]]  # seconds of training, meV/Å


def main() -> None:
    """Measure what is asked for."""
    name, *times = sys.argv[1:]
    budgets = [float(t) for t in times] or [60.0, 120.0, 240.0, 480.0]
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        rows = {"runner": ours(name, budgets, work)}
        environments = Path(os.environ.get("RUNNER_BENCH_DIR", "/nowhere"))
        for model, settings in GRAPH_PES_MODELS.items():
            command = environments / "graph-pes-1.0.2" / "bin" / "graph-pes-train"
            if command.exists():
                label = f"graph-pes {model}"
                (work / f"{model}.yaml").write_text(GRAPH_PES.format(name=model, **settings))
                points = graph_pes([str(command), f"{model}.yaml"], work, max(budgets))
                rows[label] = reached(points, budgets)
                print(label, rows[label], flush=True)
        command = environments / "mace-torch" / "bin" / "mace_run_train"
        if command.exists():
            rows["mace-torch"] = reached(
                mace([str(command), *MACE.split()], work, max(budgets)), budgets
            )
            print("mace-torch", rows["mace-torch"], flush=True)
    print(f"\n{name}: MAE of validation forces, meV/Å, after so many seconds of training\n")
    print("| | " + " | ".join(f"{t:.0f} s" for t in budgets) + " |")
    print("|---|" + "---|" * len(budgets))
    for label, values in rows.items():
        print(f"| {label} | " + " | ".join(f"{v:.2f}" for v in values) + " |")
    peers = [values for label, values in rows.items() if label != "runner"]
    if peers:
        best = [min(column) for column in zip(*peers, strict=True)]
        ratios = [mine / peer for mine, peer in zip(rows["runner"], best, strict=True)]
        print("| of the best peer's | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")


def ours(name: str, budgets: list[float], work: Path) -> list[float]:
    """A run for each time; the splits are written for the peers."""
    experiment = str(ROOT / "experiments" / name)
    prepared = _runner("prepare", experiment, "--data-dir", str(work / "prepared"))
    _write_splits(PreparedDataset(Path(prepared["dataset"])), work)
    found = []
    _, seconds = _trained(experiment, work, 4)  # leaves the program in the cache
    _, seconds = _trained(experiment, work, 8)
    for budget in budgets:
        result, took = _trained(experiment, work, max(2, int(WELL_WITHIN * budget / seconds)))
        seconds = took  # of an epoch; that of a longer run is a better guess
        found.append(1000 * result["best"]["forces_mae"])
        print(
            f"runner, {result['epochs']} epochs of {took:.2f} s = {result['epochs'] * took:.0f} s, "
            f"{result['seconds'] - result['epochs'] * took:.0f} s besides: val {found[-1]:.2f}, "
            f"test {1000 * result['test']['forces_mae']:.2f} meV/Å, energy test "
            f"{1000 * result['test']['energy_per_atom_mae']:.3f} meV an atom",
            flush=True,
        )
    return found


def _trained(experiment: str, work: Path, epochs: int) -> tuple[dict[str, Any], float]:
    """What a run of ours gives, and the seconds of an epoch, all but the first."""
    result = _runner(
        "train", experiment, "--data-dir", str(work / "prepared"), "--set", f"train.epochs={epochs}"
    )
    log = (Path(result["run"]) / "log.txt").read_text()
    seconds = [float(s) for s in re.findall(r"  ([\d.]+) s, [\d,]+ structures/s", log)]
    assert len(read_rows(Path(result["run"]) / "metrics.csv")) >= epochs
    return result, statistics.mean(seconds[1:])


def _runner(*words: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "runner", *words, "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _write_splits(dataset: PreparedDataset, work: Path) -> None:
    """Training and validation structures with total energies, as each peer wants them."""
    source = Path(dataset.attributes["sources"][0]["path"])
    if source.suffix == ".npz":
        a = np.load(source)
        frames = [
            ase.Atoms(z[:n], r[:n], info={"energy": float(e)})
            for z, n, r, e in zip(a["Z"], a["N"], a["R"], a["E"], strict=True)
        ]
        forces = [f[: len(atoms)] for f, atoms in zip(a["F"], frames, strict=True)]
    else:
        frames = ase.io.read(source, ":")
        forces = [atoms.get_forces() for atoms in frames]
        for atoms in frames:
            atoms.info = {"energy": atoms.get_potential_energy()}
            atoms.calc = None
    for split in ("train", "val"):
        chosen = dataset.origins(split)[:, 1]
        for suffix, prefix in (("", ""), ("_m", "REF_")):
            written = []
            for index in chosen:
                atoms = ase.Atoms(frames[index].numbers, frames[index].positions)
                atoms.info[f"{prefix}energy"] = frames[index].info["energy"]
                atoms.arrays[f"{prefix}forces"] = forces[index]
                written.append(atoms)
            ase.io.write(work / f"{split}{suffix}.xyz", written)


def reached(points: Points, budgets: list[float]) -> list[float]:
    """The best value up to each time; NaN where there is none."""
    return [min((v for t, v in points if t <= budget), default=float("nan")) for budget in budgets]


@contextlib.contextmanager
def _running(command: list[str], work: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def graph_pes(command: list[str], work: Path, seconds: float) -> Points:
    """From its table: the time since the fit began, and the error of the epoch."""
    points: Points = []
    columns: list[str] = []
    with _running(command, work) as process:
        assert process.stdout is not None
        for line in process.stdout:
            words = line.split()
            if words[:2] == ["epoch", "time"]:
                columns = words
            elif columns and words and words[0].isdigit():
                points.append((float(words[1]), 1000 * float(words[columns.index("forces_mae")])))
                if points[-1][0] > seconds:
                    break
    print(f"{' '.join(command[1:])}: {len(points)} epochs", flush=True)
    return points


def mace(command: list[str], work: Path, seconds: float) -> Points:
    """From its log, an entry an epoch; the one before the first is when it starts."""
    points: Points = []
    started = 0.0
    with _running([*command], work) as process:
        os.set_blocking(process.stdout.fileno(), False)  # type: ignore[union-attr]
        while process.poll() is None and not (points and points[-1][0] > seconds):
            time.sleep(0.2)
            with contextlib.suppress(TypeError):  # nothing to read
                process.stdout.read()  # type: ignore[union-attr]
            for file in (work / "mace" / "results").glob("*_train.txt"):
                rows = [
                    json.loads(row) for row in file.read_text().splitlines(True) if row[-1:] == "\n"
                ]
                errors = [1000 * row["mae_f"] for row in rows if row["mode"] == "eval"]
                started = started or (time.perf_counter() if errors else 0.0)
                now = time.perf_counter() - started
                points += [(now, error) for error in errors[1 + len(points) :]]
    print(f"mace: {len(points)} epochs", flush=True)
    return points


if __name__ == "__main__":
    sys.exit(main())
