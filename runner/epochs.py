r"""Which structures make up each batch of an epoch, given data, seed, epoch and budget alone.

A split lies shuffled on disk, in blocks of consecutive structures. An epoch takes the blocks in a
random order, a few of them at a time (a window), and shuffles the structures of a window. So what
is read forwards from a disk and what lies in memory come in the same order, and of a small split
every order is equally likely. Nothing here depends on how many processes take part.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int, Int64, Shaped

ATOMS_IN_BLOCK = 1 << 17
BLOCKS_IN_WINDOW = 4
WELL_FILLED = 0.98
WHOLE = 1 << 32  # a weight of one, in whole numbers: sums of them are exact

Unit = Literal["structures", "atoms", "pairs"]


@dataclass(frozen=True)
class Budget:
    """How much a batch holds at most.

    Attributes:
        unit: what is counted.
        limit: that many are in a batch at most.
        sizes: of atoms or pairs, how many each structure has.
    """

    unit: Unit
    limit: int
    sizes: Shaped[np.ndarray, " n_structures"] | None = None


@dataclass(frozen=True)
class Draw:
    """The structures of one batch.

    Attributes:
        chosen: their numbers in the split; one may come twice if structures are weighted.
        rotations: a random unit quaternion for each, if they are to be rotated.
    """

    chosen: Int64[np.ndarray, " n"]
    rotations: Float[np.ndarray, "n 4"] | None = None

    def __len__(self) -> int:
        return len(self.chosen)

    def part(self, rows: np.ndarray | slice) -> Draw:
        """Some of them."""
        turned = None if self.rotations is None else self.rotations[rows]
        return Draw(self.chosen[rows], turned)

    def after(self, first: Draw | None) -> Draw:
        """`first`, then these."""
        if first is None or not len(first):
            return self
        both = None
        if self.rotations is not None and first.rotations is not None:
            both = np.concatenate([first.rotations, self.rotations])
        return Draw(np.concatenate([first.chosen, self.chosen]), both)


@dataclass(frozen=True)
class Window:
    """A stretch of an epoch.

    Attributes:
        blocks: that its structures are of, beside those that the window before has left.
        batches: in their order.
        left: structures that go into batches of the next window.
    """

    blocks: list[int]
    batches: list[Draw]
    left: Int64[np.ndarray, " n_left"]


class EpochOrder:
    """The batches of every epoch of a split.

    Every structure comes exactly once an epoch, unless structures are weighted: then one of weight
    w comes ⌊w⌋ or ⌈w⌉ times, w times on average, and an epoch is as long as without weights.
    """

    def __init__(
        self,
        n_structures: int,
        budget: Budget,
        *,
        seed: int | None,
        block: int | None = None,
        weights: Float[np.ndarray, " n_structures"] | None = None,
        rotate: bool = False,
    ) -> None:
        """Order a split.

        Args:
            n_structures: those from 0 to this number take part.
            budget: of a batch.
            seed: of the shuffling; None leaves the structures as they lie.
            block: structures in a block; None puts all in one.
            weights: how often each structure is to come, relative to the others.
            rotate: whether each structure is rotated at random, each time anew.
        """
        self.n_structures, self.budget, self.seed, self.rotate = n_structures, budget, seed, rotate
        self.block = block or max(n_structures, 1)
        self._weights: np.ndarray | None = None
        if weights is not None:
            relative = weights / weights.max()  # sums of what is huge may overflow
            shares = relative / relative.mean() * WHOLE
            self._weights = shares.round().astype(np.int64)
        self._n_batches: tuple[int, int] | None = None  # (epoch, its batches)

    @property
    def n_blocks(self) -> int:
        """How many blocks the split is in."""
        return -(-self.n_structures // self.block)

    def structures_of(self, block: int) -> tuple[int, int]:
        """First structure of a block, and the one after its last."""
        return block * self.block, min((block + 1) * self.block, self.n_structures)

    def n_batches(self, epoch: int) -> int:
        """Batches of one epoch."""
        if self.budget.unit == "structures":
            return -(-self._n_drawn(epoch) // self.budget.limit)
        if self._n_batches is None or self._n_batches[0] != epoch:
            self._n_batches = epoch, sum(len(window.batches) for window in self.windows(epoch))
        return self._n_batches[1]

    def windows(self, epoch: int) -> Iterator[Window]:
        """An epoch, window by window."""
        left: Draw | None = None
        n_windows = -(-self.n_blocks // BLOCKS_IN_WINDOW)
        for number, (blocks, drawn) in enumerate(self._drawn(epoch)):
            batches, left = self._cut(drawn.after(left), last=number == n_windows - 1)
            if self.seed is not None and self.budget.sizes is not None:  # packing sorts a little
                order = np.random.default_rng([self.seed, epoch, 3, number])
                batches = [batches[row] for row in order.permutation(len(batches))]
            yield Window(blocks, batches, left.chosen)

    def _drawn(self, epoch: int) -> Iterator[tuple[list[int], Draw]]:
        """Blocks of each window, and its structures in the order in which they come."""
        shuffle = None if self.seed is None else np.random.default_rng([self.seed, epoch])
        turn = np.random.default_rng([self.seed or 0, epoch, 1])
        order = np.arange(self.n_blocks)
        if shuffle is not None and self.n_blocks > 1:
            order = shuffle.permutation(order)
        carried = self._offset(epoch)
        for start in range(0, self.n_blocks, BLOCKS_IN_WINDOW):
            blocks = np.sort(order[start : start + BLOCKS_IN_WINDOW]).tolist()
            chosen = np.concatenate([np.arange(*self.structures_of(block)) for block in blocks])
            if shuffle is not None:
                chosen = chosen[shuffle.permutation(len(chosen))]
            if self._weights is not None:
                ends = carried + np.cumsum(self._weights[chosen])
                times = np.diff(ends // WHOLE, prepend=carried // WHOLE)
                carried = int(ends[-1])
                chosen = np.repeat(chosen, times)
                if shuffle is not None:
                    chosen = chosen[shuffle.permutation(len(chosen))]
            turned = _quaternions(turn, len(chosen)) if self.rotate else None
            yield blocks, Draw(chosen, turned)

    def _offset(self, epoch: int) -> int:
        """Where the cumulated weights of an epoch begin: at random within one."""
        return int(np.random.default_rng([self.seed or 0, epoch, 2]).integers(WHOLE))

    def _n_drawn(self, epoch: int) -> int:
        if self._weights is None:
            return self.n_structures
        return (self._offset(epoch) + int(self._weights.sum())) // WHOLE

    def _cut(self, waiting: Draw, *, last: bool) -> tuple[list[Draw], Draw]:
        """Batches of those that wait, and what is left for the next window."""
        limit, sizes = self.budget.limit, self.budget.sizes
        if sizes is None:
            full = len(waiting) if last else len(waiting) // limit * limit
            starts = range(0, full, limit)
            batches = [waiting.part(slice(start, min(start + limit, full))) for start in starts]
            return batches, waiting.part(slice(full, None))
        batches = [waiting.part(rows) for rows in pack(sizes[waiting.chosen], limit)]
        nothing = waiting.part(slice(0, 0))
        return batches, nothing if last or not batches else batches.pop()


def _quaternions(rng: np.random.Generator, n: int) -> np.ndarray:
    """Uniform over all rotations: normalised Gaussian quadruples."""
    normal = rng.normal(size=(n, 4))
    unit: np.ndarray = normal / np.linalg.norm(normal, axis=1, keepdims=True)
    return unit


def pack(sizes: Int[np.ndarray, " n"], limit: int) -> list[Int64[np.ndarray, " n_batch"]]:
    """Cut items into batches whose sizes sum to `limit` at most.

    One after the other into the same batch if that fills the batches by 98 % on average; otherwise
    each into the fullest batch that it still fits in, and those that stay worst filled are packed
    again, the largest items first (best fit, and best fit decreasing).

    Args:
        sizes: of the items; none is above `limit`.
        limit: of the sum over a batch.

    Returns:
        The numbers of the items of each batch; the batch that is filled least comes last.
    """
    if not len(sizes):
        return []
    ends = np.cumsum(sizes, dtype=np.int64)
    cuts, before = [0], 0
    while cuts[-1] < len(sizes):
        cuts.append(int(ends.searchsorted(before + limit, side="right")))
        before = int(ends[cuts[-1] - 1])
    batches = [np.arange(start, stop) for start, stop in itertools.pairwise(cuts)]
    enough = WELL_FILLED * limit * (len(batches) - 1)
    if len(batches) > 1 and ends[cuts[-2] - 1] < enough:
        batches = _best_fit(np.arange(len(sizes)), sizes, limit)
        filled = np.array([sizes[batch].sum() for batch in batches])
        kept = [batch for batch, f in zip(batches, filled, strict=True) if f >= WELL_FILLED * limit]
        rest = [batch for batch, f in zip(batches, filled, strict=True) if f < WELL_FILLED * limit]
        if rest:
            again = np.concatenate(rest)
            descending = again[np.argsort(-sizes[again], kind="stable")]
            repacked = _best_fit(descending, sizes, limit)
            batches = kept + (repacked if len(repacked) <= len(rest) else rest)
    least = int(np.argmin([sizes[batch].sum() for batch in batches]))
    batches.append(batches.pop(least))
    return batches


def _best_fit(items: np.ndarray, sizes: np.ndarray, limit: int) -> list[np.ndarray]:
    """Each item, in the order given, into the fullest batch that has room for it."""
    batches: list[list[int]] = []
    with_room: defaultdict[int, list[int]] = defaultdict(list)  # batches by what they have left
    rooms: list[int] = []  # what some batch has left, ascending
    for item, size in zip(items.tolist(), sizes[items].tolist(), strict=True):
        place = bisect_left(rooms, size)
        if place < len(rooms):
            room = rooms[place]
            number = with_room[room].pop()
            if not with_room[room]:
                rooms.pop(place)
        else:
            room, number = limit, len(batches)
            batches.append([])
        batches[number].append(item)
        room -= size
        if not with_room[room]:
            insort(rooms, room)
        with_room[room].append(number)
    return [np.array(batch, np.int64) for batch in batches]
