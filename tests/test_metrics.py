"""Metrics against a naïve computation over all structures, in unequal batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase.data import chemical_symbols
from molecules import random_structures, without
from sklearn.metrics import r2_score
from torchmetrics import Metric

from runner.batches import make_batch
from runner.config import METRIC_NAMES, LossConfig
from runner.errors import ConfigError
from runner.losses import Loss
from runner.metrics import (
    METRICS,
    SplitMetrics,
    create_error_metrics,
    groupings,
    has_unit,
    quantity_of,
)
from runner.structures import Structures

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
    assert tuple(METRICS) == METRIC_NAMES


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


def test_every_metric_equals_its_formula_over_all_batches() -> None:
    structures = random_structures(SIZES, seed=5)
    rng = np.random.default_rng(1)
    forces = structures.atoms["forces"] + 0.5 * rng.normal(size=(sum(SIZES), 3))
    structures.atoms["forces"][4] = 0.0  # a vector of no length, which has no angle
    own = "torchmetrics:PearsonCorrCoef"
    loss = Loss(LossConfig.model_validate({"forces": {}}))
    metrics = SplitMetrics("val", loss, {"forces": [*METRICS, own]})
    for chosen in BATCHES:
        batch = make_batch(structures.take(np.array(chosen)), 5.0, torch.float64)
        rows = np.concatenate([np.arange(*structures.first_atom[[s, s + 1]]) for s in chosen])
        prediction = {"forces": torch.tensor(forces[rows])}
        metrics.update(loss.sums(prediction, batch), prediction, batch)
    values = metrics.compute(loss, loss.weights_at(0))
    y, error = structures.atoms["forces"], forces - structures.atoms["forces"]
    lengths = np.linalg.norm(y, axis=1)
    cosines = [
        a @ b / (n * np.linalg.norm(a)) for a, b, n in zip(forces, y, lengths, strict=True) if n
    ]
    assert {name: v for name, v in values.items() if "loss" not in name} == pytest.approx(
        {
            "val/forces_mae": np.abs(error).mean(),
            "val/forces_rmse": np.sqrt((error**2).mean()),
            "val/forces_max_error": np.abs(error).max(),
            "val/forces_r2": r2_score(y.ravel(), forces.ravel()),
            "val/forces_cosine": np.mean(cosines),
            "val/forces_PearsonCorrCoef": np.corrcoef(y.ravel(), forces.ravel())[0, 1],
        },
        rel=1e-12,
    )


def test_errors_apart_equal_those_of_each_group() -> None:
    structures = without(random_structures([1, 2, 3, 4, 5, 8, 9], seed=6), "forces", [1])
    structures = without(structures, "total_charge", [6])
    source = np.array([0, 1, 1, 0, 1, 1, 0], np.int16)
    structures = Structures(
        structures.first_atom, structures.atoms, structures.structures | {"source": source}
    )
    sizes = np.diff(structures.first_atom)
    owner = np.repeat(np.arange(7), sizes)
    rng = np.random.default_rng(2)
    energy, forces = rng.normal(size=7), rng.normal(size=(sizes.sum(), 3))
    loss = Loss(LossConfig.model_validate({"energy": {}, "forces": {}}))
    apart = groupings(["size", "charge", "element", "source"], ["a.xyz", "b.xyz", "unused.xyz"])
    measured = {"energy": ["mae"], "forces": ["rmse", "max_error", "cosine"]}
    metrics = SplitMetrics("val", loss, measured, apart)
    for chosen in BATCHES:
        batch = make_batch(structures.take(np.array(chosen)), 5.0, torch.float64)
        rows = np.flatnonzero(np.isin(owner, chosen))
        prediction = {"energy": torch.tensor(energy[chosen]), "forces": torch.tensor(forces[rows])}
        metrics.update(loss.sums(prediction, batch), prediction, batch)
    values = metrics.compute(loss, loss.weights_at(0))

    charge = [
        f"{c:+.0f}" if c else "0" for c in np.nan_to_num(structures.structures["total_charge"])
    ]
    charge[6] = "unknown"
    size = ["1", "2", "3-4", "3-4", "5-8", "5-8", "9-16"]
    symbols = np.array([chemical_symbols[z] for z in structures.atoms["atomic_numbers"]])
    groups = {
        "charge": np.array(charge),
        "size": np.array(size),
        "source": np.array(["a.xyz", "b.xyz"])[source],
    }
    e = np.abs(energy - structures.structures["energy"])
    f = forces - structures.atoms["forces"]
    cosines = (forces * structures.atoms["forces"]).sum(1)
    cosines /= np.linalg.norm(forces, axis=1) * np.linalg.norm(structures.atoms["forces"], axis=1)
    expected = {}
    for by, of in [*groups.items(), ("element", None)]:
        of_atoms = symbols if of is None else of[owner]
        for name in set(of_atoms):
            here = (of_atoms == name) & ~np.isnan(f).any(axis=1)
            if here.any():
                end = f"_by_{by}/{name}"
                expected[f"val/forces_rmse{end}"] = np.sqrt((f[here] ** 2).mean())
                expected[f"val/forces_max_error{end}"] = np.abs(f[here]).max()
                expected[f"val/forces_cosine{end}"] = cosines[here].mean()
        for name in [] if of is None else set(of):
            expected[f"val/energy_mae_by_{by}/{name}"] = e[of == name].mean()
            expected[f"val/energy_per_atom_mae_by_{by}/{name}"] = (e / sizes)[of == name].mean()
    found = {name: value for name, value in values.items() if "_by_" in name}
    assert found == pytest.approx(expected, rel=1e-12)
    assert "val/forces_rmse_by_size/2" not in found  # the one of two atoms has no forces


def test_what_has_no_value_is_left_out() -> None:
    errors = create_error_metrics({"energy": ["mae", "r2"], "dipole": ["cosine", "mae"]})
    errors["energy"].update(torch.tensor([1.0, 2.0]).double(), torch.tensor([0.3, 0.3]).double())
    errors["dipole"].update(torch.ones(3).double(), torch.zeros(3).double())
    assert set(errors["energy"].compute()) == {"energy_mae"}  # all references are the same
    assert set(errors["dipole"].compute()) == {"dipole_mae"}  # no direction to compare with
    errors["energy"].update(torch.tensor([torch.nan]).double(), torch.tensor([0.5]).double())
    assert all(v.isnan() for v in errors["energy"].compute().values())  # not hidden


def test_the_balance_of_a_loss() -> None:
    structures = without(random_structures(SIZES, seed=7), "forces", [2, 3])
    terms = {"energy": {"weight": 2.0}, "forces": {"weight": 5.0, "reduction": "atom"}}
    loss = Loss(LossConfig.model_validate(terms))
    metrics = SplitMetrics("train", loss, {})
    for chosen in BATCHES:
        batch = make_batch(structures.take(np.array(chosen)), 5.0, torch.float64)
        prediction = {name: torch.zeros_like(batch.labels[name]) for name in ("energy", "forces")}
        metrics.update(loss.sums(prediction, batch), prediction, batch)
    values = metrics.compute(loss, loss.weights_at(0))
    energy = 2 * (structures.structures["energy"] ** 2).mean()
    forces = 5 * np.nanmean(structures.atoms["forces"] ** 2)
    n = sum(SIZES)
    assert values == pytest.approx(
        {
            "train/loss/energy": energy / 2,
            "train/loss/forces": forces / 5,
            "train/loss/total_loss": energy + forces,
            "train/share/energy": energy / (energy + forces),
            "train/share/forces": forces / (energy + forces),
            "train/coverage/energy": 1.0,
            "train/coverage/forces": (n - SIZES[2] - SIZES[3]) / n,
        },
        rel=1e-12,
    )


class OfPairs(Metric):
    """Not one number."""

    def update(self, predicted: torch.Tensor, reference: torch.Tensor) -> None:
        self.latest = predicted - reference

    def compute(self) -> torch.Tensor:
        return self.latest


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("test_metrics:Missing", "there is no Missing in test_metrics(.|\n)*train.metrics.energy"),
        ("test_metrics:Structures", "is not a class of torchmetrics.metric.Metric"),
        ("torchmetrics:Dice", "does not do as a metric|there is no Dice"),
        ("test_metrics:OfPairs", "does not do as a metric: it gives tensor(.|\n)*one number"),
    ],
)
def test_a_metric_of_the_users_that_does_not_fit(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_error_metrics({"energy": [name]})


def test_values_know_their_quantity_and_whether_they_have_its_unit() -> None:
    assert quantity_of("total_charge_max_error_by_size/3-4").name == "total_charge"
    assert quantity_of("energy_per_atom").name == "energy"
    assert has_unit("energy_per_atom_mae")
    assert has_unit("total_charge_max_error_by_size/3-4")
    assert not has_unit("energy_per_atom_r2")
    assert not has_unit("forces_cosine_by_element/H")
    assert not has_unit("forces_PearsonCorrCoef")


@pytest.mark.filterwarnings("ignore:Metric `SpearmanCorrcoef` will save all")
def test_a_split_goes_on_from_its_state_to_the_bit() -> None:
    structures = random_structures([2 + s % 3 for s in range(60)], seed=9)
    loss = Loss(LossConfig.model_validate({"energy": {}, "forces": {}}))
    own = ["torchmetrics:SpearmanCorrCoef", "torchmetrics:PearsonCorrCoef"]  # lists, and no sums
    measured = {"energy": ["mae", *own], "forces": ["max_error"]}
    of_sizes = groupings(["size"])
    whole, part, rest = (SplitMetrics("val", loss, measured, of_sizes) for _ in range(3))
    rng = np.random.default_rng(3)
    for number in range(15):  # more than are added at once
        batch = make_batch(structures.take(np.arange(4 * number, 4 * number + 4)), 5.0)
        prediction = {
            name: batch.labels[name] + torch.tensor(rng.normal(), dtype=torch.float32)
            for name in ("energy", "forces")
        }
        for metrics in (whole, part if number < 12 else rest):
            metrics.update(loss.sums(prediction, batch), prediction, batch)
        if number == 11:
            rest.set_state(part.state())
    weights = loss.weights_at(0)
    assert rest.compute(loss, weights) == whole.compute(loss, weights)
