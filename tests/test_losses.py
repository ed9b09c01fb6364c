"""Losses against a naïve loop over structures, on ragged batches with missing labels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from molecules import random_structures, springs, without

from runner.batches import Batch, Block, make_batch
from runner.config import LossConfig, potential_config
from runner.errors import ConfigError, RunError
from runner.fields import LABELS
from runner.losses import LOSSES, Loss, Term, over_processes
from runner.potentials import build_potential
from runner.structures import Structures

SIZES = [3, 1, 5, 2, 4]


@pytest.fixture
def structures() -> Structures:
    structures = random_structures(SIZES, seed=1)
    for name, missing in (("energy", [1]), ("forces", [0, 3]), ("dipole", [4]), ("charges", [2])):
        structures = without(structures, name, missing)
    return structures


def _prediction(batch: Batch) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = {"energy": (5,), "forces": (15, 3), "charges": (15,)}
    prediction = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for name, shape in shapes.items()
    }
    charges = prediction["charges"]
    prediction["total_charge"] = batch.sum_by_structure(charges)
    prediction["dipole"] = batch.sum_by_structure(charges.unsqueeze(-1) * batch.positions)
    return prediction


def _error(kind: str, difference: float, delta: float) -> float:
    if kind == "squared":
        return difference**2
    if kind == "absolute" or abs(difference) > delta:
        return abs(difference) if kind == "absolute" else delta * (abs(difference) - delta / 2)
    return difference**2 / 2


def _naive(
    name: str, structures: Structures, prediction: dict[str, np.ndarray], options: dict[str, object]
) -> float:
    kind, delta = str(options.get("error", "squared")), 0.7
    sums, pooled = [], []
    for s, n in enumerate(SIZES):
        rows = slice(structures.first_atom[s], structures.first_atom[s + 1])
        if LABELS[name].per == "atom":
            label, guess = structures.atoms[name][rows], prediction[name][rows]
        elif name == "energy":
            label, guess = structures.structures[name][s], prediction[name][s]
        else:  # from the charges, as the formula has it
            q, r = prediction["charges"][rows], structures.atoms["positions"][rows]
            guess = q.sum() if name == "total_charge" else (q[:, None] * r).sum(axis=0)
            label = structures.structures[name][s]
        if np.isnan(label).any():
            continue
        difference = np.ravel(guess - label)
        if options.get("per_atom"):
            difference = difference / n
        errors = [_error(kind, d, delta) for d in difference]
        sums.append(sum(errors) / len(errors))
        pooled += errors
    return float(np.mean(pooled if options.get("reduction") == "atom" else sums))


@pytest.mark.parametrize("error", ["squared", "absolute", "huber"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("energy", {}),
        ("energy", {"per_atom": True}),
        ("forces", {}),
        ("forces", {"reduction": "atom"}),
        ("charges", {}),
        ("total_charge", {}),
        ("dipole", {}),
    ],
)
def test_each_term_equals_a_loop_over_structures(
    structures: Structures, name: str, options: dict[str, object], error: str
) -> None:
    options = options | {"error": error}
    batch = make_batch(structures, 5.0, torch.float64)
    prediction = _prediction(batch)
    loss = Loss(LossConfig.model_validate({name: options | {"huber_delta": 0.7}}))
    arrays = {key: value.detach().numpy() for key, value in prediction.items()}
    expected = _naive(name, structures, arrays, options)
    assert loss(prediction, batch)[name].item() == pytest.approx(expected, rel=1e-12)


def test_total_loss_is_the_weighted_sum_and_follows_the_schedule(structures: Structures) -> None:
    batch = make_batch(structures, 5.0, torch.float64)
    prediction = _prediction(batch)
    schedule = {"start": 10.0, "end": 100.0, "epochs": 50}
    loss = Loss(
        LossConfig.model_validate({"energy": {"weight": 2.0}, "forces": {"weight": schedule}})
    )
    for epoch, weight in ((0, 10.0), (25, 55.0), (50, 100.0), (80, 100.0)):
        terms = {
            name: float(value.detach()) for name, value in loss(prediction, batch, epoch).items()
        }
        expected = 2.0 * terms["energy"] + weight * terms["forces"]
        assert terms["total_loss"] == pytest.approx(expected, rel=1e-12)


def test_a_missing_label_has_no_gradient_and_no_nan(structures: Structures) -> None:
    batch = make_batch(structures, 5.0, torch.float64)
    prediction = _prediction(batch)
    loss = Loss(LossConfig.model_validate({"energy": {}, "forces": {}}))
    energy_gradient, force_gradient = torch.autograd.grad(
        loss(prediction, batch)["total_loss"], [prediction["energy"], prediction["forces"]]
    )
    assert energy_gradient[1] == 0
    assert energy_gradient[[0, 2, 3, 4]].abs().min() > 0
    unlabelled = (batch.structure == 0) | (batch.structure == 3)
    assert (force_gradient[unlabelled] == 0).all()
    assert torch.isfinite(force_gradient).all()
    assert force_gradient[~unlabelled].abs().min() > 0


def test_a_batch_without_any_label_costs_nothing() -> None:
    structures = without(random_structures([2, 3]), "energy", [0, 1])
    batch = make_batch(structures, 5.0)
    prediction = {"energy": torch.ones(2, requires_grad=True)}
    total = Loss(LossConfig.model_validate({"energy": {}}))(prediction, batch)["total_loss"]
    total.backward()
    assert total.item() == 0
    assert prediction["energy"].grad is not None
    assert (prediction["energy"].grad == 0).all()


def test_sums_of_unequal_batches_give_the_mean_over_all_structures() -> None:
    structures = random_structures(SIZES, seed=2)
    loss = Loss(LossConfig.model_validate({"energy": {}, "forces": {}}))
    whole = make_batch(structures, 5.0, torch.float64)
    prediction = _prediction(whole)
    parts = [np.array([0, 1, 2]), np.array([3, 4])]
    atoms = [slice(0, 9), slice(9, 15)]
    for name in ("energy", "forces"):
        sums = []
        for chosen, rows in zip(parts, atoms, strict=True):
            part = make_batch(structures.take(chosen), 5.0, torch.float64)
            cut = {"energy": prediction["energy"][chosen], "forces": prediction["forces"][rows]}
            sums.append(loss.sums(cut, part)[name])
        mean = sum(s.total for s in sums) / sum(s.count for s in sums)
        assert torch.allclose(torch.as_tensor(mean), loss(prediction, whole)[name])


def test_the_table_of_losses_equals_what_the_config_allows() -> None:
    assert set(LOSSES) | {"own"} == set(LossConfig.model_fields)
    assert set(LOSSES) == set(LABELS)


def test_a_batch_of_no_structure_costs_nothing() -> None:
    structures = random_structures([2, 3])
    batch = make_batch(structures, 5.0, torch.float64).none()
    prediction = {name: label + 1 for name, label in batch.labels.items()}
    terms: dict[str, dict[str, object]] = {name: {} for name in batch.labels}
    values = Loss(LossConfig.model_validate(terms))(prediction, batch)
    assert {name: value.item() for name, value in values.items()} == dict.fromkeys(values, 0.0)


def _gradients(loss: Loss, batch: Batch) -> list[torch.Tensor]:
    """By two parameters of a made-up potential."""
    scale = torch.tensor([1.3, 0.7], dtype=torch.float64, requires_grad=True)
    labels = {name: torch.nan_to_num(label) for name, label in batch.labels.items()}
    prediction = {name: scale[0] * label + scale[1] for name, label in labels.items()}
    sums, whole = loss.sums(prediction, batch), over_processes(loss.counts(batch))
    sums = sums if whole is None else whole.part(sums)
    total = loss.weighted({name: s.mean for name, s in sums.items()}, loss.weights_at(0))
    return list(torch.autograd.grad(total, scale))


def _one_process(rank: int, n: int, folder: str, results: Any) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=n
    )
    loss, parts = _uneven()
    (gradient,) = _gradients(loss, parts[rank])
    torch.distributed.all_reduce(gradient)  # what averaging the gradients comes to
    results.put((gradient / n).tolist())
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _uneven() -> tuple[Loss, list[Batch]]:
    """Batches of five structures, of two, and of none, some of them without forces."""
    structures = without(random_structures([3, 1, 4, 2, 5, 6, 2]), "forces", [1, 5])
    block = Block.of(structures, 4.0, torch.float64)
    parts = [block.take(np.array(rows)).batch() for rows in ([0, 1, 2, 3, 4], [5, 6])]
    terms = {"energy": {"per_atom": True}, "forces": {"weight": 3.0}, "dipole": {}}
    loss = Loss(LossConfig.model_validate(terms))
    return loss, [*parts, parts[0].none(), block.batch()]


def test_uneven_processes_have_the_gradient_of_all_their_structures(tmp_path: Path) -> None:
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    processes = [
        context.Process(target=_one_process, args=(rank, 3, str(tmp_path), results))
        for rank in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    loss, parts = _uneven()
    (expected,) = _gradients(loss, parts[3])
    assert expected.abs().min() > 0
    for _ in processes:
        assert results.get() == pytest.approx(expected.tolist(), rel=1e-12)


class Cosh(Term):
    """A term of the user's: log cosh of the force errors of a structure, over a temperature."""

    labels = ("forces", "charges")

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature

    def values(self, prediction: Mapping[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        forces = prediction["forces"] - batch.labels["forces"]
        charges = prediction["charges"] - batch.labels["charges"]
        return batch.sum_by_structure(forces.cosh().log().sum(1) / self.temperature + charges**2)


class Forgetful(Term):
    """Without its base's constructor."""

    def __init__(self) -> None:
        pass


class OfNothingKnown(Term):
    labels = ("enthalpy",)


def test_a_term_of_the_users_equals_a_loop(structures: Structures) -> None:
    batch = make_batch(structures, 5.0, torch.float64)
    prediction = _prediction(batch)
    table = {"name": "test_losses:Cosh", "weight": 3.0, "temperature": 0.5}
    loss = Loss(LossConfig.model_validate({"energy": {}, "own": {"cosh": table}}))
    assert loss.labels == ["energy", "forces", "charges"]
    expected = []
    for s in range(len(SIZES)):
        rows = slice(structures.first_atom[s], structures.first_atom[s + 1])
        f = prediction["forces"].detach().numpy()[rows] - structures.atoms["forces"][rows]
        q = prediction["charges"].detach().numpy()[rows] - structures.atoms["charges"][rows]
        if not np.isnan(f).any() and not np.isnan(q).any():
            expected.append(np.log(np.cosh(f)).sum() / 0.5 + (q**2).sum())
    assert len(expected) == 2
    found = loss(prediction, batch)
    assert found["cosh"].item() == pytest.approx(np.mean(expected), rel=1e-12)
    total = found["energy"] + 3 * found["cosh"]
    assert found["total_loss"].item() == pytest.approx(total.item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(found["cosh"], prediction["forces"])
    there = torch.tensor([s in (1, 4) for s in batch.structure.tolist()])  # those with both labels
    assert (gradient[~there] == 0).all()
    assert (gradient[there] != 0).all()


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("test_losses:Kosh", {}, "there is no Kosh in test_losses(.|\n)*test_losses:Cosh"),
        ("nowhere:Cosh", {}, "nowhere:Cosh cannot be imported"),
        ("test_losses:Structures", {}, "is not a class of runner.losses.Term"),
        ("test_losses:Cosh", {"heat": 1.0}, "cannot be built(.|\n)*heat(.|\n)*train.loss.own.x"),
        ("test_losses:Forgetful", {}, r"cannot be built(.|\n)*begins with super\(\).__init__\(\)"),
        ("test_losses:OfNothingKnown", {}, "asks for enthalpy, which is no quantity"),
    ],
)
def test_a_term_of_the_users_that_does_not_fit(
    name: str, more: dict[str, float], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Loss(LossConfig.model_validate({"own": {"x": {"name": name} | more}}))


@pytest.mark.parametrize("reduction", ["structure", "atom"])
def test_weights_of_sources_and_elements_equal_a_loop(
    structures: Structures, reduction: str
) -> None:
    source = np.array([0, 1, 1, 2, 0], np.int16)
    structures = Structures(
        structures.first_atom, structures.atoms, structures.structures | {"source": source}
    )
    batch = make_batch(structures, 5.0, torch.float64)
    prediction = _prediction(batch)
    by_source = {"b.xyz": 3.0, "c.xyz": 0.0}
    terms = {
        "energy": {"by_source": by_source},
        "forces": {"by_source": by_source, "by_element": {"H": 0.25}, "reduction": reduction},
    }
    loss = Loss(LossConfig.model_validate(terms), sources=["a.xyz", "b.xyz", "c.xyz"])
    found = {name: value.item() for name, value in loss(prediction, batch).items()}
    weights = np.array([1.0, 3.0, 0.0])[source]
    error = (prediction["energy"].detach().numpy() - structures.structures["energy"]) ** 2
    assert found["energy"] == pytest.approx(np.nanmean(weights * error), rel=1e-12)
    sums, count = 0.0, 0
    for s, n in enumerate(SIZES):
        rows = slice(structures.first_atom[s], structures.first_atom[s + 1])
        f = prediction["forces"].detach().numpy()[rows] - structures.atoms["forces"][rows]
        if np.isnan(f).any():
            continue
        light = structures.atoms["atomic_numbers"][rows] == 1
        per_atom = (f**2).mean(axis=1) * np.where(light, 0.25, 1.0) * weights[s]
        sums += per_atom.sum() / (1 if reduction == "atom" else n)
        count += n if reduction == "atom" else 1
    assert found["forces"] == pytest.approx(sums / count, rel=1e-12)


def test_a_source_that_is_not_there_is_named() -> None:
    config = LossConfig.model_validate({"energy": {"by_source": {"qm9.xyz": 2.0}}})
    with pytest.raises(ConfigError) as caught:
        Loss(config, sources=["qm7.xyz", "water.xyz"])
    text = str(caught.value)
    assert 'there is no source "qm9.xyz"; did you mean "qm7.xyz"?' in text
    assert "train.loss.energy.by_source" in text
    assert "water.xyz" in text


def test_spins_sum_to_the_multiplicity_and_are_learnt() -> None:
    structures = random_structures(SIZES, seed=4)
    spins = np.array([1.0, 2.0, 1.0, 3.0, np.nan])
    structures = Structures(
        structures.first_atom,
        structures.atoms,
        structures.structures | {"spin_multiplicity": spins},
    )
    torch.manual_seed(0)
    config = potential_config({"name": "painn", "cutoff": "4 angstrom", "features": 8})
    potential = build_potential(config, {"spin_multiplicity"}, {}).double()
    batch = make_batch(structures, 4.0, torch.float64)
    loss = Loss(LossConfig.model_validate({"spin_multiplicity": {}}))
    optimizer = torch.optim.Adam(potential.parameters(), lr=5e-3)
    values = []
    for _ in range(150):
        total = loss(potential(batch, forces=False), batch)["total_loss"]
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        values.append(total.item())
    assert values[-1] < 0.02 * values[0]
    found = potential(batch, forces=False)["spin_multiplicity"][:4].tolist()
    assert found == pytest.approx(spins[:4], abs=0.3)


class OfComponents(Term):
    labels = ("forces",)

    def values(self, prediction: Any, batch: Any) -> Any:
        return (prediction["forces"] - batch.labels["forces"]).abs()


class OfNoBatch(Term):
    labels = ("forces",)

    def values(self, prediction: Any, batch: Any) -> Any:
        return prediction["force"] - batch.labels["forces"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "OfComponents",
            r"OfComponents have the shape \(\d+, 3\)(.|\n)*own.x(.|\n)*n_structures,\)",
        ),
        ("OfNoBatch", r"OfNoBatch fails: KeyError: 'force'(.|\n)*train.loss.own.x"),
    ],
)
def test_values_of_an_own_term_that_are_none_are_named(name: str, text: str) -> None:
    table = {"name": f"test_losses:{name}"}
    loss = Loss(LossConfig.model_validate({"own": {"x": table}}))
    batch = make_batch(springs(n=3), 4.0)
    with pytest.raises(RunError, match=text):
        loss.sums({"forces": torch.zeros_like(batch.positions)}, batch)
