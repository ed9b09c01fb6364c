"""How fast batches are, beside peers and the naïve way.

    python tests/benchmarks/bench_loader.py rates         # QM9-like molecules, from memory and disk
    python tests/benchmarks/bench_loader.py peers         # small molecules and cells, beside peers
    python tests/benchmarks/bench_loader.py large 20      # a dataset of 20 GB: memory, first step
    python tests/benchmarks/bench_loader.py ranks         # four processes that share one dataset

Peers are installed from PyPI into environments of their own, under the folder that
RUNNER_BENCH_DIR names (or a temporary one, made anew each time). Ours and theirs are measured in
turns, in one run; the median counts.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import psutil
import torch
from ase import Atoms
from ase.collections import g2
from ase.neighborlist import neighbor_list

from runner.config import load_config
from runner.epochs import Budget, EpochOrder
from runner.fields import LABELS
from runner.loader import BatchLoader, InMemory, Shared, Split
from runner.prepare import prepare
from runner.store import SCHEMA_VERSION, PreparedDataset, write_dataset
from runner.structures import Structures
from runner.terminal import Terminal

CUTOFF = 5.0
REPEATS = 5
TORCH = "torch>=2.11,<2.14"

GRAPH_PES = """
import sys, time, json, ase.io, torch, warnings
warnings.filterwarnings("ignore")
from graph_pes.data.datasets import ASEToGraphsConverter
from graph_pes.data.loader import GraphDataLoader
path, cutoff, batch, seconds = sys.argv[1], *map(float, sys.argv[2:])
atoms = ase.io.read(path, ":")
convert = ASEToGraphsConverter(atoms, cutoff)
graphs = [convert[i] for i in range(len(convert))]   # every list cached
loader = GraphDataLoader(graphs, int(batch), shuffle=True)
print("ready", flush=True)
for _ in sys.stdin:
    start, n = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for b in loader:
            n += len(b.ptr) - 1
            pairs = b.neighbour_list.shape[1]
    print(json.dumps(n / (time.perf_counter() - start)), flush=True)
"""

NEQUIP = """
import sys, time, json, ase.io, torch, warnings
warnings.filterwarnings("ignore")
from nequip.data.dataset import ASEDataset
from nequip.data.transforms import NeighborListTransform, ChemicalSpeciesToAtomTypeMapper
from nequip.data import AtomicDataDict
from torch.utils.data import DataLoader
path, cutoff, batch, seconds = sys.argv[1], *map(float, sys.argv[2:])
symbols = sorted({s for a in ase.io.read(path, ":") for s in a.symbols})
data = ASEDataset(path, [ChemicalSpeciesToAtomTypeMapper(symbols), NeighborListTransform(cutoff)])
frames = [data[i] for i in range(len(data))]   # every list cached
loader = DataLoader(frames, int(batch), shuffle=True, collate_fn=AtomicDataDict.batched_from_list)
print("ready", flush=True)
for _ in sys.stdin:
    start, n = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for b in loader:
            n += len(b["num_atoms"])
    print(json.dumps(n / (time.perf_counter() - start)), flush=True)
"""

PEERS = {
    "graph-pes 1.0.2, lists cached in memory": ("graph-pes==1.0.2", GRAPH_PES),
    "nequip 0.19.1, lists cached in memory": ("nequip==0.19.1", NEQUIP),
}


def main() -> None:
    """Run what is asked for."""
    what = sys.argv[1] if len(sys.argv) > 1 else "rates"
    folder = os.environ.get("RUNNER_BENCH_DIR")
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(folder or temporary)
        work.mkdir(parents=True, exist_ok=True)
        if what == "rates":
            rates(work)
        elif what == "peers":
            peers(work)
        elif what == "large":
            large(work, float(sys.argv[2]) if len(sys.argv) > 2 else 20.0)
        elif what == "ranks":
            ranks(work)
        else:
            sys.exit(__doc__)


# --- data ---------------------------------------------------------------------------------------


def molecules_like_qm9(n: int, seed: int = 0) -> Structures:
    """Molecules of 18 atoms, grown at random with the bond lengths of organic ones."""
    rng = np.random.default_rng(seed)
    grown = []
    for _ in range(300):
        atoms = [np.zeros(3)]
        while len(atoms) < 18:
            candidate = atoms[rng.integers(len(atoms))] + rng.normal(size=3) * 0.9
            if min(np.linalg.norm(candidate - other) for other in atoms) > 0.95:
                atoms.append(candidate)
        grown.append(atoms)
    positions = np.array(grown)[rng.integers(0, 300, n)].reshape(-1, 3)
    positions += rng.normal(size=positions.shape) * 0.05
    return Structures(
        np.arange(n + 1) * 18,
        {
            "atomic_numbers": rng.choice([1, 6, 7, 8], 18 * n).astype(np.uint8),
            "positions": positions,
            "forces": rng.normal(size=positions.shape),
        },
        {
            "energy": rng.normal(size=n),
            "source": np.zeros(n, np.int16),
            "source_index": np.arange(n),
        },
    )


def stored(path: Path, structures: Structures) -> PreparedDataset:
    """A dataset of one split, as `runner prepare` would write it."""
    if not path.exists():
        n = len(structures)
        coverage = {name: n for name in LABELS if name in {"energy", "forces"}}
        attributes = {
            "schema_version": SCHEMA_VERSION,
            "splits": {"train": [0, n], "val": [n, n], "test": [n, n]},
            "statistics": {"coverage": coverage},
        }
        write_dataset(path, structures, attributes, lambda picture: picture.write_bytes(b""))
    return PreparedDataset(path)


def of_ase(frames: list[Atoms]) -> Structures:
    """Frames with forces and energies as flat arrays."""
    n = len(frames)
    periodic = any(atoms.pbc.any() for atoms in frames)
    cells = {
        "cell": np.array([atoms.cell.array for atoms in frames]),
        "pbc": np.array([atoms.pbc for atoms in frames]),
    }
    return Structures(
        np.concatenate([[0], np.cumsum([len(atoms) for atoms in frames])]),
        {
            "atomic_numbers": np.concatenate([atoms.numbers for atoms in frames]).astype(np.uint8),
            "positions": np.concatenate([atoms.positions for atoms in frames]),
            "forces": np.concatenate([atoms.arrays["forces"] for atoms in frames]),
        },
        {
            "energy": np.array([atoms.info["energy"] for atoms in frames]),
            "source": np.zeros(n, np.int16),
            "source_index": np.arange(n),
        }
        | (cells if periodic else {}),
    )


def small_molecules(n: int = 2100) -> list[Atoms]:
    """Displaced molecules of the G2 collection, 7 atoms on average, as in the peers' table."""
    rng = np.random.default_rng(0)
    known = {"H", "C", "N", "O", "F", "S", "Cl"}
    usable = [g2[name] for name in g2.names]
    usable = [atoms for atoms in usable if len(atoms) > 2 and set(atoms.symbols) <= known]
    return [_labelled(usable[i % len(usable)].copy(), rng) for i in range(n)]


def cells(n: int = 1000) -> list[Atoms]:
    """Distorted triclinic silicon-like cells of 64 to 200 atoms, 20 Å³ an atom."""
    rng = np.random.default_rng(0)
    frames = []
    for _ in range(n):
        size = int(rng.integers(64, 201))
        edge = (20.0 * size) ** (1 / 3)
        cell = edge * (np.eye(3) + rng.uniform(-0.15, 0.15, (3, 3)))
        side = int(np.ceil(size ** (1 / 3)))
        grid = np.array(list(np.ndindex(side, side, side)))[rng.permutation(side**3)[:size]] / side
        frames.append(_labelled(Atoms("Si" * size, grid @ cell, cell=cell, pbc=True), rng))
    return frames


def _labelled(atoms: Atoms, rng: np.random.Generator) -> Atoms:
    atoms.positions += rng.normal(size=atoms.positions.shape) * 0.06
    atoms.arrays["forces"] = rng.normal(size=atoms.positions.shape)
    atoms.info["energy"] = float(rng.normal())
    return atoms


# --- measuring ----------------------------------------------------------------------------------


def our_loader(dataset: PreparedDataset, batch: int, *, keep: bool, ahead: int = 0) -> BatchLoader:
    split = Split(dataset, "train", CUTOFF)
    order = EpochOrder(split.n_structures, Budget("structures", batch), seed=0, block=split.block)
    return BatchLoader(InMemory(split, keep=keep), order, ahead=ahead)


def rate(batches: Callable[[], Iterator[Any]], seconds: float = 0.0) -> float:
    """Structures a second, over whole epochs that take so long at least."""
    start, n = time.perf_counter(), 0
    while True:
        for batch in batches():
            n += batch.n_structures
        took = time.perf_counter() - start
        if took > seconds:
            return n / took


def drop_page_cache(path: Path) -> None:
    """Make the system forget what it has read of some files, so that they come from the disk."""
    os.sync()
    for file in path.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def rates(work: Path, n: int = 300_000) -> None:
    """From memory, from disk, and one structure after the other."""
    dataset = stored(work / "molecules.zarr", molecules_like_qm9(n))
    print(f"{n} molecules of 18 atoms, 5 Å, pairs included, one process, structures/s")
    frames = [
        Atoms("H" * 18, positions)
        for positions in dataset.read_rows(0, 2000).atoms["positions"].reshape(-1, 18, 3)
    ]
    start = time.perf_counter()
    for atoms in frames:
        i, j = neighbor_list("ij", atoms, CUTOFF)
        torch.from_numpy(np.stack([i, j])), torch.from_numpy(atoms.positions).float()
    naive = len(frames) / (time.perf_counter() - start)
    print(f"  naïve: ASE's list of one structure after the other    {naive:10,.0f}")
    for batch in (64, 256):
        memory = our_loader(dataset, batch, keep=True)
        first = rate(lambda: iter(memory))  # noqa: B023
        later = [rate(lambda: iter(memory)) for _ in range(REPEATS)]  # noqa: B023
        stream = our_loader(dataset, batch, keep=False)
        streamed = []
        for _ in range(REPEATS):
            drop_page_cache(dataset.path)
            streamed.append(rate(lambda: iter(stream)))  # noqa: B023
        for name, value in (
            ("memory, first epoch (reads, finds the pairs)", first),
            ("memory, later epochs (lists kept)", statistics.median(later)),
            ("stream, page cache dropped", statistics.median(streamed)),
        ):
            print(f"  batch {batch:3}: {name:46} {value:10,.0f}  {value / naive:6.1f}× naïve")


class Peer:
    """A peer's loader in an environment of its own, that measures itself when asked to."""

    def __init__(self, name: str, work: Path, data: Path, batch: int, seconds: float) -> None:
        requirement, script = PEERS[name]
        environment = work / requirement.replace("==", "-")
        python = environment / "bin" / "python"
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
            install = [str(python), "-m", "pip", "install", "-q", requirement, TORCH]
            subprocess.run(install, check=True)
        arguments = [str(data), str(CUTOFF), str(batch), str(seconds)]
        self.name = name
        self.process = subprocess.Popen(
            [str(python), "-c", script, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        while self.process.stdout.readline().strip() != "ready":
            if self.process.poll() is not None:
                raise RuntimeError(f"{name} does not start")

    def rate(self) -> float:
        """Structures a second."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return float(json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def peers(work: Path, seconds: float = 3.0) -> None:
    """Batches of the same files by us and by others, in turns."""
    for title, frames, batch in (
        ("small molecules (G2, 7 atoms on average), batches of 64", small_molecules(), 64),
        ("cells of 64 to 200 atoms, batches of 16", cells(), 16),
        ("cells of 64 to 200 atoms, batches of 64", cells(), 64),
    ):
        path = work / f"{title.split()[0]}.extxyz"
        ase.io.write(path, frames)
        dataset = stored(work / f"{title.split()[0]}.zarr", of_ase(frames))
        ours = our_loader(dataset, batch, keep=True)
        rate(lambda: iter(ours))  # noqa: B023
        others = [Peer(name, work, path, batch, seconds) for name in PEERS]
        found: dict[str, list[float]] = {}
        for _ in range(REPEATS):
            found.setdefault("ours", []).append(rate(lambda: iter(ours), seconds))  # noqa: B023
            for other in others:
                found.setdefault(other.name, []).append(other.rate())
        for other in others:
            other.close()
        print(f"{title}, shuffled, 5 Å, structures/s")
        middle = {name: statistics.median(values) for name, values in found.items()}
        for name, value in middle.items():
            print(f"  {name:42} {value:10,.0f}   ours / this: {middle['ours'] / value:5.1f}")


# --- large --------------------------------------------------------------------------------------


def large(work: Path, gigabytes: float) -> None:
    """Memory of a stream and of four processes, and the time to the first batch and step."""
    n = int(gigabytes * 1e9 / (18 * 49))
    config = work / f"large-{gigabytes:g}" / "config.toml"
    path = _large_experiment(config, n)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    print(f"{n:,} molecules of 18 atoms, {size / 1e9:.1f} GB on disk, 5 Å, batches of 64")
    for what in ("first batch", "first step", "stream"):
        drop_page_cache(path)
        print("  " + _in_child(what, str(config if what == "first step" else path)), flush=True)


def ranks(work: Path, n: int = 1_000_000) -> None:
    """Memory that four processes take for one dataset, beside four copies."""
    dataset = stored(work / f"molecules-{n}.zarr", molecules_like_qm9(n))
    one = Split(dataset, "train", CUTOFF).bytes_needed()
    print(f"{n:,} molecules of 18 atoms: {one / 1e9:.2f} GB in memory with their lists")
    with tempfile.TemporaryDirectory() as meeting:
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, "--child", "rank", str(dataset.path), meeting, str(r)],
                stdout=subprocess.PIPE,
                text=True,
            )
            for r in range(4)
        ]
        found = [json.loads(process.communicate()[0].splitlines()[-1]) for process in processes]
    shared, own = (sum(f[k] for f in found) / 1e9 for k in ("pss_of_data", "pss_of_the_rest"))
    print(f"  four processes: {shared:.2f} GB of data in all, {own / 4:.2f} GB of their own each")


def _in_child(*arguments: str) -> str:
    found = subprocess.run(
        [sys.executable, __file__, "--child", *arguments],
        check=True,
        capture_output=True,
        text=True,
    )
    return found.stdout.strip().splitlines()[-1]


def _large_experiment(config: Path, n: int) -> Path:
    """An experiment with a prepared dataset of `n` structures; returns the dataset.

    A hundred structures are prepared; then what the dataset says of itself is kept, and its arrays
    are replaced by `n` molecules, the same million again and again in a random order.
    """
    config.parent.mkdir(exist_ok=True)
    if not config.exists():
        few = molecules_like_qm9(100)
        frames = [
            Atoms(
                few.atoms["atomic_numbers"][18 * i : 18 * i + 18],
                few.atoms["positions"][18 * i : 18 * i + 18],
                info={"energy": few.structures["energy"][i]},
            )
            for i in range(100)
        ]
        for i, atoms in enumerate(frames):
            atoms.arrays["forces"] = few.atoms["forces"][18 * i : 18 * i + 18]
        ase.io.write(config.parent / "few.extxyz", frames)
        config.write_text(
            '[prepare]\nname = "large"\n[[prepare.source]]\npath = "few.extxyz"\n'
            'energy = { key = "energy", unit = "eV" }\n'
            'forces = { key = "forces", unit = "eV/angstrom" }\n'
            '[train.potential]\nname = "painn"\nfeatures = 16\n'
            "[train.loss.energy]\n[train.loss.forces]\n[train.batch]\nstructures = 64\n"
        )
    result = prepare(load_config(config), config.parent, Terminal(stderr=True))
    path = Path(result["dataset"])
    attributes = PreparedDataset(path).attributes
    if attributes["splits"]["test"][1] < n:
        shutil.rmtree(path)
        splits = {"train": [0, n - 200], "val": [n - 200, n - 100], "test": [n - 100, n]}
        base = molecules_like_qm9(min(n, 1_000_000))
        rows = np.random.default_rng(1).integers(0, len(base), n)
        attributes = {k: v for k, v in attributes.items() if k != "checksum"} | {"splits": splits}
        write_dataset(path, base, attributes, lambda p: p.write_bytes(b""), order=rows)
    return path


def _child(what: str, path: Path, *further: str) -> None:
    """One measurement in a process of its own."""
    start = time.perf_counter()
    if what == "rank":
        _rank(path, Path(further[0]), int(further[1]))
    elif what == "first batch":
        next(iter(our_loader(PreparedDataset(path), 64, keep=True)))
        print(
            f"to the first batch, kept in memory: {time.perf_counter() - start:.2f} s", flush=True
        )
        os._exit(0)
    elif what == "first step":
        _first_step(path)
    else:
        loader = our_loader(PreparedDataset(path), 64, keep=False)
        n, most = 0, 0
        process = psutil.Process()
        before = process.memory_info().rss
        for number, batch in enumerate(loader):
            n += batch.n_structures
            if number % 200 == 0:
                most = max(most, process.memory_info().rss)
        took = time.perf_counter() - start
        print(
            f"streamed once: {n / took:,.0f} structures/s, at most {most / 1e6:.0f} MB resident "
            f"({before / 1e6:.0f} MB of them before the first batch)"
        )


def _first_step(config: Path) -> None:
    """`runner train` until its first optimiser step is done."""
    from runner import cli
    from runner.training import Training

    started = psutil.Process().create_time()

    def stop(*_: Any) -> None:
        print(f"`runner train`, to the end of its first step: {time.time() - started:.2f} s")
        sys.stdout.flush()
        os._exit(0)

    Training.on_train_batch_end = stop  # type: ignore[method-assign]
    sys.argv = ["runner", "train", str(config), "--data-dir", str(config.parent)]
    cli.main()


def _rank(path: Path, meeting: Path, rank: int) -> None:
    """One of four processes that share a dataset; how much memory is its part."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}/meet", rank=rank, world_size=4
    )
    shared = meeting / "shared"
    shared.mkdir(exist_ok=True)
    split = Split(PreparedDataset(path), "train", CUTOFF)
    source = Shared(split, shared, rank, 4, torch.distributed.barrier)
    order = EpochOrder(split.n_structures, Budget("structures", 64), seed=0, block=split.block)
    for batch in BatchLoader(source, order, rank=rank, n_ranks=4):
        del batch
    torch.distributed.barrier()
    maps = psutil.Process().memory_maps(grouped=False)
    data = sum(m.pss for m in maps if str(shared) in m.path)
    print(json.dumps({"pss_of_data": data, "pss_of_the_rest": sum(m.pss for m in maps) - data}))
    sys.stdout.flush()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        _child(sys.argv[2], Path(sys.argv[3]), *sys.argv[4:])
    else:
        main()
