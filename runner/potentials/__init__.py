"""Potentials: an architecture gives energies and charges of atoms, physics gives the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from runner.batches import Batch
from runner.config import ArchitectureConfig, EnergyConfig, ForeignConfig
from runner.fields import FROM_CHARGES
from runner.potentials.components import exactly
from runner.potentials.foreign import build_foreign
from runner.potentials.painn import PaiNN
from runner.potentials.physics import (
    ZBL,
    AtomicEnergies,
    Convention,
    DampedCoulomb,
    charge_moments,
    equalised,
)
from runner.potentials.schnet import SchNet
from runner.potentials.tensornet import TensorNet

POTENTIALS: dict[str, Callable[[Any, Collection[str]], nn.Module]] = {
    "painn": PaiNN,
    "schnet": SchNet,
    "tensornet": TensorNet,
}


class Potential(nn.Module):
    """Energies and what follows from them, for a batch of structures.

    Attributes:
        architecture: a batch in; of the atoms `energies` (of order one), and maybe `charges` (e)
            and `spins` (unpaired electrons), out.
        energy: makes energies in eV of the architecture's.
        terms: further energies of atoms, eV, from a batch and its charges.
        cutoff: Å, up to which a batch needs pairs; infinite, all of each molecule.
        near: Å, up to which the architecture sees, if that is less.
        inputs: what a batch has to have, by name, beside atoms and pairs.
        equalise: whether charges are made to sum to the total charge.
        quadrupole: convention of the quadrupole; None, and there is none.
    """

    def __init__(
        self,
        architecture: nn.Module,
        config: ArchitectureConfig,
        energy: AtomicEnergies | None = None,
        quadrupole: Convention | None = None,
    ) -> None:
        """Put what a config asks for around an architecture.

        Args:
            architecture: see above.
            config: the `[train.potential]` table.
            energy: scale and shift of the energies; none, unless given.
            quadrupole: convention of the quadrupole, if it is wanted.
        """
        super().__init__()
        self.architecture = architecture
        self.energy = energy or AtomicEnergies(EnergyConfig(scale="none"), {})
        self.terms = nn.ModuleDict()
        self.cutoff, self.near = config.cutoff, None
        if config.zbl is not None:
            self.terms["zbl"] = ZBL(config.zbl.cutoff or config.cutoff)
        if config.coulomb is not None:
            far = config.coulomb.cutoff or math.inf
            self.terms["coulomb"] = DampedCoulomb(config.cutoff, far)
            if far > config.cutoff:
                self.cutoff, self.near = far, config.cutoff
        self.inputs = config.needed_inputs
        self.equalise = config.charges is not None and config.charges.equalise
        self.quadrupole = quadrupole

    @property
    def dtype(self) -> torch.dtype:
        """Of its floating-point numbers."""
        return self.energy.scale.dtype

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.energy.scale.device

    def forward(
        self, batch: Batch, *, forces: bool = True, stress: bool = False
    ) -> dict[str, Tensor]:
        r"""Predict, with names, shapes and units of `runner.fields`.

        `energy` is offset-corrected like a prepared dataset's. The stress is
        :math:`(1/V)\,\partial E/\partial\varepsilon` of a symmetric strain ε of positions and cell,
        NaN for a structure whose cell has no volume. The spin multiplicity is one more than the sum
        of the atoms' spins. The graphs of both are kept in training mode
        only, where the loss is differentiated through them.

        Args:
            batch: structures, with pairs within `cutoff` and, of those, which are within `near`.
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
            here = batch.at(positions)
            here = strained(here, strain) if stress else here
            found = self.architecture(here.nearest())
            atomic = {name: values.to(self.dtype) for name, values in found.items()}
            charges = atomic.get("charges")
            if charges is not None and self.equalise:
                charges = equalised(charges, batch)
            energies = self.energy(atomic["energies"], batch.atomic_numbers)
            for term in self.terms.values():
                energies = energies + term(here, charges)
            energy = batch.sum_by_structure(energies)
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
        if charges is not None:
            prediction |= charge_moments(batch, charges, self.quadrupole)
        if "spins" in atomic:
            prediction["spin_multiplicity"] = 1 + batch.sum_by_structure(atomic["spins"])
        return prediction


def strained(batch: Batch, strain: Float[Tensor, "n_structures 3 3"]) -> Batch:
    """The batch with positions and cells multiplied by 1 + (ε + εᵀ)/2."""
    symmetric = 0.5 * (strain + strain.mT)
    with exactly(symmetric):
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


def build_potential(
    config: ArchitectureConfig,
    quantities: Collection[str],
    statistics: Mapping[str, Any],
    elements: Sequence[str] = (),
    quadrupole: Convention = "traced",
    dtype: torch.dtype | None = None,
) -> Potential:
    """A potential with random weights.

    Args:
        config: the `[train.potential]` table.
        quantities: what it has to predict; charges are there only if something asks for them.
        statistics: of the training split, for the scale and the shift of the energies.
        elements: symbols of those in the data, for architectures that are built for some only.
        quadrupole: convention of the data's quadrupoles.
        dtype: of its weights; the statistics are rounded to it, once. None is torch's default.

    Raises:
        ConfigError: a class of the user's cannot be found, or does not fit.
        DatasetError: the data lacks a statistic that is asked for.
    """
    charged = FROM_CHARGES & set(quantities) or config.coulomb or config.charges
    heads = {"charges"} if charged else set()
    if "spin_multiplicity" in quantities:
        heads.add("spins")
    if isinstance(config, ForeignConfig):
        architecture = build_foreign(config, heads, elements)
    else:
        architecture = POTENTIALS[config.name](config, heads)
    energy = AtomicEnergies(config.energy, statistics, dtype)
    potential = Potential(
        architecture, config, energy, quadrupole if "quadrupole" in quantities else None
    )
    return potential.to(potential.dtype)
