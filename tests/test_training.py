"""The LightningModule: what it measures beside the loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from molecules import random_structures, without

from runner.batches import Block
from runner.config import TrainConfig
from runner.losses import Loss
from runner.potentials import build_potential
from runner.training import STRUCTURES_FOR_GRADIENTS, Training


def _training() -> Training:
    table = {
        "potential": {"name": "schnet", "cutoff": "4 angstrom", "features": 8, "interactions": 1},
        "loss": {
            "energy": {"weight": 0.5},
            "forces": {"weight": {"start": 3, "end": 9, "epochs": 3}},
        },
    }
    config = TrainConfig.model_validate(table)
    torch.manual_seed(1)
    potential = build_potential(config.potential, {"energy", "forces"}, {}).double()
    return Training(potential, Loss(config.loss), config, {})


@pytest.mark.parametrize("n", [5, 2 * STRUCTURES_FOR_GRADIENTS])
def test_the_gradient_of_each_term_is_measured_with_its_weight(n: int) -> None:
    structures = without(random_structures([2 + s % 4 for s in range(n)], seed=8), "forces", [1])
    block = Block.of(structures, 4.0, torch.float64)
    training = _training()
    training._measure_gradients(block.batch())
    measured = {term: float(norm) for term, norm in training._gradient_norms.items()}
    few = len(block.batch().parts(max(1, n // STRUCTURES_FOR_GRADIENTS))[0].n_atoms)
    assert 1 < few <= STRUCTURES_FOR_GRADIENTS + 5
    batch = block.take(np.arange(few)).batch()
    prediction = training.potential(batch, forces=True)
    energy = 0.5 * (prediction["energy"] - batch.labels["energy"]).square().mean()
    f = (prediction["forces"] - batch.labels["forces"].nan_to_num()).square().mean(dim=1)
    structures_of = [f[batch.structure == s].mean() for s in range(few) if s != 1]
    forces = 3 * torch.stack(structures_of).mean()
    for term, total in (("energy", energy), ("forces", forces)):
        parameters = list(training.potential.parameters())
        found = torch.autograd.grad(total, parameters, allow_unused=True, retain_graph=True)
        norm = sum(float(g.square().sum()) for g in found if g is not None) ** 0.5
        assert measured[term] == pytest.approx(norm, rel=1e-9)
    assert all(p.grad is None for p in training.potential.parameters())
