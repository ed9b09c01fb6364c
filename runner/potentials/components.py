"""What several architectures share."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from runner.batches import Batch

N_ELEMENTS = 119  # rows of a table by atomic number

# Far from its centre an exponential of single precision is subnormal, and a processor takes ten
# times as long over a product with such a number; next to one, this is less than float64 resolves.
NEGLIGIBLE = 1e-17


def exactly(like: Tensor) -> torch.autocast:
    """Lengths are not to be rounded to the 8 bits of bfloat16, whatever the precision."""
    return torch.autocast(like.device.type, enabled=False)


def half_pair_vectors(
    batch: Batch,
) -> tuple[Float[Tensor, " n_half"], Float[Tensor, "n_half 3"]]:
    """Distances r_ij in Å, and unit vectors from i to j, or to its image, of `batch.half_pairs`."""
    i, j = batch.half_pairs
    separation = batch.positions.index_select(0, j) - batch.positions.index_select(0, i)
    if batch.half_shifts is not None and batch.cell is not None:
        cell = batch.cell.index_select(0, batch.structure.index_select(0, i))
        with exactly(cell):
            moved = (batch.half_shifts.to(cell.dtype).unsqueeze(1) @ cell).squeeze(1)
        separation = separation + moved
    distance = torch.linalg.vector_norm(separation, dim=-1)
    return distance, separation / distance.unsqueeze(-1)


def pair_vectors(
    batch: Batch,
) -> tuple[Float[Tensor, " n_pairs"], Float[Tensor, "n_pairs 3"]]:
    """Distances r_ij in Å, and unit vectors from centre i to neighbour j, of `batch.pairs`.

    What depends on the distance alone costs half from `half_pair_vectors`, with `both_ways`.
    """
    distance, direction = half_pair_vectors(batch)
    return torch.cat([distance, distance]), torch.cat([direction, -direction])


def both_ways(
    values: Float[Tensor, "n_pairs ..."], factors: Float[Tensor, "n_half ..."]
) -> Float[Tensor, "n_pairs ..."]:
    """What differs between the two ways round of a pair times what does not."""
    return (values.view(2, factors.shape[0], *values.shape[1:]) * factors).flatten(0, 1)


class AtomEmbedding(nn.Module):
    r"""Features that atoms begin with: of their element and, if asked for, of the electrons.

    What a structure has of total charge or of unpaired electrons, Ψ, is spread over its atoms by
    attention: atom i has the share :math:`a_i = \Psi s_i/\sum_j s_j` with :math:`s_i =
    \mathrm{softplus}(q_i \cdot k/\sqrt{F})`, where the query q is linear in the element's features,
    and key k and value v are learnt, others for a negative Ψ. Added is :math:`g(a_i v)` with a
    network g without biases: nothing where Ψ is zero.

    Source:
        Unke et al., Nat. Commun. 12, 7273 (2021), doi:10.1038/s41467-021-27504-0: SpookyNet's
        initial atomic features, with one residual layer.
    """

    def __init__(self, features: int, inputs: Collection[str] = ()) -> None:
        """Build for so many features.

        Args:
            features: of an atom.
            inputs: "total_charge", "spin_multiplicity", both or none.
        """
        super().__init__()
        self.elements = nn.Embedding(N_ELEMENTS, features)
        self.electrons = nn.ModuleDict({name: Electrons(features) for name in sorted(inputs)})

    def forward(self, batch: Batch) -> Float[Tensor, "n_atoms features"]:
        """Features of the atoms."""
        features: Tensor = self.elements(batch.atomic_numbers)
        added = [electrons(features, batch) for electrons in self._of(batch)]
        return torch.stack([features, *added]).sum(0) if added else features

    def _of(self, batch: Batch) -> Iterator[Callable[[Tensor, Batch], Tensor]]:
        for name, module in self.electrons.items():
            amount = batch.labels[name] - (1.0 if name == "spin_multiplicity" else 0.0)
            yield functools.partial(module, amount=amount)


class Electrons(nn.Module):
    """One amount of electrons, spread over the atoms of each structure."""

    def __init__(self, features: int) -> None:
        """Build for so many features."""
        super().__init__()
        self.query = linear(features, features)
        self.keys = nn.Parameter(torch.randn(2, features))
        self.values = nn.Parameter(torch.randn(2, features))
        self.residual = nn.Sequential(
            nn.SiLU(),
            linear(features, features, bias=False),
            nn.SiLU(),
            linear(features, features, bias=False),
        )

    def forward(
        self,
        elements: Float[Tensor, "n_atoms features"],
        batch: Batch,
        amount: Float[Tensor, " n_structures"],
    ) -> Float[Tensor, "n_atoms features"]:
        """What is added to the features of atoms."""
        sign = (amount < 0).long().index_select(0, batch.structure)
        aligned = (self.query(elements) * self.keys.index_select(0, sign)).sum(-1)
        attention = nn.functional.softplus(aligned / math.sqrt(elements.shape[-1]))
        per_attention = amount / batch.sum_by_structure(attention)
        share = attention * per_attention.index_select(0, batch.structure)
        spread = share.unsqueeze(-1) * self.values.index_select(0, sign)
        change: Tensor = self.residual(spread)
        return spread + change


class Readouts(nn.ModuleDict):
    """A number an atom for the energy, and for each head, by two layers from its features."""

    def __init__(
        self,
        features: int,
        heads: Collection[str],
        activation: Callable[[], nn.Module] = nn.SiLU,
    ) -> None:
        """Build.

        Args:
            features: of an atom.
            heads: what is read out beside the energies: "charges", "spins".
            activation: between the layers.
        """
        super().__init__(
            {
                name: mlp(features, features // 2, 1, activation=activation)
                for name in ("energies", *sorted(heads))
            }
        )

    def forward(
        self, features: Float[Tensor, "n_atoms features"]
    ) -> dict[str, Float[Tensor, " n_atoms"]]:
        """Per-atom `energies` (of order one: a scale comes on top), and `charges` in e."""
        return {name: readout(features).squeeze(-1) for name, readout in self.items()}


class BesselBasis(nn.Module):
    r"""Radial basis :math:`\sin(n\pi r/r_c)/r`, n = 1 … N.

    Source:
        Gasteiger et al., ICLR 2020, arXiv:2003.03123, eq. 7, without its constant factor, as
        Schütt et al. 2021 use it.
    """

    frequencies: Tensor

    def __init__(self, size: int, cutoff: float) -> None:
        """Make `size` functions that vanish at `cutoff`, Å."""
        super().__init__()
        frequencies = torch.arange(1, size + 1) * (math.pi / cutoff)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, distance: Float[Tensor, " n_pairs"]) -> Float[Tensor, "n_pairs size"]:
        """Values at each distance, Å."""
        r = distance.unsqueeze(-1)
        return torch.sin(r * self.frequencies) / r


class GaussianBasis(nn.Module):
    r"""Radial basis :math:`\exp(-\gamma (r - \mu_k)^2)`, with centres evenly from 0 to the cutoff.

    γ = 0.1/Δ² where Δ is the distance of two centres: neighbours overlap as they do with the
    published γ = 10 Å⁻² and Δ = 0.1 Å, however many functions there are.

    Source:
        Schütt et al., J. Chem. Phys. 148, 241722 (2018), doi:10.1063/1.5019779, on the filter-
        generating networks; the values of γ and Δ are in their arXiv:1706.08566, section 4.1.
    """

    centers: Tensor
    gamma: Tensor

    def __init__(self, size: int, cutoff: float) -> None:
        """Make `size` functions between 0 and `cutoff`, Å."""
        super().__init__()
        spacing = cutoff / max(size - 1, 1)
        self.register_buffer("centers", torch.linspace(0.0, cutoff, size), persistent=False)
        self.register_buffer("gamma", torch.tensor(0.1 / spacing**2), persistent=False)

    def forward(self, distance: Float[Tensor, " n_pairs"]) -> Float[Tensor, "n_pairs size"]:
        """Values, between 0 and 1, at each distance, Å."""
        values = torch.exp(-self.gamma * (distance.unsqueeze(-1) - self.centers) ** 2)
        return nn.functional.threshold(values, NEGLIGIBLE, 0.0)


class ShiftedSoftplus(nn.Module):
    r"""Activation :math:`\ln(½ e^x + ½)`: zero at zero, smooth, linear far above.

    Source:
        Schütt et al., J. Chem. Phys. 148, 241722 (2018), doi:10.1063/1.5019779; arXiv:1706.08566,
        section 4.1.
    """

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The same shape, element by element."""
        return nn.functional.softplus(x) - math.log(2.0)


class ExpNormalBasis(nn.Module):
    r"""Radial basis :math:`\exp(-\beta\,(e^{-5r/r_c} - \mu_n)^2)`, n = 1 … N.

    The :math:`\mu_n` lie evenly between :math:`e^{-r_c}` and 1, r_c in Å, and
    :math:`\beta = (2(1 - e^{-r_c})/N)^{-2}`. A cutoff function is not part of it.

    Source:
        Unke and Meuwly, J. Chem. Theory Comput. 15, 3678 (2019), doi:10.1021/acs.jctc.9b00181,
        eq. 7, with distances stretched by 5/r_c (there in 1/Bohr, and not stretched) and with
        fixed parameters, as torchmd-net has it.
    """

    centres: Tensor

    def __init__(self, size: int, cutoff: float) -> None:
        """Make `size` functions for distances up to `cutoff`, Å."""
        super().__init__()
        start = math.exp(-cutoff)
        self.stretch = 5.0 / cutoff
        self.sharpness = (2.0 / size * (1.0 - start)) ** -2
        self.register_buffer("centres", torch.linspace(start, 1.0, size), persistent=False)

    def forward(self, distance: Float[Tensor, " n_pairs"]) -> Float[Tensor, "n_pairs size"]:
        """Values at each distance, Å."""
        closeness = torch.exp(-self.stretch * distance).unsqueeze(-1)
        values = torch.exp(-self.sharpness * (closeness - self.centres) ** 2)
        return nn.functional.threshold(values, NEGLIGIBLE, 0.0)


def cosine_cutoff(distance: Float[Tensor, " n_pairs"], cutoff: float) -> Float[Tensor, " n_pairs"]:
    r"""½ (cos(πr/r_c) + 1): value and slope vanish at the cutoff.

    Source:
        Behler, J. Chem. Phys. 134, 074106 (2011), doi:10.1063/1.3553717, eq. 4.
    """
    inside = distance < cutoff
    return torch.where(inside, 0.5 * (torch.cos(distance * (math.pi / cutoff)) + 1.0), 0.0)


def linear(size_in: int, size_out: int, *, bias: bool = True) -> nn.Linear:
    """A linear layer with Glorot's uniform weights and no bias to begin with."""
    layer = nn.Linear(size_in, size_out, bias=bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def mlp(*sizes: int, activation: Callable[[], nn.Module] = nn.SiLU) -> nn.Sequential:
    """Linear layers of these sizes with an activation between them."""
    layers: list[nn.Module] = []
    for size_in, size_out in itertools.pairwise(sizes):
        layers += [linear(size_in, size_out), activation()]
    return nn.Sequential(*layers[:-1])
