"""Losses against a naïve loop over structures, on ragged batches with missing labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from molecules import random_structures, without

from runner.batches import Batch, Block, make_batch
from runner.config import LossConfig
from runner.fields import LABELS
from runner.losses import LOSSES, Loss, over_processes
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
    assert set(LOSSES) == set(LossConfig.model_fields)


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
