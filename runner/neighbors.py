"""Pairs of atoms that see each other."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int64


def pairs_within(
    positions: Float[np.ndarray, "n_atoms 3"],
    first_atom: Int64[np.ndarray, " n_structures_plus_1"],
    cutoff: float,
) -> Int64[np.ndarray, "2 n_pairs"]:
    """All ordered pairs (i, j), i ≠ j, of one structure that are closer than the cutoff.

    Whole-array: every pair within a structure is made, then filtered by its distance.

    Args:
        positions: Å.
        first_atom: the atoms of structure s are the rows from `first_atom[s]` to
            `first_atom[s + 1]`; the first entry is 0.
        cutoff: Å; a pair at this distance is left out.

    Returns:
        Rows of i and of j, sorted by i, then by j.
    """
    counts = np.diff(first_atom)
    per_atom = np.repeat(counts, counts)  # candidates j of each atom i, itself included
    i = np.repeat(np.arange(len(positions)), per_atom)
    starts = np.repeat(np.cumsum(per_atom) - per_atom, per_atom)
    j = np.repeat(np.repeat(first_atom[:-1], counts), per_atom) + np.arange(len(i)) - starts
    distinct = i != j
    i, j = i[distinct], j[distinct]
    separation = positions[j] - positions[i]
    near = np.einsum("pk,pk->p", separation, separation) < cutoff**2
    return np.stack([i[near], j[near]])
