"""Batches: many structures as one set of tensors. Here, and only here, float64 becomes float32."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int8, Int64
from torch import Tensor

from runner.fields import CELL, FIELDS, LABELS, PBC, POSITIONS
from runner.neighbors import find_neighbors
from runner.structures import Structures, ragged_rows

PRECISIONS = {
    "32-true": torch.float32,
    "64-true": torch.float64,
    "bf16-mixed": torch.float32,  # what is not computed is kept so
}
SINGLE = PRECISIONS["32-true"]


@dataclass(frozen=True)
class Batch:
    """Structures that are computed together; atoms of one structure are neighbouring rows.

    Attributes:
        atomic_numbers: Z of each atom.
        positions: Å.
        structure: which structure each atom belongs to.
        n_atoms: atoms of each structure.
        index: the number that each structure has in its split of the prepared dataset.
        source: the number of the source that each structure is from.
        half_pairs: rows of atoms i and j within the cutoff, each pair once, sorted by i.
        labels: reference values by name, as `runner.fields` shapes them; NaN where missing.
        labelled: of each label that some structure lacks, which structures have it whole.
        cell: Å, rows are the lattice vectors; None if the data has no periodic structures.
        half_shifts: how many lattice vectors further on the j of each pair is: the image lies at
            r_j + shift · cell. None if the data has no periodic structures.
        half_near: rows of `half_pairs` that an architecture sees, where others of the potential's
            terms look further; None if they all are.
    """

    atomic_numbers: Int64[Tensor, " n_atoms"]
    positions: Float[Tensor, "n_atoms 3"]
    structure: Int64[Tensor, " n_atoms"]
    n_atoms: Int64[Tensor, " n_structures"]
    index: Int64[Tensor, " n_structures"]
    source: Int64[Tensor, " n_structures"]
    half_pairs: Int64[Tensor, "2 n_half"]
    labels: dict[str, Float[Tensor, "n ..."]]
    labelled: dict[str, Bool[Tensor, " n_structures"]]
    cell: Float[Tensor, "n_structures 3 3"] | None = None
    half_shifts: Int8[Tensor, "n_half 3"] | None = None
    half_near: Int64[Tensor, " n_near"] | None = None

    @property
    def n_structures(self) -> int | torch.SymInt:
        """Structures in the batch; a symbol where a computation on it is traced."""
        return self.n_atoms.shape[0]

    @property
    def pairs(self) -> Int64[Tensor, "2 n_pairs"]:
        """Rows of centres i and of neighbours j: every pair, then every pair the other way round.

        So row k of what is computed for `half_pairs` belongs to rows k and n_half + k here.
        """
        return torch.cat([self.half_pairs, self.half_pairs.flip(0)], dim=1)

    @property
    def shifts(self) -> Int8[Tensor, "n_pairs 3"] | None:
        """How many lattice vectors further on the neighbour j of each of `pairs` is."""
        if self.half_shifts is None:
            return None
        return torch.cat([self.half_shifts, -self.half_shifts])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        tensors = {name: move(t) for name, t in vars(self).items() if isinstance(t, Tensor)}
        labels = {name: move(label) for name, label in self.labels.items()}
        labelled = {name: move(mask) for name, mask in self.labelled.items()}
        return replace(self, **tensors, labels=labels, labelled=labelled)

    def double(self) -> Batch:
        """The same batch in double precision; its numbers stay those of single precision."""
        labels = {name: label.double() for name, label in self.labels.items()}
        cell = None if self.cell is None else self.cell.double()
        return replace(self, positions=self.positions.double(), labels=labels, cell=cell)

    def none(self) -> Batch:
        """A batch of no structure, otherwise like this one."""
        return replace(self._part(0, 0, [0, 0], [0, 0]), labelled={})

    def nearest(self) -> Batch:
        """The same with the near pairs alone."""
        if self.half_near is None:
            return self
        pairs, shifts = self.half_pairs.index_select(1, self.half_near), self.half_shifts
        if shifts is not None:
            shifts = shifts.index_select(0, self.half_near)
        return replace(self, half_pairs=pairs, half_shifts=shifts, half_near=None)

    def parts(self, n: int, least: int = 1) -> list[Batch]:
        """The batch in parts of whole structures, each with about as many pairs as the others.

        Args:
            n: how many parts; there are fewer if there are too few structures.
            least: structures of a part, unless the batch has fewer.
        """
        atoms = torch.cat([self.n_atoms.new_zeros(1), self.n_atoms.cumsum(0)])
        pairs = torch.searchsorted(self.half_pairs[0].contiguous(), atoms)
        n = max(1, min(n, (len(atoms) - 1) // least))
        share = torch.arange(1, n) * (int(pairs[-1]) / n)
        bounds, end = [0], len(atoms) - 1
        for later, bound in zip(range(n - 1, 0, -1), torch.searchsorted(pairs, share), strict=True):
            bounds.append(min(max(int(bound), bounds[-1] + least), end - later * least))
        bounds.append(end)
        return [
            self._part(start, stop, atoms[[start, stop]].tolist(), pairs[[start, stop]].tolist())
            for start, stop in itertools.pairwise(bounds)
        ]

    def _part(self, start: int, stop: int, atoms: list[int], pairs: list[int]) -> Batch:
        """Some structures, whose rows among the atoms and pairs are known."""
        one, atom, pair = slice(start, stop), slice(*atoms), slice(*pairs)
        near = self.half_near
        if near is not None:
            bounds = torch.searchsorted(near, near.new_tensor(pairs)).tolist()
            near = near[slice(*bounds)] - pairs[0]
        return Batch(
            self.atomic_numbers[atom],
            self.positions[atom],
            self.structure[atom] - start,
            self.n_atoms[one],
            self.index[one],
            self.source[one],
            self.half_pairs[:, pair] - atoms[0],
            {n: v[atom if FIELDS[n].per == "atom" else one] for n, v in self.labels.items()},
            {name: mask[one] for name, mask in self.labelled.items()},
            None if self.cell is None else self.cell[one],
            None if self.half_shifts is None else self.half_shifts[pair],
            near,
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


@dataclass(frozen=True)
class Block:
    """Structures ready for batches: arrays cast, neighbours found.

    Attributes:
        index: the number of each structure in its split.
        first_atom: row pointer of the atoms' arrays.
        first_pair: row pointer of the pairs' arrays.
        atoms: arrays with a row an atom.
        structures: arrays with a row a structure.
        pairs: arrays with a row a pair, each pair once: `center` and `neighbor`, numbered within
            their structure, and the `shift` to the neighbour's image; `near`, whether an
            architecture sees it, where not all are seen.
        labelled: of each label that some structure lacks, which structures have it whole.
    """

    index: Int64[np.ndarray, " n_structures"]
    first_atom: Int64[np.ndarray, " n_structures_plus_1"]
    first_pair: Int64[np.ndarray, " n_structures_plus_1"]
    atoms: dict[str, np.ndarray]
    structures: dict[str, np.ndarray]
    pairs: dict[str, np.ndarray]
    labelled: dict[str, np.ndarray]

    @classmethod
    def of(
        cls,
        structures: Structures,
        cutoff: float,
        dtype: torch.dtype = SINGLE,
        first: int = 0,
        near: float | None = None,
    ) -> Block:
        """Cast structures, and find the pairs within the cutoff.

        Args:
            structures: float64, eV, Å, e.
            cutoff: Å; distances are those of the positions before they are cast.
            dtype: of the floating-point numbers.
            first: the number of the first structure in its split.
            near: Å, up to which architectures see; as far as the pairs go, unless given.
        """
        first_atom = structures.first_atom
        cell, pbc = (structures.structures.get(name) for name in (CELL.name, PBC.name))
        lists = find_neighbors(structures.atoms["positions"], first_atom, cutoff, cell, pbc)
        first_pair = _pointer(lists.counts)[first_atom]
        smallest = np.uint8 if np.diff(first_atom).max(initial=0) <= 256 else np.int32
        within = np.arange(structures.n_atoms) - np.repeat(first_atom[:-1], np.diff(first_atom))
        pairs: dict[str, np.ndarray] = {
            "center": np.repeat(within.astype(smallest), lists.counts),
            "neighbor": lists.neighbors.astype(smallest),
        }
        if lists.shifts is not None:
            pairs["shift"] = lists.shifts
        if near is not None:
            pairs["near"] = lists.distances(structures.atoms["positions"], first_atom, cell) < near
        atoms = {"atomic_numbers": structures.atoms["atomic_numbers"]}
        source = structures.structures.get("source", np.zeros(len(structures), np.int16))
        by_structure: dict[str, np.ndarray] = {"source": source}
        labelled = {}
        for name in (POSITIONS.name, CELL.name, *LABELS):
            per_atom = FIELDS[name].per == "atom"
            array = (structures.atoms if per_atom else structures.structures).get(name)
            if array is None:
                continue
            (atoms if per_atom else by_structure)[name] = array.astype(_numpy(dtype))
            if name in LABELS:
                mask = _labelled(array, per_atom, first_atom)
                if not mask.all():
                    labelled[name] = mask
        index = np.arange(first, first + len(structures))
        return cls(index, first_atom, first_pair, atoms, by_structure, pairs, labelled)

    @classmethod
    def join(cls, blocks: Sequence[Block]) -> Block:
        """Several as one, in their order; at least one."""
        if len(blocks) == 1:
            return blocks[0]
        tables: list[dict[str, np.ndarray]] = [
            {name: np.concatenate([table[name] for table in same]) for name in same[0]}
            for same in (
                [block.atoms for block in blocks],
                [block.structures for block in blocks],
                [block.pairs for block in blocks],
                [block.every_mask(_masked(blocks)) for block in blocks],
            )
        ]
        return cls(
            np.concatenate([block.index for block in blocks]),
            _pointer(np.concatenate([np.diff(block.first_atom) for block in blocks])),
            _pointer(np.concatenate([np.diff(block.first_pair) for block in blocks])),
            *tables,
        )

    def every_mask(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Which structures have some labels, also those labels that all have."""
        return {name: self.labelled.get(name, np.ones(len(self), bool)) for name in names}

    def __len__(self) -> int:
        return len(self.index)

    @property
    def n_bytes(self) -> int:
        """Memory that it takes."""
        tables = (self.atoms, self.structures, self.pairs, self.labelled)
        arrays = [array for table in tables for array in table.values()]
        return sum(a.nbytes for a in (self.index, self.first_atom, self.first_pair, *arrays))

    def take(self, rows: Int64[np.ndarray, " n"]) -> Block:
        """Some of the structures, in the order in which they are named."""
        atoms = ragged_rows(self.first_atom, rows)
        first_pair = self.first_pair
        stretches = list(zip(first_pair[rows].tolist(), first_pair[rows + 1].tolist(), strict=True))
        nothing = [(0, 0)]  # there may be no rows
        return Block(
            self.index.take(rows),
            _pointer(self.first_atom[rows + 1] - self.first_atom[rows]),
            _pointer(first_pair[rows + 1] - first_pair[rows]),
            {name: array.take(atoms, axis=0) for name, array in self.atoms.items()},
            {name: array.take(rows, axis=0) for name, array in self.structures.items()},
            {  # long stretches: faster than naming every row
                name: np.concatenate([array[start:stop] for start, stop in stretches or nothing])
                for name, array in self.pairs.items()
            },
            {name: mask.take(rows) for name, mask in self.labelled.items()},
        )

    def batch(self, rotations: Float[np.ndarray, "n 4"] | None = None) -> Batch:
        """All of them as a batch.

        Args:
            rotations: unit quaternions (w, x, y, z), by which positions, cells and every label
                that is a vector or a tensor are rotated about the origin.
        """
        sizes, n_pairs = np.diff(self.first_atom), np.diff(self.first_pair)
        structure = np.repeat(np.arange(len(self)), sizes)
        ij = np.empty((2, int(self.first_pair[-1])), np.int64)
        first = np.repeat(self.first_atom[:-1], n_pairs)
        np.add(self.pairs["center"], first, out=ij[0])
        np.add(self.pairs["neighbor"], first, out=ij[1])
        found = self.atoms | self.structures | self.pairs
        if rotations is not None:
            matrices = rotation_matrices(rotations)
            for name in (name for name in found if turns(name)):
                turn = matrices[structure] if FIELDS[name].per == "atom" else matrices
                exact = rotated(name, found[name].astype(np.float64), turn)
                found[name] = exact.astype(found[name].dtype)
        tensors = {name: torch.from_numpy(array) for name, array in found.items()}
        return Batch(
            atomic_numbers=tensors["atomic_numbers"].to(torch.int64),
            positions=tensors["positions"],
            structure=torch.from_numpy(structure),
            n_atoms=torch.from_numpy(sizes),
            index=torch.from_numpy(self.index),
            source=tensors["source"].to(torch.int64),
            half_pairs=torch.from_numpy(ij),
            labels={name: tensors[name] for name in LABELS if name in tensors},
            labelled={
                name: torch.from_numpy(mask)
                for name, mask in self.labelled.items()
                if not mask.all()
            },
            cell=tensors.get("cell"),
            half_shifts=tensors.get("shift"),
            half_near=tensors["near"].nonzero().squeeze(-1) if "near" in tensors else None,
        )


def _pointer(counts: np.ndarray) -> Int64[np.ndarray, " n_plus_1"]:
    """Where rows begin, of so many each, and where they end."""
    pointer = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=pointer[1:])
    return pointer


def _masked(blocks: Sequence[Block]) -> list[str]:
    """Labels that some structure lacks."""
    return sorted({name for block in blocks for name in block.labelled})


def make_batch(
    structures: Structures,
    cutoff: float,
    dtype: torch.dtype = SINGLE,
    near: float | None = None,
) -> Batch:
    """All of some structures as one batch.

    Args:
        structures: float64, eV, Å, e.
        cutoff: Å, of the pairs.
        dtype: of the floating-point tensors.
        near: Å, up to which architectures see; as far as the pairs go, unless given.
    """
    return Block.of(structures, cutoff, dtype, near=near).batch()


def _numpy(dtype: torch.dtype) -> np.dtype[Any]:
    kind: np.dtype[Any] = torch.empty(0, dtype=dtype).numpy().dtype
    return kind


def _labelled(values: np.ndarray, per_atom: bool, first_atom: np.ndarray) -> np.ndarray:
    """Which structures have a label for every component, and every atom."""
    rows: np.ndarray = np.isfinite(values).reshape(len(values), -1).all(axis=1)
    return np.logical_and.reduceat(rows, first_atom[:-1]) if per_atom else rows


def turns(name: str) -> bool:
    """Whether a quantity changes when its structure is rotated."""
    return name in FIELDS and name != PBC.name and FIELDS[name].shape in ((3,), (3, 3))


def rotation_matrices(quaternions: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "n 3 3"]:
    """Rotation matrices of unit quaternions (w, x, y, z)."""
    w, x, y, z = quaternions.T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def rotated(name: str, values: Any, matrices: Any) -> Any:
    """A vector v as R v, a tensor T as R T Rᵀ, a cell's rows each as a vector.

    Written out in products and sums, so that arrays and tensors on any device give the same bits.

    Args:
        name: of the quantity, one that `turns`.
        values: float64, a row for each matrix.
        matrices: R, float64.
    """

    def vectors(rows: Any) -> Any:  # (..., 3) as R v, for the matrix of each row
        turned = rows[..., 0, None] * turn[..., :, 0]
        for k in (1, 2):
            turned = turned + rows[..., k, None] * turn[..., :, k]
        return turned

    if FIELDS[name].shape == (3,):
        turn = matrices
        return vectors(values)
    turn = matrices[:, None]
    half = vectors(values)  # each row of T turned: T Rᵀ
    return half if name == CELL.name else vectors(half.swapaxes(1, 2)).swapaxes(1, 2)
