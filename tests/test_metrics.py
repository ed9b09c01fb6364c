"""Metrics against a naïve computation over all structures, in unequal batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from molecules import random_structures, without

from runner.batches import make_batch
from runner.config import LossConfig
from runner.losses import Loss
from runner.metrics import METRICS, SplitMetrics, create_error_metrics

SIZES = [3, 1, 5, 2, 4, 6, 2]
BATCHES = [[0, 1, 2], [3], [4, 5, 6]]


def test_an_epoch_comes_from_sums_over_labelled_components() -> None:
    structures = without(random_structures(SIZES, seed=3), "forces", [2, 3])
    structures = without(structures, "energy", [0])
    rng = np.random.default_rng(0)
    energy, forces = rng.normal(size=7), rng.normal(size=(sum(SIZES), 3))
    loss = Loss(
        LossConfig.model_validate({"energy": {"per_atom": True}, "forces": {"weight": 3.0}})
    )
    metrics = SplitMetrics("val", loss, {"energy": ["mae", "rmse"], "forces": ["mae", "rmse"]})
    for chosen in BATCHES:
        batch = make_batch(structures.take(np.array(chosen)), 5.0, torch.float64)
        rows = np.concatenate([np.arange(*structures.first_atom[[s, s + 1]]) for s in chosen])
        prediction = {"energy": torch.tensor(energy[chosen]), "forces": torch.tensor(forces[rows])}
        metrics.update(loss.sums(prediction, batch), prediction, batch)
    values = metrics.compute(loss, loss.weights_at(0))

    e = energy - structures.structures["energy"]
    e, sizes = e[1:], np.array(SIZES)[1:]
    f = forces - structures.atoms["forces"]
    owner = np.repeat(np.arange(7), SIZES)
    per_structure = [np.mean(f[owner == s] ** 2) for s in (0, 1, 4, 5, 6)]
    f = f[~np.isnan(f)]
    expected = {
        "val/energy_mae": np.abs(e).mean(),
        "val/energy_rmse": np.sqrt((e**2).mean()),
        "val/energy_per_atom_mae": np.abs(e / sizes).mean(),
        "val/energy_per_atom_rmse": np.sqrt(((e / sizes) ** 2).mean()),
        "val/forces_mae": np.abs(f).mean(),
        "val/forces_rmse": np.sqrt((f**2).mean()),
        "val/loss/energy": ((e / sizes) ** 2).mean(),
        "val/loss/forces": np.mean(per_structure),
        "val/loss/total_loss": ((e / sizes) ** 2).mean() + 3 * np.mean(per_structure),
    }
    assert values == pytest.approx(expected, rel=1e-12)
    assert values["val/forces_rmse"] >= values["val/forces_mae"]


def test_reset_forgets() -> None:
    structures = random_structures([2, 3])
    batch = make_batch(structures, 5.0)
    loss = Loss(LossConfig.model_validate({"energy": {}}))
    metrics = SplitMetrics("train", loss, {"energy": ["mae"]})
    for offset in (5.0, 1.0):
        prediction = {"energy": batch.labels["energy"] + offset}
        metrics.update(loss.sums(prediction, batch), prediction, batch)
        assert metrics.compute(loss, loss.weights_at(0))["train/energy_mae"] == pytest.approx(
            offset
        )
        metrics.reset()


def test_create_error_metrics_names_its_values() -> None:
    errors = create_error_metrics(["energy", "forces"])
    assert sorted(errors) == ["energy", "energy_per_atom", "forces"]
    errors["forces"].update(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0]))
    assert {name: float(v) for name, v in errors["forces"].compute().items()} == pytest.approx(
        {"forces_mae": 1.5, "forces_rmse": np.sqrt(2.5)}
    )
    losses = create_error_metrics(["energy"], is_loss=True)
    losses["energy"].update(torch.tensor(4.0), torch.tensor(1.0))
    losses["energy"].update(torch.tensor(3.0), torch.tensor(3.0))
    assert float(losses["energy"].compute()["loss/energy"]) == pytest.approx(1.75)


def test_sums_of_many_small_errors_keep_their_digits() -> None:
    (collection,) = create_error_metrics({"forces": ["mae"]}).values()
    zeros = torch.zeros(1_000_000, dtype=torch.float64)
    for _ in range(20):  # 2·10⁷ terms: a float32 sum would stop growing at 2²⁴
        collection.update(zeros + 1.0, zeros)
    assert float(collection.compute()["forces_mae"]) == 1.0


def test_the_config_allows_exactly_the_metrics_there_are() -> None:
    assert set(METRICS) == {"mae", "rmse"}


def test_what_no_structure_is_labelled_for_is_left_out() -> None:
    structures = without(random_structures([2, 3]), "forces", [0, 1])
    batch = make_batch(structures, 5.0)
    loss = Loss(LossConfig.model_validate({"energy": {}, "forces": {}}))
    metrics = SplitMetrics("val", loss, {"energy": ["mae"], "forces": ["mae"]})
    prediction = {"energy": torch.zeros(2), "forces": torch.zeros(5, 3)}
    metrics.update(loss.sums(prediction, batch), prediction, batch)
    values = metrics.compute(loss, loss.weights_at(0))
    assert set(values) == {
        "val/loss/energy", "val/loss/total_loss", "val/energy_mae", "val/energy_per_atom_mae"
    }  # fmt: skip
    assert values["val/loss/total_loss"] == values["val/loss/energy"]
