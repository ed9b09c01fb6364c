"""Potentials: an architecture gives per-atom energies and charges, physics gives the rest."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from runner.batches import Batch
from runner.config import ArchitectureConfig
from runner.potentials.painn import PaiNN
from runner.potentials.tensornet import TensorNet

POTENTIALS: dict[str, Callable[[Any, Collection[str]], nn.Module]] = {
    "painn": PaiNN,
    "tensornet": TensorNet,
}

FROM_CHARGES = frozenset({"charges", "total_charge", "dipole"})


class Potential(nn.Module):
    """Energies and what follows from them, for a batch of structures."""

    scale: Tensor

    def __init__(self, architecture: nn.Module, scale: float = 1.0) -> None:
        """Wrap an architecture.

        Args:
            architecture: a batch in; `energies`, and maybe `charges` (e), of the atoms out.
            scale: eV, that the architecture's energies are multiplied by.
        """
        super().__init__()
        self.architecture = architecture
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, batch: Batch, *, forces: bool = True) -> dict[str, Tensor]:
        """Predict, with names, shapes and units of `runner.fields`.

        `energy` is offset-corrected like a prepared dataset's. The graph of the forces is kept in
        training mode only, where the loss is differentiated through them.

        Args:
            batch: structures, with pairs within the architecture's cutoff.
            forces: whether to differentiate the energy for them.
        """
        with torch.set_grad_enabled(forces or torch.is_grad_enabled()):
            positions = batch.positions.detach().requires_grad_(forces)
            atomic = self.architecture(batch.at(positions))
            energy = batch.sum_by_structure(atomic["energies"] * self.scale)
            prediction = {"energy": energy}
            if forces:
                (gradient,) = torch.autograd.grad(
                    energy.sum(), positions, create_graph=self.training, materialize_grads=True
                )
                prediction["forces"] = -gradient
        if "charges" in atomic:
            prediction |= charge_moments(batch, atomic["charges"])
        return prediction


def charge_moments(
    batch: Batch, charges: Float[Tensor, " n_atoms"]
) -> dict[str, Float[Tensor, "n ..."]]:
    """`charges` with their sum `total_charge` (e) and first moment `dipole` (e·Å)."""
    return {
        "charges": charges,
        "total_charge": batch.sum_by_structure(charges),
        "dipole": batch.sum_by_structure(charges.unsqueeze(-1) * batch.positions),
    }


def build_potential(
    config: ArchitectureConfig, quantities: Collection[str], statistics: Mapping[str, Any]
) -> Potential:
    """A potential with random weights.

    Args:
        config: the `[train.potential]` table.
        quantities: what it has to predict; charges are there only if something asks for them.
        statistics: of the training split; energies are scaled by its spread per atom.
    """
    heads = {"charges"} if FROM_CHARGES & set(quantities) else set()
    spread = statistics.get("energy_per_atom_std") or 1.0
    return Potential(POTENTIALS[config.name](config, heads), spread)
