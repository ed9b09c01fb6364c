"""Splits as loaders: sizes, weights, messages; Lightning goes on in the middle of an epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from molecules import springs, write_experiment

from runner import loader
from runner.batches import Batch
from runner.config import BatchConfig, DataConfig, load_config
from runner.datamodule import PreparedDataModule
from runner.errors import ConfigError, DatasetError
from runner.prepare import find_prepared, prepare
from runner.store import PreparedDataset
from runner.terminal import Terminal


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    """100 structures of two files, split by their molecules."""
    folder = tmp_path_factory.mktemp("experiment")
    config_file = write_experiment(folder, springs(n=100))
    lines = (folder / "data.extxyz").read_text().splitlines(keepends=True)
    cut = sum(5 + (i % 3) for i in range(30))
    (folder / "data.extxyz").write_text("".join(lines[:cut]))
    (folder / "more.extxyz").write_text("".join(lines[cut:]))
    text = config_file.read_text()
    text = text.replace('path = "data.extxyz"', 'path = ["data.extxyz", "more.extxyz"]')
    text = text.replace(
        "[train]\n",
        '[prepare.split]\nmethod = "group"\ngroup_by = "molecule"\nval = 0.2\ntest = 0.2\n'
        "train = 0.6\n[train]\n",
        1,
    )
    config_file.write_text(text)
    config = load_config(config_file)
    prepare(config, folder / "prepared", Terminal())
    return find_prepared(config, folder / "prepared", "")


def _data(
    dataset: PreparedDataset, batch: dict[str, int] | None = None, **data: Any
) -> PreparedDataModule:
    config = DataConfig.model_validate(data)
    return PreparedDataModule(
        dataset, BatchConfig.model_validate(batch or {"structures": 8}), 4.0, 0, config
    )


def _drawn(data: PreparedDataModule, epochs: int = 1) -> np.ndarray:
    loader = data.train_dataloader()
    return np.concatenate([b.index.numpy() for _ in range(epochs) for b in loader])


def test_every_structure_of_every_split_comes_once(dataset: PreparedDataset) -> None:
    for batch in ({"structures": 7}, {"atoms": 23}, {"pairs": 70}):
        data = _data(dataset, batch)
        for split in ("train", "val", "test"):
            start, stop = dataset.attributes["splits"][split]
            numbers = np.concatenate([b.index.numpy() for b in data.loader(split)])
            assert sorted(numbers) == list(range(stop - start))
            assert split == "train" or batch != {"structures": 7} or (np.diff(numbers) == 1).all()


def test_a_smaller_training_set_is_part_of_a_larger_one(dataset: PreparedDataset) -> None:
    small, large = (set(_drawn(_data(dataset, train_size=n)).tolist()) for n in (10, 30))
    assert len(small) == 10
    assert len(large) == 30
    assert small < large
    n = dataset.attributes["splits"]["train"][1]
    with pytest.raises(DatasetError, match=rf"train_size is {n + 1}, and .* has {n} structures"):
        _data(dataset, train_size=n + 1)


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        ({"atoms": 4}, "has 5 atoms, more than a batch of 4"),
        ({"pairs": 11}, r"has \d\d pairs, more than a batch of 11"),
    ],
)
def test_a_structure_larger_than_a_batch_is_named(
    dataset: PreparedDataset, batch: dict[str, int], text: str
) -> None:
    with pytest.raises(DatasetError, match=text) as raised:
        _data(dataset, batch).train_dataloader()
    message = str(raised.value)
    assert "a structure of the train split" in message
    name, _, rest = message.partition(".extxyz, structure ")
    number = int(rest.split()[0])
    whole = number + (30 if name.endswith("more") else 0)
    (unit,) = batch
    assert unit != "atoms" or 3 + whole % 3 == 5
    assert "raise train.batch" in message


def test_sources_and_groups_come_as_often_as_each_other(dataset: PreparedDataset) -> None:
    epochs = 60
    for by in ("source", "group"):
        drawn = _drawn(_data(dataset, weights={"by": by}), epochs)
        member = dataset.origins("train")[:, 0] if by == "source" else dataset.groups("train")
        shares = np.bincount(member[drawn])[np.unique(member)] / len(drawn)
        assert shares == pytest.approx(np.full(len(shares), 1 / len(shares)), abs=0.02)


def test_weights_by_name(dataset: PreparedDataset) -> None:
    weights = {"by": "source", "values": {"more.extxyz": 0}}
    drawn = _drawn(_data(dataset, weights=weights))
    assert (dataset.origins("train")[drawn, 0] == 0).all()
    n = dataset.attributes["splits"]["train"][1]
    assert len(drawn) == pytest.approx(n, abs=1)
    names = dataset.attributes["groups"]
    assert names == sorted(f"m{i}" for i in range(7))
    group = int(dataset.groups("train")[0])
    tripled = _data(dataset, weights={"by": "group", "values": {names[group]: 3}})
    times = np.bincount(_drawn(tripled, 40), minlength=n)
    here = dataset.groups("train") == group
    assert times[here].mean() / times[~here].mean() == pytest.approx(3, rel=0.1)


def test_weights_of_what_is_not_there_are_refused(dataset: PreparedDataset) -> None:
    with pytest.raises(DatasetError, match=r'no source "x.xyz"(.|\n)*data.extxyz, more.extxyz'):
        _data(dataset, weights={"by": "source", "values": {"x.xyz": 1}}).train_dataloader()
    zero = {"data.extxyz": 0, "more.extxyz": 0}
    with pytest.raises(DatasetError, match="every source of the training split has the weight 0"):
        _data(dataset, weights={"by": "source", "values": zero}).train_dataloader()


def test_groups_have_to_be_prepared(tmp_path: Path) -> None:
    config_file = write_experiment(tmp_path)
    config = load_config(config_file)
    prepare(config, tmp_path / "prepared", Terminal())
    data = _data(find_prepared(config, tmp_path / "prepared", ""), weights={"by": "group"})
    with pytest.raises(DatasetError, match=r"has no groups(.|\n)*prepare.split.group_by"):
        data.train_dataloader()


def test_rotated_structures_keep_their_shape(dataset: PreparedDataset) -> None:
    plain, turned = (_data(dataset, rotate=rotate) for rotate in (False, True))
    for one, other in zip(plain.train_dataloader(), turned.train_dataloader(), strict=True):
        assert torch.equal(one.index, other.index)
        assert not torch.allclose(one.positions, other.positions)
        for name in ("forces", "dipole"):
            lengths = [b.labels[name].norm(dim=-1) for b in (one, other)]
            assert torch.allclose(*lengths, atol=1e-5)
    for one, other in zip(plain.val_dataloader(), turned.val_dataloader(), strict=True):
        assert torch.equal(one.positions, other.positions)


def test_where_the_data_is_is_said(
    dataset: PreparedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def residence(**data: Any) -> str | None:
        module = _data(dataset, **data)
        module._say = said.append
        module.train_dataloader()
        return module.residence

    assert residence() == "memory"
    assert residence(residence="stream") == "stream"
    assert residence(residence="device") == "device"
    monkeypatch.setattr(loader, "available_memory", lambda: 1000)
    assert residence() == "stream"
    assert "in memory" in said[0]
    assert "lists, which are kept" in said[0]
    assert "streamed from disk, neighbour lists made anew every epoch" in said[1] == said[3]
    assert "on the device cpu" in said[2]


class _Module(lightning.LightningModule):
    """Writes down which structures it is given."""

    def __init__(self, stop_at: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[int, list[int]]] = []
        self.stop_at = stop_at

    def training_step(self, batch: Batch, number: int) -> torch.Tensor:
        self.seen.append((self.current_epoch, batch.index.tolist()))
        if (self.current_epoch, number) == self.stop_at:
            raise KeyError("stop")
        return self.weight.sum()

    def validation_step(self, batch: Batch) -> None:
        """Validate nothing."""

    def on_train_batch_end(self, *_: Any) -> None:
        if self.stop_at is not None:
            assert self.trainer.checkpoint_callback is None
            self.trainer.save_checkpoint(Path(self.trainer.default_root_dir) / "last.ckpt")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _trainer(folder: Path, **settings: Any) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu",
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        reload_dataloaders_every_n_epochs=1,
        **settings,
    )


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")  # torch, Lightning
@pytest.mark.parametrize("stop_at", [(0, 1), (1, 0), (1, 3), (2, 2)])
@pytest.mark.parametrize("batch", [{"structures": 8}, {"atoms": 40}])
def test_lightning_goes_on_with_the_next_batch(
    dataset: PreparedDataset, tmp_path: Path, stop_at: tuple[int, int], batch: dict[str, int]
) -> None:
    whole = _Module()
    _trainer(tmp_path).fit(whole, _data(dataset, batch))
    stopped = _Module(stop_at)
    with pytest.raises(KeyError, match="stop"):
        _trainer(tmp_path).fit(stopped, _data(dataset, batch))
    stopped.seen.pop()  # the step that was not finished
    resumed = _Module()
    _trainer(tmp_path).fit(
        resumed, _data(dataset, batch), ckpt_path=tmp_path / "last.ckpt", weights_only=True
    )
    assert stopped.seen + resumed.seen == whole.seen
    assert {epoch for epoch, _ in whole.seen} == {0, 1, 2}


def test_a_size_of_batches_is_one_of_three(tmp_path: Path) -> None:
    config_file = write_experiment(tmp_path)
    text = r"found structures = 8 and atoms = 5; the size of a batch(.|\n)*--set 'train.batch="
    with pytest.raises(ConfigError, match=text):
        load_config(config_file, ["train.batch.atoms=5"])
    assert load_config(config_file, ["train.batch={pairs = 5}"]).train.batch.limit == 5
    assert load_config(config_file, ["train.batch={}"]).train.batch.limit == 32
