"""Which structures train, which validate, which test."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from runner.config import SplitConfig
from runner.errors import InputError

SPLITS = ("train", "val", "test")
Indices = Int64[np.ndarray, " n_split"]


@dataclass(frozen=True)
class Origin:
    """Where each structure that is to be divided came from.

    Attributes:
        source: number of its file, as the config names them.
        source_index: its number in that file, from 0.
        file_lengths: structures of each file, those that a filter dropped included.
    """

    source: Int64[np.ndarray, " n_structures"]
    source_index: Int64[np.ndarray, " n_structures"]
    file_lengths: Sequence[int]


def split_structures(
    n_structures: int,
    config: SplitConfig,
    group: Sequence[str] | None = None,
    pinned: Sequence[str | None] | None = None,
    origin: Origin | None = None,
) -> dict[str, Indices]:
    """Indices of the structures of each split, shuffled uniformly within the split.

    Args:
        n_structures: how many there are.
        config: method, shares and seeds.
        group: name of each structure's group; `method = "group"` needs it.
        pinned: the split that each structure's source is pinned to, or None; shares are those of
            the structures that are not.
        origin: where each came from; `method = "file"` with a file needs it.

    Returns:
        `{"train": …, "val": …, "test": …}`; of counts that sum to less than `n_structures`, the
        rest is in no split.

    Raises:
        InputError: counts that sum to more than there is, a split that would be empty, indices
            that there are not or that stand twice.
    """
    rng = np.random.default_rng(config.seed)
    if config.method == "file" and config.file is not None:
        assert origin is not None
        splits = _shuffled(read_split(config.file, origin), rng)
    elif pinned is not None and any(pinned):
        of = np.array([name or "" for name in pinned])
        free = np.flatnonzero(of == "")
        fixed = {name: np.flatnonzero(of == name) for name in SPLITS}
        names = None if group is None else np.asarray(group)[free]
        divided = fixed
        if len(free) and config.method != "file":
            divided = _divided(len(free), config, names, rng, empty_allowed=fixed)
            divided = {k: np.concatenate([fixed[k], free[divided[k]]]) for k in SPLITS}
        splits = _shuffled(divided, rng)
    else:
        splits = _divided(n_structures, config, None if group is None else np.asarray(group), rng)
    return splits | {"train": _first(splits["train"], config.train_size)}


def _shuffled(splits: Mapping[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {name: rng.permutation(splits[name]) for name in SPLITS}


def _first(train: np.ndarray, size: int | None) -> np.ndarray:
    """The training split cut to a size; it is shuffled, so smaller ones are part of larger ones."""
    if size is not None and size > len(train):
        raise InputError(
            f"train_size asks for {size} structures, and the training split has {len(train)}",
            where="prepare.split.train_size",
            remedy="lower it, or raise the share of train",
        )
    return train[:size]


# --------------------------------------------------------------------------------------------------
# By shares
# --------------------------------------------------------------------------------------------------


def _divided(
    n: int,
    config: SplitConfig,
    group: np.ndarray | None,
    rng: np.random.Generator,
    empty_allowed: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Divide n structures by the shares of the config, each split shuffled.

    A split that has structures in `empty_allowed` already may get none.
    """
    wanted = _sizes(n, config, empty_allowed or {})
    if config.method == "group":
        assert group is not None
        splits = _shuffled(_by_group(group, wanted, config, rng), rng)
    else:
        splits = _one_by_one(n, wanted, config, rng)
    for name in SPLITS:
        if wanted[name] > 0 and len(splits[name]) == 0:
            raise InputError(
                f"the {name} split would be empty: there are too few groups",
                where="prepare.split",
                remedy='group by something finer, or use method = "random"',
            )
    return splits


def _one_by_one(
    n: int, wanted: Mapping[str, int], config: SplitConfig, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Structures in random order, cut to the sizes that are wanted."""
    order = rng.permutation(n)
    if config.folds is not None and config.fold is not None:
        bounds = _fold_bounds(n, config.folds)
        test = order[bounds[config.fold] : bounds[config.fold + 1]]
        order = np.concatenate([order[: bounds[config.fold]], order[bounds[config.fold + 1] :]])
    elif config.test_seed is not None:
        test = np.random.default_rng(config.test_seed).permutation(n)[: wanted["test"]]
        order = order[~np.isin(order, test)]
    else:
        first = wanted["train"] + wanted["val"]
        test = order[first : first + wanted["test"]]
    train = order[: wanted["train"]]
    return {"train": train, "val": order[len(train) : len(train) + wanted["val"]], "test": test}


def _by_group(
    group: np.ndarray, wanted: Mapping[str, int], config: SplitConfig, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Whole groups to each split."""
    n = len(group)
    names, owner, counts = np.unique(group, return_inverse=True, return_counts=True)
    owner = owner.ravel()
    if config.folds is not None and config.fold is not None:
        test = _fold(counts, config.folds, config.fold, np.random.default_rng(config.seed))
    elif config.test_seed is not None:
        order = np.random.default_rng(config.test_seed)
        test = _drawn(counts, {"test": wanted["test"]}, n - wanted["test"], order) == 0
    else:
        test = np.zeros(len(names), bool)
    split_of = np.full(len(names), SPLITS.index("test"))
    rest = {k: v for k, v in wanted.items() if k != "test" or not test.any()}
    open_ = np.flatnonzero(~test)
    unused = int(counts[open_].sum()) - sum(rest.values())
    drawn = _drawn(counts[open_], rest, unused, rng)
    split_of[open_] = [SPLITS.index(list(rest)[i]) if i < len(rest) else -1 for i in drawn]
    return {name: np.flatnonzero(split_of[owner] == number) for number, name in enumerate(SPLITS)}


def _sizes(n: int, config: SplitConfig, already: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Structures of each split; fractions are rounded so that they sum to the whole."""
    shares: dict[str, float] = {name: getattr(config, name) or 0 for name in SPLITS}
    if config.folds is not None and config.fold is not None:
        bounds = _fold_bounds(n, config.folds)
        test = int(bounds[config.fold + 1] - bounds[config.fold])
        val = shares["val"] if isinstance(shares["val"], int) else round(shares["val"] * n)
        shares = {"train": n - test - val, "val": int(val), "test": test}
        if shares["train"] < 1 or test < 1:
            raise InputError(
                f"{config.folds} folds of {n} structures leave a split empty",
                where="prepare.split.folds",
                remedy="take fewer folds, a smaller val, or bring more structures",
            )
    if all(isinstance(share, int) for share in shares.values()):
        counts = {name: int(share) for name, share in shares.items()}
        if sum(counts.values()) > n:
            raise InputError(
                f"the splits ask for {sum(counts.values())} structures of {n}",
                where="prepare.split",
                remedy="lower train, val or test, or give fractions",
            )
        return counts
    exact = {name: share * n for name, share in shares.items()}
    sizes = {name: int(np.floor(value + 1e-9)) for name, value in exact.items()}
    by_remainder = sorted(SPLITS, key=lambda name: sizes[name] - exact[name])
    for name in by_remainder[: n - sum(sizes.values())]:
        sizes[name] += 1
    for name, share in shares.items():
        if share > 0 and sizes[name] == 0 and not len(already.get(name, ())):
            raise InputError(
                f"the {name} split would be empty: {share:g} of {n} structures",
                where=f"prepare.split.{name}",
                remedy="raise its share, or bring more structures",
            )
    return sizes


def _drawn(
    counts: np.ndarray, wanted: Mapping[str, int], unused: int, rng: np.random.Generator
) -> np.ndarray:
    """The number of the split that each group goes to; `len(wanted)` is none.

    Whole groups, in random order, each to the split that still lacks most structures.
    """
    order = rng.permutation(len(counts))
    lacking = np.array([*wanted.values(), unused], np.float64)
    lacking[lacking <= 0] = -np.inf
    empty = {number for number, size in enumerate(wanted.values()) if size > 0}
    split_of = np.empty(len(counts), np.int64)
    for left, index in zip(range(len(counts), 0, -1), order, strict=True):
        choice = int(np.argmax(lacking))
        if left <= len(empty) and choice not in empty:  # the last groups, and a split without any
            choice = max(empty, key=lambda number: float(lacking[number]))
        split_of[index] = choice
        lacking[choice] -= counts[index]
        empty.discard(choice)
    return split_of


def _fold_bounds(n: int, folds: int) -> np.ndarray:
    """Where each fold of n structures begins, and the last one ends."""
    bounds: np.ndarray = np.linspace(0, n, folds + 1).round().astype(int)
    return bounds


def _fold(counts: np.ndarray, folds: int, fold: int, rng: np.random.Generator) -> np.ndarray:
    """Which groups are the test of one fold; the folds are as equal as groups allow."""
    if len(counts) < folds:
        raise InputError(
            f"{len(counts)} groups cannot be divided into {folds} folds",
            where="prepare.split.folds",
            remedy="take fewer folds, or group by something finer",
        )
    bounds = _fold_bounds(int(counts.sum()), folds)
    sizes = {str(number): int(size) for number, size in enumerate(np.diff(bounds))}
    chosen: np.ndarray = _drawn(counts, sizes, 0, rng) == fold
    return chosen


# --------------------------------------------------------------------------------------------------
# As written in a file
# --------------------------------------------------------------------------------------------------


def hash_split_files(config: SplitConfig) -> list[str]:
    """SHA-256 of each file of indices that a config names, with the split that it is of.

    Raises:
        InputError: a file that is not there.
    """
    files = {"": config.file} if isinstance(config.file, str) else dict(config.file or {})
    return [
        f"{split} {hashlib.sha256(_bytes(Path(path))).hexdigest()}".strip()
        for split, path in sorted(files.items())
    ]


def write_split(path: Path, sources: Sequence[str], splits: Mapping[str, np.ndarray]) -> None:
    """Write which structure is in which split, for `method = "file"` to read.

    Args:
        path: a JSON file.
        sources: names of the data files.
        splits: (n, 2) each: number of the data file, and of the structure in it, from 0.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"sources": list(sources)} | {k: v.tolist() for k, v in splits.items()}
    path.write_text(json.dumps(document) + "\n")


def read_split(file: str | Mapping[str, str], origin: Origin) -> dict[str, Indices]:
    """Splits as they are written.

    Args:
        file: one file for all splits (JSON as `write_split` makes it or with plain indices; npz
            with `train_idx`, `val_idx`, `test_idx`), or a file of plain indices for each split
            (text, JSON or npy).
        origin: where each structure came from.

    Returns:
        Numbers of the structures in `origin`. An index counts from 0: over all files in their
        order, or, as [file, index], in one file. Structures that a filter dropped are left out.

    Raises:
        InputError: a file that cannot be read, an index that there is not, or that stands twice.
    """
    tables = _split_tables(file)
    starts = np.cumsum([0, *origin.file_lengths])
    number_of = np.full(int(starts[-1]), -1, np.int64)
    number_of[starts[origin.source] + origin.source_index] = np.arange(len(origin.source))
    overall = {name: _overall(name, rows, starts) for name, (rows, _) in tables.items()}
    every, times = np.unique(np.concatenate(list(overall.values())), return_counts=True)
    if (times > 1).any():
        raise InputError(
            f"the index {every[np.argmax(times > 1)]} stands twice in the splits",
            where=", ".join(dict.fromkeys(where for _, where in tables.values())),
            allowed="each structure in at most one split, once",
        )
    found = {name: number_of[rows] for name, rows in overall.items()}
    return {
        name: found[name][found[name] >= 0] if name in found else np.zeros(0, np.int64)
        for name in SPLITS
    }


def _overall(name: str, rows: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Indices over all files."""
    if rows.ndim == 2:
        lengths = np.diff(starts)
        known = (rows >= 0).all(axis=1) & (rows[:, 0] < len(lengths))
        known &= rows[:, 1] < lengths[np.clip(rows[:, 0], 0, len(lengths) - 1)]
        flat = starts[np.clip(rows[:, 0], 0, len(lengths) - 1)] + rows[:, 1]
    else:
        known, flat = (rows >= 0) & (rows < starts[-1]), rows
    if not known.all():
        raise InputError(
            f"the {name} split names the structure {rows[np.argmin(known)].tolist()}, which is not "
            "there",
            where="prepare.split.file",
            allowed=f"indices from 0 to {starts[-1] - 1}, or [file, index] with files from 0 to "
            f"{len(starts) - 2}",
        )
    result: np.ndarray = flat.astype(np.int64)
    return result


def _split_tables(file: str | Mapping[str, str]) -> dict[str, tuple[np.ndarray, str]]:
    """The indices of each split as they are written, and the file they stand in."""
    if not isinstance(file, str):
        return {name: (_indices(Path(path)), path) for name, path in file.items()}
    path = Path(file)
    data = _bytes(path)
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as stored:
                given: dict[str, Any] = {
                    key.removesuffix("_idx"): stored[key] for key in stored.files
                }
        else:
            given = json.loads(data)
        tables = {name: (_whole(given[name]), file) for name in SPLITS if name in given}
    except Exception as error:  # zip, JSON and numpy errors
        raise _unreadable(path, error) from None
    if not tables:
        raise _unreadable(path, ValueError("it has none of train, val and test"))
    return tables


def _indices(path: Path) -> np.ndarray:
    """Plain indices of one split: a text of whole numbers, JSON, or npy."""
    data = _bytes(path)
    try:
        if path.suffix == ".npy":
            return _whole(np.load(path, allow_pickle=False))
        if path.suffix == ".json":
            return _whole(json.loads(data))
        return _whole([int(word) for word in data.decode().replace(",", " ").split()])
    except Exception as error:  # decoding, JSON and numpy errors
        raise _unreadable(path, error) from None


def _whole(values: Any) -> np.ndarray:
    array = np.asarray(values)
    if array.size == 0:
        return np.zeros(0, np.int64)
    if array.dtype.kind not in "iu" or array.ndim > 2 or (array.ndim == 2 and array.shape[1] != 2):
        raise ValueError("an index is a whole number, or a pair of them")
    return array.astype(np.int64)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"cannot read the split file: {error.strerror}",
            where=str(path),
            remedy="correct prepare.split.file",
        ) from None


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(
        f"the split file cannot be read: {error}",
        where=str(path),
        allowed='JSON {"train": [0, 5, …], "val": […], "test": […]}, npz with train_idx, val_idx '
        "and test_idx, or one file of whole numbers a split",
    )
