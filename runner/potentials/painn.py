"""PaiNN: scalar and vector features of atoms, coupled by equivariant messages."""

from __future__ import annotations

from collections.abc import Collection

import torch
from jaxtyping import Float
from torch import Tensor, nn

from runner.batches import Batch
from runner.config import PaiNNConfig
from runner.potentials.components import (
    AtomEmbedding,
    BesselBasis,
    Readouts,
    both_ways,
    cosine_cutoff,
    half_pair_vectors,
    mlp,
)

EPSILON = 1e-8  # under the root of a vector's norm, which keeps its slope finite at zero


class PaiNN(nn.Module):
    """Polarizable atom interaction neural network.

    Source:
        Schütt, Unke, Gastegger, ICML 2021, arXiv:2102.03150: the message block is eqs. 7 and 8,
        the update block eqs. 9 and 10. Atomic energies and charges are read out of the scalar
        features by a two-layer network each (there: the energy; the dipole from vectors too).
        The norm of vectors has 1e-8 added under its root.
    """

    def __init__(self, config: PaiNNConfig, heads: Collection[str]) -> None:
        """Build with random weights.

        Args:
            config: hyperparameters.
            heads: what is read out beside the energies: "charges", "spins".
        """
        super().__init__()
        self.config = config
        features = config.features
        self.embedding = AtomEmbedding(features, config.inputs)
        self.basis = BesselBasis(config.radial_basis, config.cutoff)
        # the filters of all interactions in one product: rows of a narrow matrix cost more alone
        self.filters = mlp(config.radial_basis, config.interactions * 3 * features)
        self.messages = nn.ModuleList(Message(features) for _ in range(config.interactions))
        self.updates = nn.ModuleList(Update(features) for _ in range(config.interactions))
        self.readouts = Readouts(features, heads)

    def forward(self, batch: Batch) -> dict[str, Float[Tensor, " n_atoms"]]:
        """Per-atom `energies`, of order one, and what else the heads read out."""
        distance, direction = half_pair_vectors(batch)
        envelope = cosine_cutoff(distance, self.config.cutoff).unsqueeze(-1)
        filters = self.filters(self.basis(distance)) * envelope
        scalars = self.embedding(batch)
        vectors = scalars.new_zeros((scalars.shape[0], 3, self.config.features))
        per_layer = filters.split(3 * self.config.features, dim=-1)
        for message, update, w in zip(self.messages, self.updates, per_layer, strict=True):
            scalars, vectors = message(scalars, vectors, w, direction, batch.pairs)
            scalars, vectors = update(scalars, vectors)
        output: dict[str, Tensor] = self.readouts(scalars)
        return output


class Message(nn.Module):
    """Eqs. 7 and 8: what an atom hears from its neighbours."""

    def __init__(self, features: int) -> None:
        """Build for so many features."""
        super().__init__()
        self.phi = mlp(features, features, 3 * features)

    def forward(
        self,
        scalars: Float[Tensor, "n_atoms features"],
        vectors: Float[Tensor, "n_atoms 3 features"],
        filters: Float[Tensor, "n_half filters"],
        direction: Float[Tensor, "n_half 3"],
        pairs: Tensor,
    ) -> tuple[Float[Tensor, "n_atoms features"], Float[Tensor, "n_atoms 3 features"]]:
        """Features after the message."""
        i, j = pairs
        message = both_ways(self.phi(scalars).index_select(0, j), filters)
        ds, along, through = message.chunk(3, dim=-1)
        unit = torch.cat([direction, -direction]).unsqueeze(-1)
        dv = vectors.index_select(0, j) * through.unsqueeze(1) + unit * along.unsqueeze(1)
        return scalars.index_add(0, i, ds), vectors.index_add(0, i, dv)


class Update(nn.Module):
    """Eqs. 9 and 10: scalars and vectors of one atom exchange what they know."""

    def __init__(self, features: int) -> None:
        """Build for so many features."""
        super().__init__()
        self.features = features
        self.mix = nn.Linear(features, 2 * features, bias=False)
        nn.init.xavier_uniform_(self.mix.weight)
        self.a = mlp(2 * features, features, 3 * features)

    def forward(
        self,
        scalars: Float[Tensor, "n_atoms features"],
        vectors: Float[Tensor, "n_atoms 3 features"],
    ) -> tuple[Float[Tensor, "n_atoms features"], Float[Tensor, "n_atoms 3 features"]]:
        """Features after the update."""
        u, v = self.mix(vectors).split(self.features, dim=-1)
        norm = torch.sqrt((v * v).sum(dim=1) + EPSILON)
        a_vv, a_sv, a_ss = self.a(torch.cat([scalars, norm], dim=-1)).split(self.features, dim=-1)
        return scalars + a_ss + a_sv * (u * v).sum(dim=1), vectors + a_vv.unsqueeze(1) * u
