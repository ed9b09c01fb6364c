"""Batches hold what the arrays hold, cast once, and what has a direction turns as one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.neighborlist import neighbor_list
from molecules import random_structures, without
from scipy.spatial.transform import Rotation

from runner.batches import Batch, Block, make_batch
from runner.potentials.components import pair_vectors
from runner.structures import Structures


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


def _equal(one: Batch, other: Batch) -> bool:
    """Whether two batches are the same to the bit."""
    tensors = [
        {**vars(batch), **batch.labels, **{f"has {n}": m for n, m in batch.labelled.items()}}
        for batch in (one, other)
    ]
    assert tensors[0].keys() == tensors[1].keys()
    return all(
        torch.equal(a.nan_to_num(7e7), b.nan_to_num(7e7))
        for a, b in zip(tensors[0].values(), tensors[1].values(), strict=True)
        if isinstance(a, torch.Tensor)
    )


def _mixed() -> Structures:
    """Molecules and crystals, some without a label."""
    structures = random_structures([2, 4, 3, 1, 5, 6])
    cells = np.zeros((6, 3, 3))
    cells[[1, 4]] = [[3.0, 0.1, 0], [0.2, 4.0, 0.3], [0, 0.5, 5.0]]
    pbc = np.zeros((6, 3), bool)
    pbc[1], pbc[4] = True, (True, False, True)
    stress = np.random.default_rng(0).normal(size=(6, 3, 3))
    arrays = structures.structures | {"cell": cells, "pbc": pbc, "stress": stress}
    return without(replace(structures, structures=arrays), "forces", [2, 5])


def test_blocks_taken_apart_and_joined_are_the_same() -> None:
    structures = _mixed()
    whole = Block.of(structures, 4.0)
    chosen = np.array([4, 0, 5, 4, 2])
    expected = make_batch(structures.take(chosen), 4.0)
    taken = whole.take(chosen)
    assert taken.index.tolist() == chosen.tolist() == taken.batch().index.tolist()
    assert _equal(replace(taken.batch(), index=expected.index), expected)
    parts = [Block.of(structures.take(np.arange(a, b)), 4.0, first=a) for a, b in ((0, 2), (2, 6))]
    assert _equal(Block.join(parts).take(chosen).batch(), taken.batch())
    nothing = whole.take(np.array([], np.int64)).batch()
    assert nothing.n_structures == 0
    assert _equal(nothing, replace(taken.batch().none(), labelled={}))


def test_a_rotation_turns_everything_that_has_a_direction() -> None:
    structures = _mixed()
    block = Block.of(structures, 4.0, torch.float64)
    rng = np.random.default_rng(1)
    turns = Rotation.random(6, random_state=rng)
    quaternions = turns.as_quat(scalar_first=True)
    plain, turned = block.batch(), block.batch(quaternions)
    r = torch.from_numpy(turns.as_matrix())
    of_atom = r[plain.structure]
    for name in ("forces", "positions"):
        before, after = ({**vars(b), **b.labels}[name] for b in (plain, turned))
        expected = (of_atom @ before.unsqueeze(-1)).squeeze(-1)
        assert torch.allclose(after, expected, equal_nan=True, atol=1e-12)
    dipole, stress = plain.labels["dipole"], plain.labels["stress"]
    assert torch.allclose(turned.labels["dipole"], (r @ dipole.unsqueeze(-1)).squeeze(-1))
    assert torch.allclose(turned.labels["stress"], r @ stress @ r.mT)
    assert torch.allclose(turned.cell, plain.cell @ r.mT)
    for name in ("energy", "charges", "total_charge"):
        assert torch.equal(turned.labels[name], plain.labels[name])
    # distances within the batch, over its cells too, stay
    assert torch.allclose(pair_vectors(turned)[0], pair_vectors(plain)[0], atol=1e-12)


def test_images_lie_where_the_shifts_say() -> None:
    structures = _mixed()
    batch = make_batch(structures, 4.0, torch.float64)
    distance, direction = pair_vectors(batch)
    found, start = [], 0
    for s, n in enumerate(np.diff(structures.first_atom).tolist()):
        rows = slice(start, start + n)
        atoms = Atoms(
            "H" * n,
            structures.atoms["positions"][rows],
            cell=structures.structures["cell"][s],
            pbc=structures.structures["pbc"][s],
        )
        i, j, d, v = neighbor_list("ijdD", atoms, 4.0)
        found += [(a + start, b + start, *w, x) for a, b, x, w in zip(i, j, d, v, strict=True)]
        start += n
    ours = np.column_stack([batch.pairs.T, direction * distance.unsqueeze(-1), distance])
    assert len(ours) == len(found) > 100
    assert np.array(sorted(ours.round(9).tolist())) == pytest.approx(
        np.array(sorted(np.array(found).round(9).tolist())), abs=1e-8
    )


def test_moving_a_batch_moves_every_tensor() -> None:
    moved = make_batch(without(random_structures([2, 3]), "energy", [1]), 5.0).to("meta")
    tensors = [
        moved.atomic_numbers,
        moved.positions,
        moved.structure,
        moved.n_atoms,
        moved.half_pairs,
    ]
    tensors += [*moved.labels.values(), *moved.labelled.values()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


@pytest.mark.parametrize("n", [1, 2, 3, 40])
def test_parts_of_a_batch_are_its_structures_in_order(n: int) -> None:
    sizes = [3, 1, 6, 2, 5, 4, 4]
    structures = without(random_structures(sizes), "forces", [2, 5])
    rng = np.random.default_rng(0)
    cells = np.eye(3) * 4 + rng.uniform(-0.3, 0.3, (7, 3, 3))
    periodic = {"cell": cells, "pbc": np.repeat(rng.random(7) < 0.5, 3).reshape(7, 3)}
    structures = replace(structures, structures=structures.structures | periodic)
    batch = make_batch(structures, 4.0, torch.float64, near=2.5)
    parts = batch.parts(n)
    assert len(parts) == min(n, len(sizes))
    done = 0
    for part in parts:
        rows = np.arange(done, done + len(part.n_atoms))
        done += len(rows)
        expected = make_batch(structures.take(rows), 4.0, torch.float64, near=2.5)
        for name, value in vars(expected).items():
            found = getattr(part, name)
            if name == "labels":
                assert all(
                    torch.equal(found[k].nan_to_num(), v.nan_to_num()) for k, v in value.items()
                )
            elif name == "labelled":
                assert set(found) == {"forces"}
                assert found["forces"].tolist() == [row not in (2, 5) for row in rows]
            elif name == "index":
                assert found.tolist() == rows.tolist()
            else:
                assert torch.equal(found, value), name
    assert done == len(sizes)


@pytest.mark.parametrize("sizes", [[6] * 8, [20, 2, 2, 2, 2, 2, 2], [1, 1, 1, 1, 1, 20], [5, 5, 5]])
@pytest.mark.parametrize("n", [1, 2, 3, 40])
def test_no_part_has_fewer_structures_than_asked_for(sizes: list[int], n: int) -> None:
    batch = make_batch(random_structures(sizes), 4.0)
    parts = batch.parts(n, least=2)
    assert len(parts) == min(n, len(sizes) // 2)
    assert min(len(part.n_atoms) for part in parts) >= 2
    assert torch.cat([part.index for part in parts]).tolist() == list(range(len(sizes)))
    assert len(batch.parts(n, least=len(sizes) + 1)) == 1
