"""The loader: from a prepared dataset to batches, from memory, from disk, or on the device.

Blocks of the split are read in the order in which an epoch needs them, one window ahead, in a
background thread. In memory they stay; from disk they go when they are used up; on a device the
whole split lies there and batches are made there. The batches are the same in all three.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
import psutil
import torch
from jaxtyping import Int64
from torch import Tensor

from runner.batches import (
    SINGLE,
    Batch,
    Block,
    rotated,
    rotation_matrices,
    turns,
)
from runner.epochs import ATOMS_IN_BLOCK, Draw, EpochOrder, Window
from runner.errors import RunError
from runner.fields import FIELDS, LABELS
from runner.store import PreparedDataset

T = TypeVar("T")
Residence = Literal["memory", "stream", "device"]
SHARE_OF_MEMORY = 0.5  # of what is free, that batches may take
READERS = 2  # threads that read blocks at the same time
SAMPLE = 1000  # structures, to estimate from
WINDOWS_AT_HAND = 2  # the one in use, and the one that is read ahead


@dataclass(frozen=True)
class Sample:
    """The first structures of a split.

    Attributes:
        n: how many.
        n_bytes: memory that they take with their neighbour lists.
        n_pairs: that they have, both ways round.
        alone: how many of them have several atoms, none within the cutoff of another.
    """

    n: int
    n_bytes: int
    n_pairs: int
    alone: int


class Split:
    """One split of a dataset, in blocks that are read when they are needed."""

    def __init__(
        self,
        dataset: PreparedDataset,
        name: str,
        cutoff: float,
        n_structures: int | None = None,
        near: float | None = None,
        dtype: torch.dtype = SINGLE,
    ) -> None:
        """Take a split.

        Args:
            dataset: prepared.
            name: train, val or test.
            cutoff: Å, of the neighbour lists.
            n_structures: only the first so many.
            near: Å, up to which architectures see; as far as the lists go, unless given.
            dtype: of the floating-point numbers.
        """
        self.dataset, self.name, self.cutoff, self.near = dataset, name, cutoff, near
        self.dtype = dtype
        self.start, stop = (int(row) for row in dataset.attributes["splits"][name])
        self.n_structures = min(stop - self.start, n_structures or stop)
        self.block = max(1, ATOMS_IN_BLOCK * len(dataset) // max(dataset.n_atoms, 1))

    @property
    def n_blocks(self) -> int:
        """How many blocks it is in."""
        return -(-self.n_structures // self.block)

    def read(self, block: int) -> Block:
        """Read a block, cast it and find its neighbours."""
        first = block * self.block
        last = min(first + self.block, self.n_structures)
        structures = self.dataset.read_rows(self.start + first, self.start + last, origins=False)
        return Block.of(structures, self.cutoff, self.dtype, first, self.near)

    @functools.cached_property
    def sample(self) -> Sample:
        """What its first structures tell."""
        n = min(self.n_structures, SAMPLE)
        if n == 0:
            return Sample(0, 0, 0, 0)
        structures = self.dataset.read_rows(self.start, self.start + n, origins=False)
        block = Block.of(structures, self.near or self.cutoff, self.dtype)
        alone = (np.diff(block.first_pair) == 0) & (np.diff(block.first_atom) > 1)
        if self.near is not None:
            block = Block.of(structures, self.cutoff, self.dtype, near=self.near)
        return Sample(n, block.n_bytes, 2 * int(block.first_pair[-1]), int(alone.sum()))

    def bytes_needed(self) -> int:
        """Memory that all of it takes with its neighbour lists, as its first structures tell."""
        sample = self.sample
        return sample.n_bytes * self.n_structures // sample.n if sample.n else 0


@runtime_checkable
class Opened(Protocol):
    """Structures at hand, of which batches can be made."""

    def make(self, draw: Draw) -> Batch:
        """The batch of some of them."""

    def joined_by(self, others: Opened) -> Opened:
        """These and others."""

    def only(self, numbers: Int64[np.ndarray, " n"]) -> Opened:
        """Some of these."""


@runtime_checkable
class Source(Protocol):
    """Where structures come from."""

    def open(self, blocks: Sequence[int]) -> Opened:
        """Have the structures of some blocks at hand."""

    def pairs(self) -> Int64[np.ndarray, " n_structures"]:
        """What each structure counts in a budget of pairs: one an atom at least."""


@dataclass(frozen=True)
class Stock:
    """Structures in memory.

    Attributes:
        blocks: each with its structures in ascending order.
    """

    blocks: tuple[Block, ...]

    def make(self, draw: Draw) -> Batch:
        """Gather and put together."""
        return self._gather(draw.chosen).batch(draw.rotations)

    def joined_by(self, others: Opened) -> Opened:
        """Both, not copied."""
        return Stock((*self.blocks, *others.blocks)) if isinstance(others, Stock) else self

    def only(self, numbers: Int64[np.ndarray, " n"]) -> Opened:
        """A copy of some of them, so that the others can go."""
        return Stock((self._gather(np.unique(numbers)),) if len(numbers) else ())

    def _gather(self, numbers: np.ndarray) -> Block:
        parts, places = [], []
        for block in self.blocks:
            rows = np.searchsorted(block.index, numbers).clip(max=len(block) - 1)
            here = block.index[rows] == numbers
            if here.all():
                return block.take(rows)
            if here.any():
                parts.append(block.take(rows[here]))
                places.append(np.flatnonzero(here))
        return Block.join(parts).take(np.argsort(np.concatenate(places)))


class InMemory:
    """Blocks that are read when they are first needed, and then stay in memory; or do not stay."""

    def __init__(self, split: Split, *, keep: bool = True) -> None:
        """Begin with none.

        Args:
            split: to read from.
            keep: whether blocks stay.
        """
        self.split, self.keep = split, keep
        self._blocks: dict[int, Block] = {}
        self._all: Block | None = None  # if they are all in one window

    def open(self, blocks: Sequence[int]) -> Stock:
        """Read those that are not there."""
        if self._all is None:
            read = self._map(self.block, blocks)
            joined = Block.join(read)
            if not self.keep or len(blocks) < self.split.n_blocks:
                return Stock((joined,))
            self._blocks.clear()
            self._all = joined
        return Stock((self._all,))

    def block(self, number: int) -> Block:
        """One block."""
        if number in self._blocks:
            return self._blocks[number]
        block = self.split.read(number)
        if self.keep:
            self._blocks[number] = block
        return block

    def pairs(self) -> Int64[np.ndarray, " n_structures"]:
        """Read all blocks for it."""

        def count(number: int) -> np.ndarray:
            return pairs_in_budget(self.block(number))

        return _joined(self._map(count, range(self.split.n_blocks)))

    def _map(self, function: Callable[[int], T], blocks: Sequence[int]) -> list[T]:
        with ThreadPoolExecutor(READERS, "blocks") as pool:
            return list(pool.map(function, blocks))


def pairs_in_budget(block: Block) -> Int64[np.ndarray, " n_structures"]:
    """Neighbours of all atoms of each structure, or its atoms if they are more.

    So batches are bounded whatever the structures look like.
    """
    counted: np.ndarray = np.maximum(2 * np.diff(block.first_pair), np.diff(block.first_atom))
    return counted


class Shared(InMemory):
    """Blocks in memory that all processes of a machine have in common.

    Each process reads its share of the blocks and writes it to a folder; then all map all files,
    and the folder goes: the memory is freed when the last process ends, however it ends.
    """

    def __init__(
        self, split: Split, folder: Path, rank: int, n_ranks: int, barrier: Callable[[], None]
    ) -> None:
        """Read all of the split, together.

        Args:
            split: to read from.
            folder: there already, and the same for all processes of this machine.
            rank: number of this process on this machine.
            n_ranks: how many there are on it.
            barrier: returns when all of them have called it.
        """
        super().__init__(split)
        for number in range(rank, split.n_blocks, n_ranks):
            _write_block(split.read(number), folder / f"{split.name}-{number}")
        barrier()
        for number in range(split.n_blocks):
            self._blocks[number] = _map_block(folder / f"{split.name}-{number}")
        barrier()
        if rank == 0:
            for number in range(split.n_blocks):
                (folder / f"{split.name}-{number}").unlink()


TABLES = ("atoms", "structures", "pairs", "labelled")
POINTERS = ("index", "first_atom", "first_pair")


def _write_block(block: Block, path: Path) -> None:
    tables = {
        table: {name: torch.from_numpy(array) for name, array in getattr(block, table).items()}
        for table in TABLES
    }
    torch.save(tables | {name: torch.from_numpy(getattr(block, name)) for name in POINTERS}, path)


def _map_block(path: Path) -> Block:
    """A block whose arrays lie in a file, shared by all processes that map it."""
    content = torch.load(path, mmap=True, weights_only=True)
    return Block(
        *(content[name].numpy() for name in POINTERS),
        *({key: tensor.numpy() for key, tensor in content[name].items()} for name in TABLES),
    )


class OnDevice:
    """A whole split on a device, where its batches are made."""

    def __init__(self, split: Split, device: torch.device | str) -> None:
        """Read the split, and move it."""
        self.device = torch.device(device)
        blocks = [split.read(number) for number in range(split.n_blocks)]
        self._sizes = _joined([np.diff(block.first_atom) for block in blocks])
        self._n_pairs = _joined([np.diff(block.first_pair) for block in blocks])
        self._budget = _joined([pairs_in_budget(block) for block in blocks])
        self._first_atom = self._move(np.cumsum(self._sizes) - self._sizes)
        self._first_pair = self._move(np.cumsum(self._n_pairs) - self._n_pairs)
        self._labelled: dict[str, np.ndarray] = {}
        self._tables: dict[str, dict[str, Tensor]] = {}
        if blocks:
            whole = Block.join(blocks)
            self._labelled = whole.labelled
            for table in ("atoms", "structures", "pairs"):
                arrays: dict[str, np.ndarray] = getattr(whole, table)
                self._tables[table] = {name: self._move(array) for name, array in arrays.items()}

    def _move(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, non_blocking=True)

    def open(self, blocks: Sequence[int]) -> OnDevice:  # noqa: ARG002
        """All are at hand."""
        return self

    def joined_by(self, others: Opened) -> OnDevice:  # noqa: ARG002
        """All are at hand."""
        return self

    def only(self, numbers: Int64[np.ndarray, " n"]) -> OnDevice:  # noqa: ARG002
        """All are at hand."""
        return self

    def make(self, draw: Draw) -> Batch:
        """Gather on the device; sizes are known on the host, so that nothing waits for it."""
        sizes, n_pairs = self._sizes[draw.chosen], self._n_pairs[draw.chosen]
        chosen, n_atoms = self._move(draw.chosen), self._move(sizes)
        structure, atoms = self._rows(self._first_atom[chosen], sizes)
        pair_structure, pairs = self._rows(self._first_pair[chosen], n_pairs)
        found = {name: array[chosen] for name, array in self._tables["structures"].items()}
        found |= {name: array[atoms] for name, array in self._tables["atoms"].items()}
        found |= {name: array[pairs] for name, array in self._tables["pairs"].items()}
        first = (torch.cumsum(n_atoms, 0) - n_atoms)[pair_structure]
        if draw.rotations is not None:
            matrices = self._move(rotation_matrices(draw.rotations))
            for name in (name for name in found if turns(name)):
                turn = matrices[structure] if FIELDS[name].per == "atom" else matrices
                exact = found[name].to(matrices.dtype)
                found[name] = rotated(name, exact, turn).to(found[name].dtype)
        masks = {name: mask[draw.chosen] for name, mask in self._labelled.items()}
        return Batch(
            atomic_numbers=found["atomic_numbers"].to(torch.int64),
            positions=found["positions"],
            structure=structure,
            n_atoms=n_atoms,
            source=found["source"].to(torch.int64),
            index=chosen,
            half_pairs=torch.stack([found["center"] + first, found["neighbor"] + first]),
            labels={name: found[name] for name in LABELS if name in found},
            labelled={name: self._move(mask) for name, mask in masks.items() if not mask.all()},
            cell=found.get("cell"),
            half_shifts=found.get("shift"),
            half_near=found["near"].nonzero().squeeze(-1) if "near" in found else None,
        )

    def pairs(self) -> Int64[np.ndarray, " n_structures"]:
        """Known already."""
        return self._budget

    def _rows(self, first: Tensor, counts: np.ndarray) -> tuple[Tensor, Tensor]:
        """Which structure each row belongs to, and where it lies."""
        total = int(counts.sum())
        per_structure = self._move(counts)
        structure = torch.repeat_interleave(per_structure, output_size=total)
        starts = torch.cumsum(per_structure, 0) - per_structure
        return structure, torch.arange(total, device=self.device) + (first - starts)[structure]


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


class BatchLoader:
    """The batches of one process, epoch by epoch.

    Process r of R takes batches r, r + R, r + 2R … of an epoch; where these do not come out even,
    the processes without one get a batch of no structure, so that all take as many steps.

    Attributes:
        epoch: that comes next, or is under way.
        waited: seconds that this epoch's batches have been waited for.
    """

    def __init__(
        self, source: Source, order: EpochOrder, *, rank: int = 0, n_ranks: int = 1, ahead: int = 0
    ) -> None:
        """Load from a source.

        Args:
            source: of the structures.
            order: of the batches.
            rank: number of this process.
            n_ranks: how many there are.
            ahead: threads that make batches ahead; 0 makes each when it is asked for.
        """
        self.source, self.order = source, order
        self.rank, self.n_ranks, self.ahead = rank, n_ranks, ahead
        self.epoch = 0
        self.waited = 0.0
        self._done = 0  # batches of this epoch that all processes together have had

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; one that is under way goes on where it is."""
        if epoch != self.epoch:
            self.epoch, self._done = epoch, 0

    def __len__(self) -> int:
        return -(-self.order.n_batches(self.epoch) // self.n_ranks)

    def state_dict(self) -> dict[str, int]:
        """Where the loader is: the epoch, and how many of its batches have been taken."""
        return {"epoch": self.epoch, "batches": self._done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a state; the number of processes may be another one."""
        self.epoch, self._done = state["epoch"], state["batches"]

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the epoch; once its last batch is out, the next one is under way."""
        self.waited = 0.0
        n_batches = self.order.n_batches(self.epoch)
        steps = -(-(n_batches - self._done) // self.n_ranks)
        with contextlib.closing(self._batches(n_batches)) as batches:
            for step in range(1, steps + 1):
                asked = time.perf_counter()
                batch = next(batches)
                self._done += self.n_ranks
                if step == steps:  # nobody may come back to ask whether there are more
                    batches.close()
                    self.epoch, self._done = self.epoch + 1, 0
                self.waited += time.perf_counter() - asked
                yield batch

    def _batches(self, n_batches: int) -> Generator[Batch, None, None]:
        begin = self._done
        mine = range(begin + self.rank, n_batches, self.n_ranks)
        steps = -(-(n_batches - begin) // self.n_ranks)
        made, left, batch = 0, None, None
        with (
            _Ahead(self._windows(begin)) as windows,
            ThreadPoolExecutor(max(self.ahead, 1), "batches") as pool,
        ):
            pending: deque[Future[Batch]] = deque()
            for number, window, opened in windows:
                at_hand = opened if left is None else opened.joined_by(left)
                for place, draw in enumerate(window.batches, number):
                    if place not in mine:
                        continue
                    if self.ahead:
                        pending.append(pool.submit(at_hand.make, draw))
                    if not self.ahead or len(pending) > self.ahead:
                        made += 1
                        batch = pending.popleft().result() if self.ahead else at_hand.make(draw)
                        yield batch
                left = at_hand.only(window.left)
                windows.more()
            while pending:
                made += 1
                batch = pending.popleft().result()
                yield batch
            if made < steps:
                yield (batch or at_hand.make(Draw(np.array([self._any(window)])))).none()

    def _any(self, window: Window) -> int:
        """A structure that is at hand, in an epoch that has no batch for this process."""
        return window.blocks[0] * self.order.block

    def _windows(self, begin: int) -> Iterator[tuple[int, Window, Opened]]:
        """Number of its first batch, window, structures of it: of those that are not done."""
        number, left = 0, np.empty(0, np.int64)
        for window in self.order.windows(self.epoch):
            if number + len(window.batches) > begin:
                opened = self.source.open(window.blocks)
                if len(left):  # of windows that were done before this start
                    needed = np.unique(left // self.order.block).tolist()
                    opened = opened.joined_by(self.source.open(needed).only(left))
                yield number, window, opened
                left = np.empty(0, np.int64)
            else:
                left = window.left
            number += len(window.batches)


class _Ahead:
    """Runs an iterator in a thread, so many items ahead as `more` has allowed."""

    def __init__(self, items: Iterator[tuple[int, Window, Opened]]) -> None:
        self._items = items
        self._found: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._allowed = threading.Semaphore(WINDOWS_AT_HAND)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="blocks", daemon=True)

    def more(self) -> None:
        """Allow one more."""
        self._allowed.release()

    def __enter__(self) -> _Ahead:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._allowed.release()
        self._thread.join()

    def __iter__(self) -> Iterator[tuple[int, Window, Opened]]:
        while True:
            try:
                found = self._found.get(timeout=1)
            except queue.Empty:
                if self._thread.is_alive():
                    continue
                raise RunError("the thread that reads the dataset ended unexpectedly") from None
            if found is None:
                return
            if isinstance(found, BaseException):
                raise found
            yield found

    def _run(self) -> None:
        try:
            self._allowed.acquire()
            for item in self._items:
                if self._stopped.is_set():
                    return
                self._found.put(item)
                self._allowed.acquire()
                if self._stopped.is_set():
                    return
            self._found.put(None)
        except BaseException as error:
            self._found.put(error)


def available_memory() -> int:
    """Bytes that this process may still take, with the limit of its control group."""
    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):
        limit, used = (int((group / f"memory.{n}").read_text()) for n in ("max", "current"))
        details = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(details.get("inactive_file", 0)))  # caches give way
    return max(free, 0)


def free_memory(residence: Residence, device: torch.device) -> float:
    """Bytes that there are for the data; a stream takes hardly any."""
    if residence == "device" and device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return np.inf if residence == "stream" else float(available_memory())


def choose_residence(needed: int, device: torch.device) -> Residence:
    """Where data of this size is best: on a GPU if it fits there, else in memory, else on disk."""
    if device.type == "cuda" and needed < SHARE_OF_MEMORY * free_memory("device", device):
        return "device"
    return "memory" if needed < SHARE_OF_MEMORY * available_memory() else "stream"
