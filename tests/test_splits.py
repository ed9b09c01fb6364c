"""Every structure in one split, reproducibly; groups whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from runner.config import SplitConfig
from runner.errors import InputError
from runner.splits import Origin, hash_split_files, split_structures, write_split


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


def _config(**settings: Any) -> SplitConfig:
    return SplitConfig.model_validate(settings)


def _sets(splits: dict[str, np.ndarray]) -> dict[str, set[int]]:
    found = {name: set(chosen.tolist()) for name, chosen in splits.items()}
    assert sum(map(len, found.values())) == len(set().union(*found.values()))
    return found


@pytest.mark.parametrize("method", [{}, {"method": "group", "group_by": "molecule"}])
def test_folds_hold_out_everything_once(method: dict[str, Any]) -> None:
    group = [f"m{i % 17}" for i in range(103)] if method else None
    held_out = []
    for fold in range(5):
        splits = split_structures(103, _config(folds=5, fold=fold, seed=3, **method), group)
        found = _sets(splits)
        assert set().union(*found.values()) == set(range(103))
        assert found["val"]
        if group:
            names = [{group[i] for i in chosen} for chosen in found.values()]
            assert not names[0] & names[1] | names[0] & names[2] | names[1] & names[2]
        else:
            assert len(found["test"]) in (20, 21)
        held_out += sorted(found["test"])
    assert sorted(held_out) == list(range(103))


def test_more_folds_than_groups_are_refused() -> None:
    config = _config(method="group", group_by="formula", folds=5, fold=0)
    with pytest.raises(InputError, match=r"3 groups cannot be divided into 5 folds(.|\n)*fewer"):
        split_structures(9, config, list("aaabbbccc"))
    with pytest.raises(InputError, match="8 folds of 4 structures leave a split empty"):
        split_structures(4, _config(folds=8, fold=0))


def test_the_test_split_stays_when_only_the_seed_changes() -> None:
    splits = [_sets(split_structures(200, _config(seed=s, test_seed=7))) for s in (0, 1)]
    assert splits[0]["test"] == splits[1]["test"]
    assert splits[0]["train"] != splits[1]["train"]
    assert {name: len(chosen) for name, chosen in splits[0].items()} == {
        "train": 160, "val": 20, "test": 20
    }  # fmt: skip
    other = _sets(split_structures(200, _config(seed=0, test_seed=8)))
    assert other["test"] != splits[0]["test"]
    group = [f"m{i % 23}" for i in range(200)]
    grouped = [
        _sets(
            split_structures(200, _config(seed=s, test_seed=7, method="group", group_by="k"), group)
        )
        for s in (0, 1)
    ]
    assert grouped[0]["test"] == grouped[1]["test"]
    assert grouped[0]["train"] != grouped[1]["train"]


def test_training_splits_of_less_structures_are_nested() -> None:
    whole = split_structures(200, _config(seed=4))
    parts = [split_structures(200, _config(seed=4, train_size=n)) for n in (10, 50, 160)]
    for part, n in zip(parts, (10, 50, 160), strict=True):
        assert part["train"].tolist() == whole["train"][:n].tolist()
        assert part["test"].tolist() == whole["test"].tolist()
    with pytest.raises(InputError, match=r"train_size asks for 161 structures(.|\n)*has 160"):
        split_structures(200, _config(train_size=161))


def test_sources_may_be_pinned_to_a_split() -> None:
    pinned = ["test"] * 20 + [None] * 100 + ["train"] * 5
    found = _sets(split_structures(125, _config(train=0.9, val=0.1, test=0), None, pinned))
    assert found["test"] == set(range(20))
    assert found["train"] >= set(range(120, 125))
    assert (len(found["train"]), len(found["val"])) == (95, 10)
    only = _sets(split_structures(3, _config(method="file"), None, ["train", "val", "test"]))
    assert only == {"train": {0}, "val": {1}, "test": {2}}


def _origin(lengths: list[int], dropped: tuple[int, ...] = ()) -> Origin:
    source = np.repeat(np.arange(len(lengths)), lengths)
    index = np.concatenate([np.arange(n) for n in lengths])
    kept = ~np.isin(np.arange(len(source)), dropped)
    return Origin(source[kept], index[kept], lengths)


def test_a_split_written_and_read_again_is_the_same(tmp_path: Path) -> None:
    origin = _origin([30, 20])
    splits = split_structures(50, _config(seed=2))
    pairs = {k: np.stack([origin.source[v], origin.source_index[v]], 1) for k, v in splits.items()}
    write_split(tmp_path / "a" / "split.json", ["x.xyz", "y.xyz"], pairs)
    config = _config(method="file", file=str(tmp_path / "a" / "split.json"))
    assert _sets(split_structures(50, config, origin=origin)) == _sets(splits)
    fewer = _sets(split_structures(48, config, origin=_origin([30, 20], (3, 40))))
    lost = {i - (i > 3) - (i > 40) for i in range(50) if i not in (3, 40)}
    assert set().union(*fewer.values()) == lost


def test_files_of_indices_of_others(tmp_path: Path) -> None:
    np.savez(tmp_path / "split.npz", train_idx=[3, 1], val_idx=[0], test_idx=[2, 4])
    (tmp_path / "train.csv").write_text("3\n1\n")
    (tmp_path / "val.json").write_text("[0]")
    np.save(tmp_path / "test.npy", np.array([2, 4]))
    (tmp_path / "plain.json").write_text('{"train": [3, 1], "val": [0], "test": [2, 4]}')
    each = {
        n: str(tmp_path / f"{n}{s}")
        for n, s in (("train", ".csv"), ("val", ".json"), ("test", ".npy"))
    }
    for file in (str(tmp_path / "split.npz"), each, str(tmp_path / "plain.json")):
        config = _config(method="file", file=file)
        found = _sets(split_structures(5, config, origin=_origin([5])))
        assert found == {"train": {1, 3}, "val": {0}, "test": {2, 4}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"train": [0, 1], "test": [1]}', "the index 1 stands twice"),
        ('{"train": [0, 0]}', "the index 0 stands twice"),
        (
            '{"train": [0, 5]}',
            r"the train split names the structure 5, which is not there(.|\n)*from 0 to 4",
        ),
        ('{"train": [-1]}', "names the structure -1"),
        ('{"train": [[0, 1], [1, 2]]}', r"names the structure \[1, 2\]"),
        ('{"train": [0.5]}', "an index is a whole number"),
        ('{"train": "all"}', "an index is a whole number"),
        ('{"trian": [0]}', "it has none of train, val and test"),
        ('{"train": [0', "the split file cannot be read"),
        ("[1, 2]", "it has none of train, val and test|cannot be read"),
    ],
)
def test_a_file_of_indices_that_cannot_be_is_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "split.json").write_text(text)
    config = _config(method="file", file=str(tmp_path / "split.json"))
    with pytest.raises(InputError, match=message):
        split_structures(5, config, origin=_origin([3, 2]))


def test_a_file_of_indices_that_is_not_there_is_refused(tmp_path: Path) -> None:
    config = _config(method="file", file=str(tmp_path / "nowhere.json"))
    with pytest.raises(InputError, match=r"cannot read the split file(.|\n)*nowhere.json"):
        hash_split_files(config)


def test_exchanging_the_files_of_two_splits_is_another_split(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    one = {"train": str(tmp_path / "a"), "val": str(tmp_path / "b")}
    other = {"train": one["val"], "val": one["train"]}
    hashes = [hash_split_files(_config(method="file", file=file)) for file in (one, other)]
    assert hashes[0] != hashes[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"folds": 5}, "folds and fold belong together"),
        ({"folds": 5, "fold": 5}, "fold is counted from 0, so it is at most 4"),
        ({"folds": 5, "fold": 0, "test": 0.1}, "give only val"),
        ({"folds": 2, "fold": 0, "val": 0.5}, "leave nothing to train on"),
        ({"method": "file", "file": "x", "train": 0.8}, "no shares or folds"),
        ({"file": "x.json"}, 'method = "file" and file belong together'),
        ({"method": "file", "file": {"tset": "x"}}, 'file has a "tset"'),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        _config(**settings)


@pytest.mark.parametrize(
    "settings", [{}, {"folds": 3, "fold": 1}, {"method": "file", "file": "x"}, {"test_seed": 1}]
)
def test_a_resolved_split_can_be_read_again(settings: dict[str, Any]) -> None:
    config = _config(**settings)
    assert SplitConfig.model_validate(config.model_dump(exclude_none=True)) == config
