"""Batches: many structures as one set of tensors. Here, and only here, float64 becomes float32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from runner.fields import LABELS
from runner.neighbors import pairs_within
from runner.structures import Structures


@dataclass(frozen=True)
class Batch:
    """Structures that are computed together; atoms of one structure are neighbouring rows.

    Attributes:
        atomic_numbers: Z of each atom.
        positions: Å.
        structure: which structure each atom belongs to.
        n_atoms: atoms of each structure.
        pairs: rows of centres i and of neighbours j within the cutoff, both ways round, sorted
            by i.
        labels: reference values by name, as `runner.fields` shapes them; NaN where missing.
        labelled: of each label that some structure lacks, which structures have it whole.
    """

    atomic_numbers: Int64[Tensor, " n_atoms"]
    positions: Float[Tensor, "n_atoms 3"]
    structure: Int64[Tensor, " n_atoms"]
    n_atoms: Int64[Tensor, " n_structures"]
    pairs: Int64[Tensor, "2 n_pairs"]
    labels: dict[str, Float[Tensor, "n ..."]]
    labelled: dict[str, Bool[Tensor, " n_structures"]]

    @property
    def n_structures(self) -> int:
        """Structures in the batch."""
        return len(self.n_atoms)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        return Batch(
            move(self.atomic_numbers),
            move(self.positions),
            move(self.structure),
            move(self.n_atoms),
            move(self.pairs),
            {name: move(label) for name, label in self.labels.items()},
            {name: move(mask) for name, mask in self.labelled.items()},
        )

    def at(self, positions: Float[Tensor, "n_atoms 3"]) -> Batch:
        """The same atoms and pairs at other positions."""
        return replace(self, positions=positions)

    def sum_by_structure(
        self, values: Float[Tensor, "n_atoms ..."]
    ) -> Float[Tensor, "n_structures ..."]:
        """Sum of a quantity over the atoms of each structure."""
        zeros = values.new_zeros((self.n_structures, *values.shape[1:]))
        return zeros.index_add(0, self.structure, values)


def make_batch(structures: Structures, cutoff: float, dtype: torch.dtype = torch.float32) -> Batch:
    """Structures as tensors, with the pairs within the cutoff; whole-array operations only.

    Args:
        structures: float64, eV, Å, e.
        cutoff: Å.
        dtype: of the floating-point tensors.
    """
    counts = np.diff(structures.first_atom)
    positions = structures.atoms["positions"]

    def real(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(dtype)

    labels, labelled = {}, {}
    for name, field in LABELS.items():
        table = structures.atoms if field.per == "atom" else structures.structures
        if name in table:
            labels[name] = real(table[name])
            mask = _labelled(table[name], field.per == "atom", structures.first_atom)
            if not mask.all():
                labelled[name] = torch.from_numpy(mask)
    return Batch(
        atomic_numbers=torch.from_numpy(structures.atoms["atomic_numbers"].astype(np.int64)),
        positions=real(positions),
        structure=torch.from_numpy(np.repeat(np.arange(len(counts)), counts)),
        n_atoms=torch.from_numpy(counts),
        pairs=torch.from_numpy(pairs_within(positions, structures.first_atom, cutoff)),
        labels=labels,
        labelled=labelled,
    )


def _labelled(values: np.ndarray, per_atom: bool, first_atom: np.ndarray) -> np.ndarray:
    """Which structures have a label for every component, and every atom."""
    rows: np.ndarray = np.isfinite(values).reshape(len(values), -1).all(axis=1)
    return np.logical_and.reduceat(rows, first_atom[:-1]) if per_atom else rows


class BatchOrder(Sampler[np.ndarray]):
    """Which structures make up each batch: a function of (seed, epoch) alone.

    Every structure comes once an epoch; the last batch may be smaller.
    """

    def __init__(self, n_structures: int, batch_size: int, seed: int | None) -> None:
        """Cut `n_structures` into batches, shuffled anew each epoch unless `seed` is None."""
        self.n_structures, self.batch_size, self.seed = n_structures, batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; Lightning calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.n_structures // self.batch_size)

    def __iter__(self) -> Iterator[np.ndarray]:
        order = np.arange(self.n_structures)
        if self.seed is not None:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(self.n_structures)
        for start in range(0, self.n_structures, self.batch_size):
            yield order[start : start + self.batch_size]


class BatchDataset(Dataset[Batch]):
    """Structures in memory, from which whole batches are taken."""

    def __init__(self, structures: Structures, cutoff: float) -> None:
        """Keep `structures`; pairs of the batches are those within `cutoff`, Å."""
        self.structures, self.cutoff = structures, cutoff

    def __getitem__(self, chosen: np.ndarray) -> Batch:
        """The batch of the chosen structures."""
        return make_batch(self.structures.take(chosen), self.cutoff)
