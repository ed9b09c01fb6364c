"""SchNet: continuous-filter convolutions, whose filters are networks of the distance."""

from __future__ import annotations

from collections.abc import Collection

import torch
from jaxtyping import Float
from torch import Tensor, nn

from runner.batches import Batch
from runner.config import SchNetConfig
from runner.potentials.components import (
    AtomEmbedding,
    GaussianBasis,
    Readouts,
    ShiftedSoftplus,
    both_ways,
    cosine_cutoff,
    half_pair_vectors,
    linear,
    mlp,
)


class SchNet(nn.Module):
    r"""Continuous-filter convolutional network.

    Atoms begin as embeddings of their elements, and each interaction adds
    :math:`v_i = g(\sum_j (W x_j) \circ F(r_{ij}))` to an atom's features :math:`x_i`, with a filter
    F that is a network of the distance to the neighbour j, and g a network of the atom.

    Source:
        Schütt et al., J. Chem. Phys. 148, 241722 (2018), doi:10.1063/1.5019779, its section on the
        method: atom embeddings, atom-wise layers, interaction blocks, filter-generating networks;
        first in Schütt et al., NeurIPS 2017, arXiv:1706.08566, section 4.1. It differs in that

        - filters are multiplied by a cosine cutoff, so that energies and forces are smooth where
          a neighbour leaves; the published model has none;
        - the second layer of a filter has no activation, so that no sign is preferred;
        - charges, where asked for, are read out as the energies are.
    """

    def __init__(self, config: SchNetConfig, heads: Collection[str]) -> None:
        """Build with random weights.

        Args:
            config: hyperparameters.
            heads: what is read out beside the energies: "charges", "spins".
        """
        super().__init__()
        self.config = config
        features = config.features
        self.embedding = AtomEmbedding(features, config.inputs)
        self.basis = GaussianBasis(config.radial_basis, config.cutoff)
        self.filters = Filters(config.radial_basis, config.interactions, features)
        self.interactions = nn.ModuleList(Interaction(features) for _ in range(config.interactions))
        self.readouts = Readouts(features, heads, ShiftedSoftplus)

    def forward(self, batch: Batch) -> dict[str, Float[Tensor, " n_atoms"]]:
        """Per-atom `energies`, of order one, and what else the heads read out."""
        distance, _ = half_pair_vectors(batch)
        envelope = cosine_cutoff(distance, self.config.cutoff).unsqueeze(-1)
        filters = self.filters(self.basis(distance)) * envelope
        atoms = self.embedding(batch)
        for interaction, w in zip(self.interactions, filters.unbind(), strict=True):
            atoms = atoms + interaction(atoms, w, batch.pairs)
        output: dict[str, Tensor] = self.readouts(atoms)
        return output


class Filters(nn.Module):
    """The filter-generating networks of all interactions, which need the distances alone."""

    def __init__(self, radial_basis: int, interactions: int, features: int) -> None:
        """Build two layers for each interaction."""
        super().__init__()
        # all in one product: rows of a narrow matrix cost more alone
        self.first = linear(radial_basis, interactions * features)
        self.activation = ShiftedSoftplus()
        self.weight = nn.Parameter(torch.empty(interactions, features, features))
        self.bias = nn.Parameter(torch.zeros(interactions, 1, features))
        for layer in self.weight:
            nn.init.xavier_uniform_(layer)

    def forward(
        self, basis: Float[Tensor, "n_half radial_basis"]
    ) -> Float[Tensor, "interactions n_half features"]:
        """Filters before their cutoff."""
        hidden = self.activation(self.first(basis))
        by_interaction = hidden.unflatten(-1, (len(self.weight), -1)).transpose(0, 1)
        return torch.baddbmm(self.bias, by_interaction, self.weight)


class Interaction(nn.Module):
    """Interaction block: convolution with the neighbours, between atom-wise layers."""

    def __init__(self, features: int) -> None:
        """Build for so many features."""
        super().__init__()
        self.before = linear(features, features, bias=False)
        self.after = mlp(features, features, features, activation=ShiftedSoftplus)

    def forward(
        self,
        atoms: Float[Tensor, "n_atoms features"],
        filters: Float[Tensor, "n_half features"],
        pairs: Tensor,
    ) -> Float[Tensor, "n_atoms features"]:
        """What is added to the features."""
        i, j = pairs
        message = both_ways(self.before(atoms).index_select(0, j), filters)
        change: Tensor = self.after(torch.zeros_like(atoms).index_add(0, i, message))
        return change
