"""The LightningDataModule: splits of a prepared dataset as loaders of batches."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import lightning
import numpy as np
import torch
import torch.distributed

from runner.batches import SINGLE
from runner.config import BatchConfig, DataConfig, WeightsConfig
from runner.epochs import Budget, EpochOrder
from runner.errors import DatasetError
from runner.loader import (
    BatchLoader,
    InMemory,
    OnDevice,
    Residence,
    Shared,
    Source,
    Split,
    choose_residence,
    free_memory,
)
from runner.processes import gathered
from runner.store import PreparedDataset

SPLITS = ("train", "val", "test")


class PreparedDataModule(lightning.LightningDataModule):
    """Train, validation and test batches of a prepared dataset.

    Attributes:
        residence: where the data is; known once the first loader has been asked for.
    """

    def __init__(
        self,
        dataset: PreparedDataset,
        batch: BatchConfig,
        cutoff: float,
        seed: int,
        data: DataConfig | None = None,
        say: Callable[[str], None] = lambda _: None,
        near: float | None = None,
        dtype: torch.dtype = SINGLE,
    ) -> None:
        """Read from a dataset.

        Args:
            dataset: prepared.
            batch: size of a batch.
            cutoff: Å, of the pairs.
            seed: of the order of the training batches.
            data: where batches come from.
            say: is told where the data is.
            near: Å, up to which architectures see; as far as the pairs go, unless given.
            dtype: of the floating-point numbers.

        Raises:
            DatasetError: there are fewer training structures than asked for.
        """
        super().__init__()
        self.dataset, self.batch, self.cutoff, self.seed = dataset, batch, cutoff, seed
        self.data, self.near, self.dtype = data or DataConfig(), near, dtype
        self.residence: Residence | None = None
        self._say = say
        self._loaders: dict[str, BatchLoader] = {}
        self._resumed: dict[str, int] | None = None
        self._splits = {name: self._split(name) for name in SPLITS}

    def pairs_of(self, split_name: str) -> float:
        """About how many pairs a split has, as its first structures tell."""
        split = self._splits[split_name]
        return split.sample.n_pairs / max(split.sample.n, 1) * split.n_structures

    def loader(self, split: str) -> BatchLoader:
        """Batches of one split; those of the training split in another order each epoch."""
        if split not in self._loaders:
            self._loaders[split] = self._loader(split)
        return self._loaders[split]

    def whole(self, split: str) -> BatchLoader:
        """All batches of a split, those of other processes too."""
        mine = self.loader(split)
        return BatchLoader(mine.source, mine.order, ahead=mine.ahead)

    def train_dataloader(self) -> BatchLoader:
        """Shuffled by seed and epoch.

        Raises:
            DatasetError: a structure of any split is larger than a batch, or weights name what is
                not there.
        """
        for split in SPLITS:  # what is wrong with any of them should be said before a training
            self.loader(split)
        loader = self.loader("train")
        if self._resumed is not None:
            loader.load_state_dict(self._resumed)
            self._resumed = None
        elif self.trainer is not None:  # Lightning asks for the length before it says which epoch
            loader.set_epoch(self.trainer.current_epoch)
        return loader

    def state_dict(self) -> dict[str, int]:
        """Where the training batches are.

        Lightning restores the state of a loader too, but not of one that is between two epochs.
        """
        return self.loader("train").state_dict()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from there."""
        self._resumed = state_dict

    def val_dataloader(self) -> BatchLoader:
        """In stored order."""
        return self.loader("val")

    def test_dataloader(self) -> BatchLoader:
        """In stored order."""
        return self.loader("test")

    def _split(self, name: str) -> Split:
        size = self.data.train_size if name == "train" else None
        split = Split(self.dataset, name, self.cutoff, size, self.near, self.dtype)
        asked = self.data.train_size or 0
        if name == "train" and asked > split.n_structures:
            raise DatasetError(
                f"train_size is {asked}, and the training split has {split.n_structures} "
                "structures",
                where="train.data.train_size",
                allowed=f"up to {split.n_structures}",
            )
        return split

    def _loader(self, name: str) -> BatchLoader:
        if self.residence is None:
            self.residence = self._choose_residence()
        split, training = self._splits[name], name == "train"
        source = self._source(split)
        weights = self.data.weights if training else None
        order = EpochOrder(
            split.n_structures,
            self._budget(split, source),
            seed=self.seed if training else None,
            block=split.block,
            weights=None if weights is None else self._weights(weights, split),
            rotate=training and self.data.rotate,
        )
        workers = self.data.workers
        if workers is None:
            on_gpu = self._device().type == "cuda" and self.residence != "device"
            workers = 1 if on_gpu or self.residence == "stream" else 0
        rank, n_ranks = _ranks()
        return BatchLoader(source, order, rank=rank, n_ranks=n_ranks, ahead=workers)

    def _source(self, split: Split) -> Source:
        if self.residence == "device":
            return OnDevice(split, self._device())
        rank, n_ranks = _local_ranks()
        if self.residence == "memory" and n_ranks > 1:
            with _common_folder(rank, split.bytes_needed()) as folder:
                return Shared(split, folder, rank, n_ranks, torch.distributed.barrier)
        return InMemory(split, keep=self.residence == "memory")

    def _choose_residence(self) -> Residence:
        """As asked for; with what that means said."""
        needed = sum(split.bytes_needed() for split in self._splits.values())
        asked = self.data.residence
        chosen: Residence
        if asked == "auto":  # memory may be short for some processes: all do as these have to
            found = gathered(choose_residence(needed, self._device()))
            chosen = max(found, key=["device", "memory", "stream"].index)
        else:
            chosen = asked
        free = free_memory(chosen, self._device())
        if needed > free:
            raise DatasetError(
                f"the data needs {needed / 1e9:.3g} GB with its neighbour lists, and "
                f"{free / 1e9:.3g} GB are free",
                where=f'train.data.residence = "{chosen}"',
                remedy='set it to "auto" or "stream", or lower train.potential.cutoff or '
                "train.data.train_size",
            )
        size = f"{needed / 1e9:.2g} GB" if needed > 5e6 else f"{needed / 1e6:.2g} MB"
        self._say_alone()
        self._say(
            {
                "memory": f"data in memory, {size} with the neighbour lists, which are kept",
                "stream": f"data streamed from disk, neighbour lists made anew every epoch "
                f"({size} would keep all in memory)",
                "device": f"data on the device {self._device()}, {size} with the neighbour lists, "
                "which are kept",
            }[chosen]
        )
        return chosen

    def _say_alone(self) -> None:
        """Say it where the cutoff is so short that structures have no pairs; that is allowed."""
        sample = self._splits["train"].sample
        if sample.alone:
            first = "" if sample.n == self._splits["train"].n_structures else "first "
            self._say(
                f"{sample.alone} of the {first}{sample.n} training structures have several atoms, "
                f"no two of them within {self.near or self.cutoff:g} Å (train.potential.cutoff): "
                "of these nothing but their elements is seen"
            )

    def _device(self) -> torch.device:
        return torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device

    def _budget(self, split: Split, source: Source) -> Budget:
        """How large a batch is, if every structure fits into one."""
        unit, limit = self.batch.unit, self.batch.limit
        if unit == "structures":
            return Budget(unit, limit)
        if unit == "atoms":
            sizes = self.dataset.sizes(split.name)[: split.n_structures]
        else:
            self._say(f"counting the pairs of the {split.name} split")
            sizes = source.pairs()
        if len(sizes) and sizes.max() > limit:
            index = int(sizes.argmax())
            raise DatasetError(
                f"a structure of the {split.name} split has {sizes[index]} {unit}, more than a "
                f"batch of {limit}",
                where=self.dataset.name_of(split.name, index),
                allowed=f"train.batch.{unit} of at least {sizes[index]}",
                remedy=f"raise train.batch.{unit}, or drop large structures in prepare.filter",
            )
        return Budget(unit, limit, sizes.astype(np.int32))

    def _weights(self, config: WeightsConfig, split: Split) -> np.ndarray:
        """How often each structure comes, relative to the others."""
        if config.by == "group":
            names = list(self.dataset.attributes.get("groups", []))
            member = self.dataset.groups(split.name)[: split.n_structures]
        else:
            names = [source["name"] for source in self.dataset.attributes["sources"]]
            member = self.dataset.origins(split.name)[: split.n_structures, 0]
        counts = np.bincount(member, minlength=len(names))
        if config.values is None:
            alike: np.ndarray = (1 / np.maximum(counts, 1))[member]
            return alike
        unknown = sorted(set(config.values) - set(names))
        if unknown:
            few = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if names[10:] else "")
            raise DatasetError(
                f'there is no {config.by} "{unknown[0]}"',
                where="train.data.weights.values",
                allowed=few,
            )
        values: np.ndarray = np.array([config.values.get(name, 1.0) for name in names])
        if not (values * counts).any():
            raise DatasetError(
                f"every {config.by} of the training split has the weight 0",
                where="train.data.weights.values",
            )
        chosen: np.ndarray = values[member]
        return chosen


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _ranks() -> tuple[int, int]:
    """Number of this process, and how many there are."""
    if not _distributed():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _local_ranks() -> tuple[int, int]:
    """The same among those of this machine."""
    if not _distributed():
        return 0, 1
    machines: list[str] = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(machines, os.uname().nodename)
    rank = torch.distributed.get_rank()
    return machines[:rank].count(machines[rank]), machines.count(machines[rank])


@contextlib.contextmanager
def _common_folder(rank: int, n_bytes: int) -> Iterator[Path]:
    """A folder in memory, or else on disk, that all processes of this machine know."""
    names: list[tuple[str, str]] = [("", "")] * torch.distributed.get_world_size()
    made = ""
    if rank == 0:
        in_memory = Path("/dev/shm")
        fits = in_memory.is_dir() and 1.2 * n_bytes < shutil.disk_usage(in_memory).free
        made = tempfile.mkdtemp(prefix="runner-", dir=in_memory if fits else None)
    here = os.uname().nodename
    torch.distributed.all_gather_object(names, (here, made))
    folder = Path(next(name for machine, name in names if machine == here and name))
    try:
        yield folder
    finally:
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
