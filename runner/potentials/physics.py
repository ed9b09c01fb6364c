"""Physics that any architecture can have beside what it learns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from ase.data import atomic_numbers
from jaxtyping import Float, Int64
from scipy import constants
from torch import Tensor, nn

from runner.batches import Batch
from runner.config import EnergyConfig
from runner.errors import DatasetError
from runner.potentials.components import N_ELEMENTS, half_pair_vectors

COULOMB: float = constants.elementary_charge * 1e10 / (4 * math.pi * constants.epsilon_0)
"""e²/(4πε₀) in eV·Å, 14.3996."""
BOHR: float = constants.physical_constants["Bohr radius"][0] * 1e10

Convention = Literal["traced", "traceless"]


class AtomicEnergies(nn.Module):
    r"""Energies of atoms from what an architecture puts out: :math:`\sigma_Z y_i + \mu_Z`, in eV.

    The scale σ and the shift μ are one number, or one of each element: fixed, or learnt from there.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        config: EnergyConfig,
        statistics: Mapping[str, object],
        dtype: torch.dtype | None = None,
    ) -> None:
        """Take scale and shift from the statistics of the training split.

        Args:
            config: the `[train.potential.energy]` table.
            statistics: of the training split, as a prepared dataset has them; what is not there
                counts as none, where a single number is asked for.
            dtype: that they are rounded to. None is torch's default.

        Raises:
            DatasetError: there are no statistics of the elements.
        """
        super().__init__()
        dtype = dtype or torch.get_default_dtype()
        scale, shift = (of(config, statistics).to(dtype) for of in (_scale, _shift))
        if config.learnt:
            self.scale, self.shift = nn.Parameter(scale), nn.Parameter(shift)
        else:
            self.register_buffer("scale", scale)
            self.register_buffer("shift", shift)

    def forward(
        self, output: Float[Tensor, " n_atoms"], elements: Int64[Tensor, " n_atoms"]
    ) -> Float[Tensor, " n_atoms"]:
        """Energies of atoms, eV, from an output of order one."""
        scale, shift = (t[elements] if t.dim() else t for t in (self.scale, self.shift))
        return output * scale + shift


def _scale(config: EnergyConfig, statistics: Mapping[str, object]) -> Tensor:
    spread = float(statistics.get("energy_per_atom_std") or 1.0)  # type: ignore[arg-type]
    if config.scale == "per_element":
        by_element = _by_element("forces_rms_by_element", "scale", statistics)
        whole = float(statistics["forces_rms"])  # type: ignore[arg-type]
        ratios = {symbol: value / whole for symbol, value in by_element.items() if value > 0}
        return _table({symbol: spread * ratio for symbol, ratio in ratios.items()}, spread)
    return torch.tensor(spread if config.scale == "one" else 1.0, dtype=torch.float64)


def _shift(config: EnergyConfig, statistics: Mapping[str, object]) -> Tensor:
    if config.shift == "per_element":
        return _table(_by_element("energy_by_element", "shift", statistics), 0.0)
    mean = float(statistics.get("energy_per_atom_mean") or 0.0)  # type: ignore[arg-type]
    return torch.tensor(mean if config.shift == "one" else 0.0, dtype=torch.float64)


def _by_element(name: str, key: str, statistics: Mapping[str, object]) -> Mapping[str, float]:
    found = statistics.get(name)
    if not isinstance(found, Mapping):
        what = "forces" if name.startswith("forces") else "energies"
        raise DatasetError(
            f"the prepared dataset has no {what} from which a value of each element could be had",
            where=f"train.potential.energy.{key}",
            allowed='"none", "one"',
            remedy=f"map {what} in [[prepare.source]], and prepare again",
        )
    return found


def _table(values: Mapping[str, float], otherwise: float) -> Tensor:
    table = torch.full((N_ELEMENTS,), otherwise, dtype=torch.float64)
    for symbol, value in values.items():
        table[atomic_numbers[symbol]] = value
    return table


def equalised(charges: Float[Tensor, " n_atoms"], batch: Batch) -> Float[Tensor, " n_atoms"]:
    r"""Charges that sum to the total charge: :math:`q_i + (Q - \sum_j q_j)/N`, in e.

    Source:
        Unke and Meuwly, J. Chem. Theory Comput. 15, 3678 (2019), doi:10.1021/acs.jctc.9b00181:
        the corrected partial charges of PhysNet.
    """
    missing = batch.labels["total_charge"] - batch.sum_by_structure(charges)
    return charges + (missing / batch.n_atoms).index_select(0, batch.structure)


def charge_moments(
    batch: Batch, charges: Float[Tensor, " n_atoms"], quadrupole: Convention | None = None
) -> dict[str, Float[Tensor, "n ..."]]:
    r"""`charges` with their sum `total_charge` (e) and their moments about the origin.

    The first moment is `dipole` :math:`\sum q r` (e·Å); the second `quadrupole`
    :math:`\sum q\,r r^T` (e·Å²), "traced" as it stands, "traceless" less a third of its trace on
    the diagonal.
    """
    r = batch.positions
    moments = {
        "charges": charges,
        "total_charge": batch.sum_by_structure(charges),
        "dipole": batch.sum_by_structure(charges.unsqueeze(-1) * r),
    }
    if quadrupole is not None:
        products = r.unsqueeze(-1) * r.unsqueeze(-2)
        if quadrupole == "traceless":
            third = (r * r).sum(-1)[:, None, None] / 3
            products = products - third * torch.eye(3, dtype=r.dtype, device=r.device)
        moments["quadrupole"] = batch.sum_by_structure(charges[:, None, None] * products)
    return moments


def quintic_cutoff(distance: Float[Tensor, " n_pairs"], cutoff: float) -> Float[Tensor, " n_pairs"]:
    r"""1 − 6x⁵ + 15x⁴ − 10x³ with x = r/r_c: value, slope and curvature vanish at the cutoff.

    Source:
        Unke and Meuwly, J. Chem. Theory Comput. 15, 3678 (2019), doi:10.1021/acs.jctc.9b00181:
        the cutoff function of PhysNet.
    """
    x = (distance / cutoff).clamp(max=1.0)
    return 1 - x**3 * (10 - 15 * x + 6 * x * x)


class DampedCoulomb(nn.Module):
    r"""Coulomb energy of the partial charges, finite where atoms meet.

    A pair has :math:`k_e q_i q_j \chi(r)` with :math:`\chi = \varphi(2r)/\sqrt{r^2 + 1} + (1 -
    \varphi(2r))/r`, r in Å, where φ is `quintic_cutoff` at the architecture's cutoff: from half of
    that on it is Coulomb's law. With a cutoff R of its own, each 1/x becomes 1/x + x/R² − 2/R,
    whose value and slope vanish at R.

    Source:
        Unke and Meuwly, J. Chem. Theory Comput. 15, 3678 (2019), doi:10.1021/acs.jctc.9b00181: the
        electrostatic energy of PhysNet, its damping, and for large systems its shifted force.
    """

    def __init__(self, switch: float, cutoff: float = math.inf) -> None:
        """Build.

        Args:
            switch: the architecture's cutoff, Å.
            cutoff: Å; infinite, all pairs of a molecule interact.
        """
        super().__init__()
        self.switch, self.cutoff = switch, cutoff

    def forward(
        self, batch: Batch, charges: Float[Tensor, " n_atoms"]
    ) -> Float[Tensor, " n_atoms"]:
        """Energies, eV, each atom having half of its pairs'."""
        i, j = batch.half_pairs
        distance, _ = half_pair_vectors(batch)
        damped = self._inverse(torch.sqrt(distance * distance + 1.0))
        near = quintic_cutoff(2 * distance, self.switch)
        chi = near * damped + (1 - near) * self._inverse(distance)
        if math.isfinite(self.cutoff):
            chi = torch.where(distance < self.cutoff, chi, 0.0)
        energies = charges.index_select(0, i) * charges.index_select(0, j) * chi
        return _shared(energies, batch) * (0.5 * COULOMB)

    def _inverse(self, length: Float[Tensor, " n_half"]) -> Float[Tensor, " n_half"]:
        shifted = 1 / length
        if math.isfinite(self.cutoff):
            shifted = shifted + length / self.cutoff**2 - 2 / self.cutoff
        return shifted


class ZBL(nn.Module):
    r"""Screened repulsion of nuclei, which keeps atoms apart where no data is.

    A pair has :math:`k_e Z_i Z_j \varphi(r/a)/r` with :math:`a = 0.8854\,a_0/(Z_i^{0.23} +
    Z_j^{0.23})`, and φ a sum of four exponentials. It is multiplied by `quintic_cutoff`, so that it
    ends smoothly.

    Source:
        Ziegler, Biersack, Littmark, The Stopping and Range of Ions in Solids, Pergamon (1985): the
        universal screening function.
    """

    WEIGHTS = (0.18175, 0.50986, 0.28022, 0.02817)
    RATES = (3.19980, 0.94229, 0.40290, 0.20162)

    def __init__(self, cutoff: float) -> None:
        """End at `cutoff`, Å."""
        super().__init__()
        self.cutoff = cutoff

    def forward(self, batch: Batch, charges: object = None) -> Float[Tensor, " n_atoms"]:  # noqa: ARG002
        """Energies, eV, each atom having half of its pairs'."""
        batch = batch.nearest()
        i, j = batch.half_pairs
        distance, _ = half_pair_vectors(batch)
        z = batch.atomic_numbers.to(distance.dtype)
        size = z**0.23
        x = distance * (size.index_select(0, i) + size.index_select(0, j)) / (0.8854 * BOHR)
        screening = torch.stack(
            [w * torch.exp(-b * x) for w, b in zip(self.WEIGHTS, self.RATES, strict=True)]
        ).sum(0)
        energies = z.index_select(0, i) * z.index_select(0, j) * screening / distance
        energies = energies * quintic_cutoff(distance, self.cutoff)
        return _shared(energies, batch) * (0.5 * COULOMB)


def _shared(values: Float[Tensor, " n_half"], batch: Batch) -> Float[Tensor, " n_atoms"]:
    """The sum of what each pair has, at both of its atoms."""
    i, j = batch.half_pairs
    zeros = values.new_zeros(batch.positions.shape[0])
    return zeros.index_add(0, i, values).index_add(0, j, values)
