"""Batches hold what the arrays hold, cast once; every structure comes once an epoch."""

from __future__ import annotations

import numpy as np
import torch
from molecules import random_structures, without

from runner.batches import BatchDataset, BatchOrder, make_batch


def test_a_batch_holds_the_arrays_as_float32() -> None:
    structures = random_structures([3, 1, 5])
    batch = make_batch(structures, cutoff=5.0)
    assert batch.positions.dtype == torch.float32
    assert np.array_equal(batch.positions, structures.atoms["positions"].astype(np.float32))
    assert np.array_equal(batch.atomic_numbers, structures.atoms["atomic_numbers"])
    assert batch.structure.tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 2]
    assert batch.n_atoms.tolist() == [3, 1, 5]
    for name in ("energy", "forces", "charges", "dipole", "total_charge"):
        table = structures.atoms if name in structures.atoms else structures.structures
        assert batch.labels[name].dtype == torch.float32
        assert np.array_equal(batch.labels[name], table[name].astype(np.float32))
    assert batch.labelled == {}


def test_structures_without_a_label_are_marked() -> None:
    structures = without(random_structures([2, 3, 4]), "forces", [1])
    structures = without(structures, "dipole", [0, 2])
    batch = make_batch(structures, cutoff=5.0)
    assert {name: mask.tolist() for name, mask in batch.labelled.items()} == {
        "forces": [True, False, True],
        "dipole": [False, True, False],
    }


def test_sum_by_structure_equals_a_loop() -> None:
    structures = random_structures([3, 1, 5])
    batch = make_batch(structures, 5.0, torch.float64)
    found = batch.sum_by_structure(batch.positions)
    for index in range(3):
        expected = batch.positions[batch.structure == index].sum(dim=0)
        assert torch.allclose(found[index], expected)


def test_every_structure_comes_once_an_epoch_and_the_order_is_a_function_of_seed_and_epoch() -> (
    None
):
    order = BatchOrder(103, 10, seed=3)
    epochs = []
    for epoch in (0, 1):
        order.set_epoch(epoch)
        batches = list(order)
        assert [len(batch) for batch in batches] == [10] * 10 + [3] == [10] * (len(order) - 1) + [3]
        epochs.append(np.concatenate(batches))
        assert sorted(epochs[-1]) == list(range(103))
    assert not np.array_equal(*epochs)
    again = BatchOrder(103, 10, seed=3)
    again.set_epoch(1)
    assert np.array_equal(np.concatenate(list(again)), epochs[1])
    assert np.array_equal(np.concatenate(list(BatchOrder(103, 10, None))), np.arange(103))


def test_the_shuffle_is_fair() -> None:
    """Chi-squared of the batch in which each structure comes, over many epochs."""
    order = BatchOrder(20, 5, seed=0)
    counts = np.zeros((20, 4))
    for epoch in range(400):
        order.set_epoch(epoch)
        for number, batch in enumerate(order):
            counts[batch, number] += 1
    chi_squared = ((counts - 100) ** 2 / 100).sum()  # 57 degrees of freedom, 99.9 %: 97
    assert 25 < chi_squared < 97


def test_a_dataset_gives_the_batch_of_the_chosen_structures() -> None:
    structures = random_structures([2, 4, 3, 1])
    batch = BatchDataset(structures, 5.0)[np.array([2, 0])]
    assert batch.n_atoms.tolist() == [3, 2]
    alone = make_batch(structures.take(np.array([2])), 5.0)
    assert torch.equal(batch.positions[:3], alone.positions)
    assert torch.equal(batch.labels["forces"][:3], alone.labels["forces"])


def test_moving_a_batch_moves_every_tensor() -> None:
    moved = make_batch(without(random_structures([2, 3]), "energy", [1]), 5.0).to("meta")
    tensors = [moved.atomic_numbers, moved.positions, moved.structure, moved.n_atoms, moved.pairs]
    tensors += [*moved.labels.values(), *moved.labelled.values()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
