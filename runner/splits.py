"""Which structures train, which validate, which test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int64

from runner.config import SplitConfig
from runner.errors import InputError

SPLITS = ("train", "val", "test")


def split_structures(
    n_structures: int, config: SplitConfig, group: Sequence[str] | None = None
) -> dict[str, Int64[np.ndarray, " n_split"]]:
    """Indices of the structures of each split, shuffled uniformly within the split.

    Args:
        n_structures: how many there are.
        config: method, shares and seed.
        group: name of each structure's group; `method = "group"` needs it.

    Returns:
        `{"train": …, "val": …, "test": …}`; of counts that sum to less than `n_structures`, the
        rest is in no split.

    Raises:
        InputError: counts that sum to more than there is, or a split that would be empty.
    """
    rng = np.random.default_rng(config.seed)
    wanted = _sizes(n_structures, config)
    if config.method == "group":
        assert group is not None
        splits = _by_group(np.asarray(group), wanted, rng)
    else:
        bounds = np.cumsum([0, *wanted.values()])
        order = rng.permutation(n_structures)
        splits = {
            name: order[start:stop]
            for name, start, stop in zip(SPLITS, bounds[:-1], bounds[1:], strict=True)
        }
    for name in SPLITS:
        if wanted[name] > 0 and len(splits[name]) == 0:
            raise InputError(
                f"the {name} split would be empty: there are too few groups",
                where="prepare.split",
                remedy='group by something finer, or use method = "random"',
            )
    return splits


def _sizes(n_structures: int, config: SplitConfig) -> dict[str, int]:
    """Structures of each split; fractions are rounded so that they sum to the whole."""
    shares = {name: getattr(config, name) for name in SPLITS}
    if all(isinstance(share, int) for share in shares.values()):
        if sum(shares.values()) > n_structures:
            raise InputError(
                f"the splits ask for {sum(shares.values())} structures of {n_structures}",
                where="prepare.split",
                remedy="lower train, val or test, or give fractions",
            )
        return shares
    exact = {name: share * n_structures for name, share in shares.items()}
    sizes = {name: int(np.floor(value + 1e-9)) for name, value in exact.items()}
    by_remainder = sorted(SPLITS, key=lambda name: sizes[name] - exact[name])
    for name in by_remainder[: n_structures - sum(sizes.values())]:
        sizes[name] += 1
    for name, share in shares.items():
        if share > 0 and sizes[name] == 0:
            raise InputError(
                f"the {name} split would be empty: {share:g} of {n_structures} structures",
                where=f"prepare.split.{name}",
                remedy="raise its share, or bring more structures",
            )
    return sizes


def _by_group(
    group: np.ndarray, wanted: Mapping[str, int], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Whole groups, in random order, each to the split that still lacks most structures."""
    names, owner, counts = np.unique(group, return_inverse=True, return_counts=True)
    rest = len(group) - sum(wanted.values())  # in no split
    lacking = np.array([*(wanted[name] for name in SPLITS), rest], np.float64)
    lacking[lacking == 0] = -np.inf
    empty = {number for number, name in enumerate(SPLITS) if wanted[name] > 0}
    split_of = np.empty(len(names), np.int64)
    for left, index in zip(range(len(names), 0, -1), rng.permutation(len(names)), strict=True):
        choice = int(np.argmax(lacking))
        if left <= len(empty) and choice not in empty:  # the last groups, and a split without any
            choice = max(empty, key=lambda number: float(lacking[number]))
        split_of[index] = choice
        lacking[choice] -= counts[index]
        empty.discard(choice)
    return {
        name: rng.permutation(np.flatnonzero(split_of[owner] == number))
        for number, name in enumerate(SPLITS)
    }
