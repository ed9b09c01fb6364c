"""The same batches whatever they come from and however many take part, and after any stop."""

from __future__ import annotations

import functools
import gc
import itertools
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from molecules import random_structures, without

from runner import loader, store
from runner.batches import Batch, Block
from runner.epochs import Budget, EpochOrder, Unit
from runner.errors import DatasetError
from runner.loader import (
    BatchLoader,
    InMemory,
    OnDevice,
    Opened,
    Source,
    Split,
    available_memory,
    choose_residence,
)
from runner.store import PreparedDataset, write_dataset

CUTOFF = 4.0
TRAIN, VAL = 61, 14


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PreparedDataset]:
    """Molecules and crystals in several blocks, chunks and shards; some labels missing."""
    rng = np.random.default_rng(0)
    n = TRAIN + VAL
    structures = random_structures(rng.integers(1, 9, n).tolist())
    pbc = rng.integers(0, 2, (n, 3)).astype(bool) & (rng.random(n) < 0.4)[:, None]
    cell = np.where(pbc[:, :, None], np.eye(3) * 5 + rng.uniform(-1, 1, (n, 3, 3)), 0)
    stress = rng.normal(size=(n, 3, 3))
    arrays = structures.structures | {"cell": cell, "pbc": pbc, "stress": stress}
    structures = without(replace(structures, structures=arrays), "forces", [3, 50, 70])
    attributes = {
        "schema_version": store.SCHEMA_VERSION,
        "splits": {"train": [0, TRAIN], "val": [TRAIN, n], "test": [n, n]},
        "statistics": {"coverage": {"energy": n}},
        "sources": [{"name": "made.xyz"}],
    }
    path = tmp_path_factory.mktemp("data") / "x.zarr"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "CHUNK_ROWS", 16)
        patch.setattr(store, "SHARD_ROWS", 64)
        patch.setattr(loader, "ATOMS_IN_BLOCK", 30)
        write_dataset(path, structures, attributes, lambda picture: picture.write_bytes(b""))
        yield PreparedDataset(path)


def _order(split: Split, unit: Unit, *, seed: int | None = 0, rotate: bool = False) -> EpochOrder:
    sizes = None
    if unit == "atoms":
        sizes = split.dataset.sizes(split.name)[: split.n_structures]
    if unit == "pairs":
        sizes = _kept(split, "memory").pairs()
    limit = {"structures": 7, "atoms": 25, "pairs": 400}[unit]
    budget = Budget(unit, limit, sizes)
    return EpochOrder(split.n_structures, budget, seed=seed, block=split.block, rotate=rotate)


def _source(split: Split, residence: str) -> Source:
    if residence == "device":
        return OnDevice(split, "cpu")
    return InMemory(split, keep=residence == "memory")


@functools.cache
def _kept(split: Split, residence: str) -> Source:
    """The same for several tests."""
    return _source(split, residence)


@pytest.fixture(scope="module")
def train(dataset: PreparedDataset) -> Split:
    return Split(dataset, "train", CUTOFF)


def _same(one: Batch, other: Batch) -> bool:
    tensors = [
        {**vars(b), **b.labels, **{f"has {name}": mask for name, mask in b.labelled.items()}}
        for b in (one, other)
    ]
    return tensors[0].keys() == tensors[1].keys() and all(
        torch.equal(a, b) or torch.equal(a.nan_to_num(7e7), b.nan_to_num(7e7))
        for a, b in zip(tensors[0].values(), tensors[1].values(), strict=True)
        if isinstance(a, torch.Tensor)
    )


def _all_same(ones: list[Batch], others: list[Batch]) -> bool:
    return len(ones) == len(others) and all(map(_same, ones, others))


@pytest.fixture(scope="module")
def reference(train: Split) -> dict[tuple[Unit, bool], list[list[Batch]]]:
    """Two epochs of each kind, by one process from memory."""
    found: dict[tuple[Unit, bool], list[list[Batch]]] = {}
    for unit, rotate in itertools.product(("structures", "atoms", "pairs"), (False, True)):
        assert train.n_blocks > 2 * 4  # several windows
        one = BatchLoader(_kept(train, "memory"), _order(train, unit, rotate=rotate))
        epochs = []
        for epoch in (0, 1):
            one.set_epoch(epoch)
            epochs.append(list(one))
        found[unit, rotate] = epochs
    return found


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    unit=st.sampled_from(["structures", "atoms", "pairs"]),
    rotate=st.booleans(),
    residence=st.sampled_from(["memory", "stream", "device"]),
    workers=st.sampled_from([0, 1, 4]),
    ranks=st.sampled_from([1, 2, 3]),
    again=st.sampled_from([1, 2, 3]),
    stop=st.integers(0, 12),
)
def test_the_batches_are_the_same_whatever_they_come_from_and_after_a_stop(
    train: Split,
    reference: dict[tuple[Unit, bool], list[list[Batch]]],
    unit: Unit,
    rotate: bool,
    residence: str,
    workers: int,
    ranks: int,
    again: int,
    stop: int,
) -> None:
    """Epoch 1 by `ranks` processes up to a stop, then by `again` processes that are new."""
    expected = reference[unit, rotate][1]

    def loaders(n: int) -> list[BatchLoader]:
        order = _order(train, unit, rotate=rotate)
        source = (_source if residence == "stream" else _kept)(train, residence)
        found = [BatchLoader(source, order, rank=r, n_ranks=n, ahead=workers) for r in range(n)]
        for one in found:
            one.set_epoch(1)
        return found

    first = loaders(ranks)
    steps = min(stop, len(first[0]) - 1)
    taken = [list(itertools.islice(iter(one), steps)) for one in first]
    states = [one.state_dict() for one in first]
    assert all(state == states[0] for state in states)
    second = loaders(again)
    for one in second:
        one.load_state_dict(states[0])
    rest = [list(one) for one in second]
    batches = [batch for step in zip(*taken, strict=True) for batch in step]
    batches += [batch for step in zip(*rest, strict=True) for batch in step]
    assert _all_same([batch for batch in batches if batch.n_structures], expected)
    assert all(one.state_dict() == {"epoch": 2, "batches": 0} for one in second)


def test_every_array_of_every_batch_is_the_stores_cast_once(
    dataset: PreparedDataset, reference: dict[tuple[Unit, bool], list[list[Batch]]]
) -> None:
    stored = dataset.read("train")
    seen = []
    for batch in reference["atoms", False][0]:
        numbers = batch.index.numpy()
        seen += numbers.tolist()
        part = stored.take(numbers)
        assert np.array_equal(batch.positions, part.atoms["positions"].astype(np.float32))
        assert np.array_equal(batch.atomic_numbers, part.atoms["atomic_numbers"])
        assert np.array_equal(batch.cell, part.structures["cell"].astype(np.float32))
        for name, label in batch.labels.items():
            array = part.atoms.get(name, part.structures.get(name))
            assert array is not None
            assert label.dtype == torch.float32
            assert np.array_equal(label, array.astype(np.float32), equal_nan=True)
        lacking = [n for n in numbers if n in (3, 50)]
        assert ("forces" in batch.labelled) == bool(lacking)
    assert sorted(seen) == list(range(TRAIN))


def test_processes_without_a_batch_get_one_of_no_structure(dataset: PreparedDataset) -> None:
    split = Split(dataset, "val", CUTOFF)
    order = EpochOrder(VAL, Budget("structures", 6), seed=None, block=split.block)
    per_rank = [
        list(BatchLoader(InMemory(split), order, rank=rank, n_ranks=5)) for rank in range(5)
    ]
    assert [[b.n_structures for b in batches] for batches in per_rank] == [[6], [6], [2], [0], [0]]
    empty = per_rank[4][0]
    assert empty.pairs.shape == (2, 0)
    assert empty.labels.keys() == per_rank[0][0].labels.keys()
    assert len(BatchLoader(InMemory(split), order, n_ranks=5)) == 1


def test_the_length_is_the_number_of_batches_and_an_epoch_begins_anew(
    dataset: PreparedDataset,
) -> None:
    split = Split(dataset, "train", CUTOFF)
    for unit in ("structures", "atoms", "pairs"):
        one = BatchLoader(InMemory(split), _order(split, unit))
        assert len(one) == len(list(one))
        assert one.epoch == 1
        assert len(one) == len(list(one))


def test_an_empty_split_has_no_batches(dataset: PreparedDataset) -> None:
    split = Split(dataset, "test", CUTOFF)
    order = EpochOrder(0, Budget("structures", 6), seed=None, block=split.block)
    for residence in ("memory", "stream", "device"):
        assert list(BatchLoader(_source(split, residence), order)) == []
    assert split.bytes_needed() == 0


def test_only_the_first_structures_of_a_split_if_asked(dataset: PreparedDataset) -> None:
    split = Split(dataset, "train", CUTOFF, n_structures=11)
    one = BatchLoader(InMemory(split), _order(split, "structures"))
    assert sorted(i for batch in one for i in batch.index.tolist()) == list(range(11))


def test_a_stream_lets_go_of_what_is_used_up(dataset: PreparedDataset) -> None:
    split = Split(dataset, "train", CUTOFF)
    alive: list[int] = []
    most = 0

    class Counted(Split):
        def read(self, block: int) -> Block:
            nonlocal most
            found = super().read(block)
            number = object.__new__(_Alive)
            number.where = alive
            alive.append(1)
            found.atoms["counted"] = np.zeros(int(found.first_atom[-1]))
            object.__setattr__(found, "guard", number)
            most = max(most, len(alive))
            return found

    counted = Counted(dataset, "train", CUTOFF)
    for batch in BatchLoader(InMemory(counted, keep=False), _order(split, "structures")):
        del batch
    gc.collect()
    assert most <= 3 * 4  # windows at hand and one being read, of four blocks each
    assert counted.n_blocks > most
    assert not alive


class _Alive:
    where: list[int]

    def __del__(self) -> None:
        self.where.pop()


class _Failing:
    """A source that cannot read its third window."""

    def __init__(self, source: InMemory, error: BaseException) -> None:
        self.source, self.error, self.opened = source, error, 0

    def open(self, blocks: Any) -> Opened:
        self.opened += 1
        if self.opened == 3:
            raise self.error
        return self.source.open(blocks)

    def pairs(self) -> np.ndarray:
        return self.source.pairs()


@pytest.mark.parametrize("error", [DatasetError("no such chunk"), MemoryError(), SystemExit(3)])
@pytest.mark.parametrize("workers", [0, 2])
def test_what_goes_wrong_in_the_background_is_raised_where_the_batch_is_asked_for(
    dataset: PreparedDataset, error: BaseException, workers: int
) -> None:
    split = Split(dataset, "train", CUTOFF)
    before = threading.active_count()
    source = _Failing(InMemory(split), error)
    batches = iter(BatchLoader(source, _order(split, "structures"), ahead=workers))
    with pytest.raises(type(error)):
        for _ in batches:
            pass
    assert threading.active_count() == before


def test_a_worker_that_fails_says_why(
    dataset: PreparedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = Split(dataset, "train", CUTOFF)

    def fails(*_: Any) -> None:
        raise ValueError("this worker is dead")

    monkeypatch.setattr(Block, "batch", fails)
    with pytest.raises(ValueError, match="this worker is dead"):
        list(BatchLoader(InMemory(split), _order(split, "structures"), ahead=3))


def test_a_loop_that_is_left_early_leaves_no_thread(dataset: PreparedDataset) -> None:
    split = Split(dataset, "train", CUTOFF)
    before = threading.active_count()
    for workers in (0, 2):
        batches = iter(BatchLoader(InMemory(split), _order(split, "structures"), ahead=workers))
        next(batches)
        assert threading.active_count() > before
        del batches
        gc.collect()
        assert threading.active_count() == before


def test_a_reader_that_vanishes_is_no_hang(
    dataset: PreparedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = Split(dataset, "train", CUTOFF)
    monkeypatch.setattr(loader._Ahead, "_run", lambda _: None)
    with pytest.raises(Exception, match="the thread that reads the dataset ended unexpectedly"):
        list(BatchLoader(InMemory(split), _order(split, "structures")))


def test_the_time_spent_waiting_is_measured(dataset: PreparedDataset) -> None:
    one = BatchLoader(
        InMemory(Split(dataset, "train", CUTOFF)),
        _order(Split(dataset, "train", CUTOFF), "structures"),
    )
    assert one.waited == 0
    list(one)
    first = one.waited
    assert first > 0
    list(one)
    assert 0 < one.waited != first


def _resources() -> tuple[int, int, int]:
    gc.collect()
    process = psutil.Process()
    return process.memory_info().rss, process.num_fds(), threading.active_count()


@pytest.mark.parametrize("residence", ["memory", "stream", "device"])
def test_200_epochs_take_no_more_memory_or_files_than_20(
    dataset: PreparedDataset, residence: str
) -> None:
    split = Split(dataset, "train", CUTOFF, 8 if residence == "stream" else None)
    one = BatchLoader(_source(split, residence), _order(split, "atoms"), ahead=1)
    for epoch in range(200):
        one.set_epoch(epoch)
        for batch in one:
            del batch
        if epoch == 20:
            before = _resources()
    after = _resources()
    assert after[0] < before[0] + 30e6
    assert after[1:] == before[1:]


def test_the_place_is_chosen_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert 0 < available_memory() <= psutil.virtual_memory().total
    monkeypatch.setattr(loader, "available_memory", lambda: 1000)
    assert choose_residence(499, cpu) == "memory"
    assert choose_residence(500, cpu) == "stream"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (100, 200))
    gpu = torch.device("cuda", 0)
    assert [choose_residence(n, gpu) for n in (49, 50, 500)] == ["device", "memory", "stream"]


def test_the_memory_needed_is_estimated(dataset: PreparedDataset) -> None:
    split = Split(dataset, "train", CUTOFF)
    blocks = [split.read(number) for number in range(split.n_blocks)]
    assert split.bytes_needed() == pytest.approx(sum(b.n_bytes for b in blocks), rel=0.1)
    few = Split(dataset, "train", CUTOFF)
    few.n_structures = 30
    assert few.bytes_needed() == pytest.approx(split.bytes_needed() * 30 / TRAIN, rel=0.3)


def _share(rank: int, n_ranks: int, path: str, folder: str, results: Any) -> None:
    """One of several processes that share the blocks of a split in memory."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "GLOO_SOCKET_IFNAME": "lo"}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=n_ranks
    )
    loader.ATOMS_IN_BLOCK = 30
    split = Split(PreparedDataset(Path(path)), "train", CUTOFF)
    shared = Path(folder) / "shared"
    shared.mkdir(exist_ok=True)
    source = loader.Shared(split, shared, rank, n_ranks, torch.distributed.barrier)
    order = _order(split, "structures")
    numbers = [batch.index.tolist() for batch in BatchLoader(source, order)]
    own = split.read(3)
    mapped = source.block(3)
    same = all(np.array_equal(own.atoms[k], mapped.atoms[k], equal_nan=True) for k in own.atoms)
    maps = [m.path for m in psutil.Process().memory_maps(grouped=False) if folder in m.path]
    torch.distributed.barrier()
    results.put((numbers, same, len(set(maps)), len(list(shared.iterdir()))))
    torch.distributed.destroy_process_group()


def test_processes_of_a_machine_share_one_copy(dataset: PreparedDataset, tmp_path: Path) -> None:
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    processes = [
        context.Process(target=_share, args=(r, 2, str(dataset.path), str(tmp_path), results))
        for r in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0]
    found = [results.get() for _ in processes]
    split = Split(dataset, "train", CUTOFF)
    one = BatchLoader(InMemory(split), _order(split, "structures"))
    expected = [batch.index.tolist() for batch in one]
    for numbers, same, maps, files in found:
        assert numbers == expected
        assert same
        assert maps == split.n_blocks  # each block is a mapped file …
        assert files == 0  # … which has no name any more


@pytest.mark.parametrize("residence", ["memory", "stream", "device"])
def test_pairs_that_the_architecture_sees_are_marked(
    dataset: PreparedDataset, residence: str
) -> None:
    split = Split(dataset, "train", CUTOFF, near=2.0)
    batches = list(BatchLoader(_source(split, residence), _order(split, "structures")))
    assert batches
    for batch in batches:
        i, j = batch.half_pairs
        separation = batch.positions[i] - batch.positions[j]
        if batch.half_shifts is not None and batch.cell is not None:
            cells = batch.cell[batch.structure[i]]
            separation -= torch.einsum("pk,pkx->px", batch.half_shifts.float(), cells)
        expected = (separation.norm(dim=-1) < 2.0).nonzero().squeeze(-1)
        assert batch.half_near is not None
        assert torch.equal(batch.half_near, expected)
        assert torch.equal(batch.nearest().half_pairs, batch.half_pairs[:, expected])
