"""Every structure comes once an epoch; batches are well filled, shuffles fair."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from runner import epochs
from runner.epochs import Budget, EpochOrder, pack


def _batches(order: EpochOrder, epoch: int) -> list[list[int]]:
    return [d.chosen.tolist() for window in order.windows(epoch) for d in window.batches]


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 300),
    block=st.integers(1, 60),
    limit=st.integers(1, 80),
    seed=st.one_of(st.none(), st.integers(0, 5)),
    epoch=st.integers(0, 3),
    unit=st.sampled_from(["structures", "atoms"]),
)
def test_every_structure_comes_once_an_epoch_and_no_batch_is_above_its_budget(
    n: int, block: int, limit: int, seed: int | None, epoch: int, unit: epochs.Unit
) -> None:
    sizes = np.random.default_rng(n).integers(1, limit + 1, n).astype(np.int32)
    budget = Budget(unit, limit, sizes if unit == "atoms" else None)
    order = EpochOrder(n, budget, seed=seed, block=block)
    batches = _batches(order, epoch)
    assert sorted(s for batch in batches for s in batch) == list(range(n))
    assert len(batches) == order.n_batches(epoch)
    held = [len(b) if unit == "structures" else int(sizes[b].sum()) for b in batches]
    assert all(0 < size <= limit for size in held)
    if unit == "structures":
        assert all(size == limit for size in held[:-1])
    assert _batches(EpochOrder(n, budget, seed=seed, block=block), epoch) == batches


def test_epochs_and_seeds_differ_and_without_a_seed_structures_come_as_they_lie() -> None:
    def flat(seed: int | None, epoch: int) -> list[int]:
        order = EpochOrder(50, Budget("structures", 7), seed=seed, block=5)
        return [s for batch in _batches(order, epoch) for s in batch]

    shuffled = [tuple(flat(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(shuffled)) == 4
    assert flat(None, 0) == flat(None, 1) == list(range(50))


def test_of_a_small_split_every_place_is_equally_likely() -> None:
    n, repeats = 8, 4000
    counts = np.zeros((n, n))
    for epoch in range(repeats):
        order = EpochOrder(n, Budget("structures", 3), seed=1)
        (window,) = order.windows(epoch)
        places = np.concatenate([draw.chosen for draw in window.batches])
        counts[places, np.arange(n)] += 1
    # n² cells with rows and columns that sum to `repeats`: (n − 1)² degrees of freedom
    result = chisquare(counts.ravel(), ddof=2 * n - 2)
    assert result.pvalue > 1e-4


def test_of_a_large_split_every_window_is_equally_likely_for_a_structure() -> None:
    n, block, repeats = 64, 2, 3000
    windows = n // block // epochs.BLOCKS_IN_WINDOW
    counts = np.zeros((n // block, windows))
    for epoch in range(repeats):
        order = EpochOrder(n, Budget("structures", 8), seed=2, block=block)
        for number, window in enumerate(order.windows(epoch)):
            counts[window.blocks, number] += 1
    assert (counts.sum(axis=0) == repeats * epochs.BLOCKS_IN_WINDOW).all()
    result = chisquare(counts.ravel(), ddof=n // block + windows - 2)
    assert result.pvalue > 1e-4


def test_structures_of_a_window_meet_in_random_company() -> None:
    together, repeats, n = np.zeros(11), 6000, 12
    for epoch in range(repeats):
        for batch in _batches(EpochOrder(n, Budget("structures", 4), seed=3), epoch):
            if 0 in batch:
                together[[s - 1 for s in batch if s != 0]] += 1
    assert chisquare(together).pvalue > 1e-4  # each other one in 3 of 11 epochs


@pytest.mark.parametrize(
    ("sizes", "limit"),
    [
        (np.random.default_rng(0).integers(9, 30, 20000), 2048),
        (np.random.default_rng(1).integers(64, 201, 3000), 512),
        (np.random.default_rng(2).integers(64, 201, 300), 1024),
        (np.random.default_rng(3).integers(64, 201, 3000), 401),
        (np.random.default_rng(4).lognormal(3, 1, 5000).astype(int).clip(1, 400), 1000),
        (np.random.default_rng(5).integers(1, 200, 3000), 256),
        (np.full(500, 64), 200),
    ],
)
def test_batches_are_filled_by_95_percent(sizes: np.ndarray, limit: int) -> None:
    batches = pack(sizes, limit)
    filled = np.array([sizes[batch].sum() for batch in batches])
    assert sorted(np.concatenate(batches)) == list(range(len(sizes)))
    assert filled.max() <= limit
    assert (filled[:-1] / limit).mean() > 0.95
    assert filled.argmin() == len(filled) - 1 or filled[-1] == filled.min()


def test_what_cannot_share_a_batch_has_one_of_its_own() -> None:
    assert [len(batch) for batch in pack(np.array([6, 6, 6]), 10)] == [1, 1, 1]
    assert pack(np.array([], np.int64), 10) == []
    (one,) = pack(np.array([3, 3, 4]), 10)
    assert one.tolist() == [0, 1, 2]


def test_windows_are_packed_as_well_as_the_whole() -> None:
    sizes = np.random.default_rng(0).integers(20, 90, 4000).astype(np.int32)
    order = EpochOrder(4000, Budget("atoms", 256, sizes), seed=0, block=100)
    filled = [sizes[batch].sum() for batch in _batches(order, 0)]
    assert np.mean(filled) / 256 > 0.95


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 100), block=st.integers(1, 40), epoch=st.integers(0, 3))
def test_weighted_structures_come_as_often_as_their_weight_says(
    seed: int, block: int, epoch: int
) -> None:
    n = 60
    weights = np.random.default_rng(seed).uniform(0, 4, n)
    expected = weights / weights.mean()
    order = EpochOrder(n, Budget("structures", 7), seed=seed, block=block, weights=weights)
    times = np.bincount([s for b in _batches(order, epoch) for s in b], minlength=n)
    assert (np.floor(expected - 1e-6) <= times).all()
    assert (times <= np.ceil(expected + 1e-6)).all()
    assert abs(times.sum() - n) <= 1
    assert len(_batches(order, epoch)) == order.n_batches(epoch)


def test_weights_are_met_on_average_and_companions_vary() -> None:
    weights = np.repeat([0.5, 1.5], 20)
    order = EpochOrder(40, Budget("structures", 10), seed=0, weights=weights)
    times = np.array(
        [np.bincount(np.concatenate(_batches(order, e)), minlength=40) for e in range(2000)]
    )
    assert times.mean(axis=0) == pytest.approx(weights, abs=0.06)
    both = (times[:, 0] * times[:, 1]).mean()
    assert both == pytest.approx(0.25, abs=0.06)  # independent of each other


def test_rotations_do_not_change_the_order_and_are_uniform() -> None:
    plain = EpochOrder(500, Budget("structures", 9), seed=0, block=50)
    turned = EpochOrder(500, Budget("structures", 9), seed=0, block=50, rotate=True)
    assert _batches(plain, 1) == _batches(turned, 1)
    q = np.concatenate(
        [d.rotations for e in range(20) for w in turned.windows(e) for d in w.batches]  # type: ignore[misc]
    )
    assert np.linalg.norm(q, axis=1) == pytest.approx(1)
    # of a uniform quaternion every component has mean 0 and second moment 1/4
    assert q.mean(axis=0) == pytest.approx(np.zeros(4), abs=0.02)
    assert q.T @ q / len(q) == pytest.approx(np.eye(4) / 4, abs=0.02)
    again = EpochOrder(500, Budget("structures", 9), seed=0, block=50, rotate=True)
    first = next(iter(again.windows(0))).batches[0].rotations
    assert np.array_equal(first, next(iter(turned.windows(0))).batches[0].rotations)


def test_a_batch_may_be_larger_than_a_window() -> None:
    order = EpochOrder(100, Budget("structures", 45), seed=0, block=3)
    batches = _batches(order, 0)
    assert [len(batch) for batch in batches] == [45, 45, 10]
    assert sorted(np.concatenate(batches)) == list(range(100))


def test_huge_weights_are_relative_too() -> None:
    order = EpochOrder(10, Budget("structures", 5), seed=0, weights=np.full(10, 1e308))
    assert sorted(np.concatenate(_batches(order, 0))) == list(range(10))
