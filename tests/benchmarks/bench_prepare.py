"""How fast `prepare` is, beside the usual ways: python tests/benchmarks/bench_prepare.py

Prints, for each part, our time, the other's, and the ratio; and the largest resident memory of a
whole `prepare` beside the size of its arrays.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from sklearn.linear_model import LinearRegression

sys.path.insert(0, str(Path(__file__).parents[1]))
from molecules import random_structures, write_extxyz

from runner import sources
from runner.config import SourceConfig, load_config
from runner.prepare import prepare
from runner.self_energies import fit_self_energies
from runner.terminal import Terminal


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Shortest of three runs, and what the last gave."""
    times, result = [], None
    for _ in range(3):
        start = time.perf_counter()
        result = work()
        times.append(time.perf_counter() - start)
    return min(times), result


def say(what: str, ours: float, other: float, name: str) -> None:
    print(f"{what}: {ours:.2f} s, {name} {other:.2f} s, ratio {other / ours:.1f}")


def self_energies(n: int = 1_000_000) -> None:
    """The fit over distinct compositions against the one over structures."""
    rng = np.random.default_rng(0)
    distinct = rng.integers(0, 12, (1000, 5))
    composition = distinct[rng.integers(0, 1000, n)]
    planted = np.array([-13.6, -1029.0, -1485.0, -2042.0, -2713.0])
    energies = composition @ planted + rng.normal(size=n)
    elements = ["H", "C", "N", "O", "F"]
    ours, fit = seconds(lambda: fit_self_energies(composition, energies, elements))
    other, naive = seconds(
        lambda: LinearRegression(fit_intercept=False).fit(composition.astype(float), energies)
    )
    assert np.allclose(list(fit.values.values()), naive.coef_, atol=1e-7)
    say(f"self-energies of {n} structures, with the certificate", ours, other, "over structures")


def extended_xyz(n: int = 3000) -> None:
    """Reading extended XYZ against ASE."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.extxyz"
        write_extxyz(path, random_structures([9 + index % 10 for index in range(n)]))
        config = [
            SourceConfig.model_validate(
                {
                    "path": str(path),
                    "energy": {"key": "energy", "unit": "eV"},
                    "forces": {"key": "forces", "unit": "eV/angstrom"},
                }
            )
        ]
        ours, _ = seconds(lambda: sources.read(sources.locate(config), config, None))
        other, _ = seconds(lambda: ase.io.read(path, ":"))
        say(f"extended XYZ of {n} structures", ours, other, "ase.io.read")


def memory(n: int = 400_000) -> None:
    """Largest resident memory of a whole `prepare`, in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rng = np.random.default_rng(0)
        z = rng.choice([1, 6, 7, 8], size=(n, 18))
        arrays = {
            "N": np.full(n, 18),
            "Z": z,
            "R": rng.normal(size=(n, 18, 3)) * 3,
            "F": rng.normal(size=(n, 18, 3)),
            "E": -30.0 * z.sum(axis=1) + rng.normal(size=n),
        }
        np.savez(folder / "x.npz", **arrays)
        size = sum(array.nbytes for array in arrays.values())
        (folder / "config.toml").write_text(
            '[prepare]\nname = "x"\n[[prepare.source]]\npath = "x.npz"\n'
            'energy = { key = "E", unit = "eV" }\nforces = { key = "F", unit = "eV/angstrom" }\n'
        )
        del arrays, z
        command = [sys.executable, __file__, "--measure", str(folder / "config.toml")]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        took, most = result.stdout.split()[-2:]
        print(
            f"prepare of {n} structures of 18 atoms, {size / 1e9:.2f} GB of arrays: {took} s, "
            f"at most {float(most):.2f} GB of memory"
        )


def measure(config_file: Path) -> None:
    """Time, and the most memory that is not pages of files: those the system takes back."""
    most, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            text = Path("/proc/self/status").read_text()
            most[0] = max(most[0], float(re.findall(r"RssAnon:\s+(\d+) kB", text)[0]) / 1e6)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    prepare(load_config(config_file), config_file.parent / "prepared", Terminal())
    done.set()
    watcher.join()
    print(f"{time.perf_counter() - start:.1f} {most[0]:.3f}")


if __name__ == "__main__":
    if "--measure" in sys.argv:
        measure(Path(sys.argv[-1]))
    else:
        self_energies()
        extended_xyz()
        memory()
