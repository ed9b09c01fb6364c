"""Every structure in one split, reproducibly; groups whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from runner.config import SplitConfig
from runner.errors import InputError
from runner.splits import split_structures


def _split(n: int, group: list[str] | None = None, **settings: Any) -> dict[str, np.ndarray]:
    return split_structures(n, SplitConfig.model_validate(settings), group)


@pytest.mark.parametrize("n", [10, 11, 19, 1000, 12345])
def test_fractions_cover_every_structure_once(n: int) -> None:
    splits = _split(n)
    assert sorted(np.concatenate(list(splits.values()))) == list(range(n))
    for name, share in (("train", 0.8), ("val", 0.1), ("test", 0.1)):
        assert abs(len(splits[name]) - share * n) < 1


def test_fractions_that_do_not_sum_to_one_in_binary_work() -> None:
    splits = _split(10, train=0.7, val=0.2, test=0.1)
    assert {name: len(part) for name, part in splits.items()} == {"train": 7, "val": 2, "test": 1}


def test_the_seed_decides() -> None:
    first, again, other = _split(100, seed=4), _split(100, seed=4), _split(100, seed=5)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["train"], other["train"])


def test_structures_are_shuffled_within_a_split() -> None:
    train = _split(1000)["train"]
    correlation = np.corrcoef(np.arange(len(train)), train)[0, 1]
    assert abs(correlation) < 0.15


def test_counts_leave_the_rest_out() -> None:
    splits = _split(100, train=50, val=10, test=0)
    assert {name: len(part) for name, part in splits.items()} == {"train": 50, "val": 10, "test": 0}
    assert len(np.unique(np.concatenate(list(splits.values())))) == 60


def test_too_many_are_refused() -> None:
    with pytest.raises(InputError, match=r"ask for 110 structures of 100(.|\n)*remedy"):
        _split(100, train=90, val=10, test=10)


def test_a_split_that_would_be_empty_is_refused() -> None:
    with pytest.raises(InputError, match=r"the val split would be empty: 0\.1 of 3 structures"):
        _split(3)


@pytest.mark.parametrize("seed", range(5))
def test_no_group_is_in_two_splits_and_sizes_come_near(seed: int) -> None:
    rng = np.random.default_rng(seed)
    group = [f"g{n}" for n in rng.integers(0, 60, 1000)]
    splits = _split(1000, group, method="group", group_by="molecule", seed=seed)
    assert sorted(np.concatenate(list(splits.values()))) == list(range(1000))
    members = [{group[index] for index in part} for part in splits.values()]
    assert not members[0] & members[1]
    assert not members[0] & members[2]
    assert not members[1] & members[2]
    for part, share in zip(splits.values(), (0.8, 0.1, 0.1), strict=True):
        assert len(part) == pytest.approx(1000 * share, abs=40)


def test_too_few_groups_are_refused() -> None:
    with pytest.raises(InputError, match="split would be empty: there are too few groups"):
        _split(10, ["a"] * 5 + ["b"] * 5, method="group", group_by="molecule")


@pytest.mark.parametrize("seed", range(20))
def test_few_groups_still_give_each_split_one(seed: int) -> None:
    group = [f"g{index % 3}" for index in range(30)]
    splits = _split(30, group, method="group", group_by="molecule", seed=seed)
    assert [len(part) for part in splits.values()] == [10, 10, 10]


@pytest.mark.parametrize("seed", range(10))
def test_any_fractions_give_sizes_within_one_of_their_share(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet([4, 2, 2]).tolist()
    n = int(rng.integers(100, 1000))
    splits = _split(n, **dict(zip(("train", "val", "test"), shares, strict=True)))
    assert sorted(np.concatenate(list(splits.values()))) == list(range(n))
    for part, share in zip(splits.values(), shares, strict=True):
        assert abs(len(part) - share * n) < 1


@pytest.mark.parametrize("seed", range(5))
def test_every_structure_is_as_likely_to_be_in_each_place(seed: int) -> None:
    first = [_split(20, seed=1000 * seed + trial)["train"][0] for trial in range(400)]
    counts = np.bincount(first, minlength=20)
    assert np.sum((counts - 20) ** 2 / 20) < 55  # χ² of 19 degrees of freedom: p < 3e-5


@pytest.mark.parametrize("counts", [(100, 50, 0), (100, 50, 50), (700, 0, 0)])
def test_groups_by_counts_come_near_them_and_the_rest_is_left_out(
    counts: tuple[int, int, int],
) -> None:
    group = [f"g{index % 40}" for index in range(1000)]  # 40 groups of 25
    train, val, test = counts
    splits = _split(1000, group, method="group", group_by="m", train=train, val=val, test=test)
    assert [len(part) for part in splits.values()] == pytest.approx(counts, abs=25)
    members = [{group[index] for index in part} for part in splits.values()]
    assert sum(map(len, members)) == len(set.union(*members))


def test_groups_leave_a_split_of_share_zero_empty() -> None:
    group = [f"g{index % 40}" for index in range(1000)]
    splits = _split(1000, group, method="group", group_by="m", train=0.9, val=0.1, test=0.0)
    assert [len(part) for part in splits.values()] == [900, 100, 0]


def test_structures_of_groups_are_shuffled_within_a_split() -> None:
    group = [f"g{index % 200}" for index in range(1000)]
    train = _split(1000, group, method="group", group_by="m")["train"]
    assert abs(np.corrcoef(np.arange(len(train)), train)[0, 1]) < 0.15
