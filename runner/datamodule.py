"""The LightningDataModule: splits of a prepared dataset as loaders of batches."""

from __future__ import annotations

from typing import Any

import lightning
from torch.utils.data import DataLoader

from runner.batches import Batch, BatchDataset, BatchOrder
from runner.store import PreparedDataset


class PreparedDataModule(lightning.LightningDataModule):
    """Train, validation and test batches of a prepared dataset."""

    def __init__(self, dataset: PreparedDataset, batch_size: int, cutoff: float, seed: int) -> None:
        """Read from a dataset.

        Args:
            dataset: prepared.
            batch_size: structures in a batch.
            cutoff: Å, of the pairs.
            seed: of the order of the training batches.
        """
        super().__init__()
        self.dataset, self.batch_size, self.cutoff, self.seed = dataset, batch_size, cutoff, seed
        self._splits: dict[str, BatchDataset] = {}

    def batches(self, split: str) -> DataLoader[Batch]:
        """Batches of one split; those of the training split in another order each epoch."""
        if split not in self._splits:
            self._splits[split] = BatchDataset(self.dataset.read(split), self.cutoff)
        structures = self._splits[split]
        seed = self.seed if split == "train" else None
        order = BatchOrder(len(structures.structures), self.batch_size, seed)
        return DataLoader(structures, batch_size=None, sampler=order, collate_fn=_as_it_is)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled by seed and epoch."""
        return self.batches("train")

    def val_dataloader(self) -> DataLoader[Batch]:
        """In stored order."""
        return self.batches("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """In stored order."""
        return self.batches("test")


def _as_it_is(batch: Any) -> Any:
    return batch
