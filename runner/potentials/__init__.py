"""Potentials: an architecture gives per-atom energies and charges, physics gives the rest."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from runner.batches import Batch
from runner.config import ArchitectureConfig
from runner.potentials.painn import PaiNN
from runner.potentials.schnet import SchNet
from runner.potentials.tensornet import TensorNet

POTENTIALS: dict[str, Callable[[Any, Collection[str]], nn.Module]] = {
    "painn": PaiNN,
    "schnet": SchNet,
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

    def forward(
        self, batch: Batch, *, forces: bool = True, stress: bool = False
    ) -> dict[str, Tensor]:
        r"""Predict, with names, shapes and units of `runner.fields`.

        `energy` is offset-corrected like a prepared dataset's. The stress is
        :math:`(1/V)\,\partial E/\partial\varepsilon` of a symmetric strain ε of positions and cell,
        NaN for a structure whose cell has no volume. The graphs of both are kept in training mode
        only, where the loss is differentiated through them.

        Args:
            batch: structures, with pairs within the architecture's cutoff.
            forces: whether to differentiate the energy for them.
            stress: whether to differentiate the energy for it.

        Source:
            Knuth et al., Comput. Phys. Commun. 190, 33 (2015), doi:10.1016/j.cpc.2015.01.003,
            eq. 3, for the definition by strain.
        """
        stress = stress and batch.cell is not None
        with torch.set_grad_enabled(forces or stress or torch.is_grad_enabled()):
            positions = batch.positions.detach().requires_grad_(forces)
            strain = positions.new_zeros((batch.n_structures, 3, 3), requires_grad=stress)
            atomic = self.architecture(
                strained(batch.at(positions), strain) if stress else batch.at(positions)
            )
            energy = batch.sum_by_structure(atomic["energies"] * self.scale)
            prediction = {"energy": energy}
            sought = [t for t, asked in ((positions, forces), (strain, stress)) if asked]
            if sought:
                gradients = torch.autograd.grad(
                    energy.sum(), sought, create_graph=self.training, materialize_grads=True
                )
                if forces:
                    prediction["forces"] = -gradients[0]
                if stress:
                    prediction["stress"] = _per_volume(gradients[-1], batch)
        if "charges" in atomic:
            prediction |= charge_moments(batch, atomic["charges"])
        return prediction


def strained(batch: Batch, strain: Float[Tensor, "n_structures 3 3"]) -> Batch:
    """The batch with positions and cells multiplied by 1 + (ε + εᵀ)/2."""
    symmetric = 0.5 * (strain + strain.mT)
    moved = (batch.positions.unsqueeze(1) @ symmetric[batch.structure]).squeeze(1)
    cell = None if batch.cell is None else batch.cell + batch.cell @ symmetric
    return replace(batch, positions=batch.positions + moved, cell=cell)


def _per_volume(
    gradient: Float[Tensor, "n_structures 3 3"], batch: Batch
) -> Float[Tensor, "n_structures 3 3"]:
    """Divided by the volume of each cell; NaN where there is none."""
    assert batch.cell is not None
    volume = torch.linalg.det(batch.cell.double()).abs().to(gradient.dtype)[:, None, None]
    divided = gradient / torch.where(volume > 0, volume, 1.0)
    return divided.masked_fill(volume == 0, torch.nan)


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
