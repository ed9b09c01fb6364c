"""A potential of one's own: a sum over pairs of atoms, learnt."""

import torch
from torch import Tensor, nn

from runner.batches import Batch
from runner.potentials.components import (
    N_ELEMENTS,
    GaussianBasis,
    cosine_cutoff,
    mlp,
    pair_vectors,
)


class PairPotential(nn.Module):
    """Pairs have an energy by their distance and elements, elements have one by themselves."""

    def __init__(self, cutoff: float, features: int = 32, radial_basis: int = 20) -> None:
        """Build for distances up to `cutoff`, Å; further keys of the config come by their names."""
        super().__init__()
        self.cutoff = cutoff
        self.alone = nn.Embedding(N_ELEMENTS, 1)
        self.elements = nn.Embedding(N_ELEMENTS, features)
        self.basis = GaussianBasis(radial_basis, cutoff)
        self.network = mlp(features + radial_basis, 2 * features, features, 1)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Energies of atoms, of order one; forces, stress and losses follow from them."""
        i, j = batch.pairs
        distance, _ = pair_vectors(batch)
        elements = self.elements(batch.atomic_numbers)
        both = elements[i] * elements[j]  # the same for (H, O) as for (O, H)
        pairs = self.network(torch.cat([both, self.basis(distance)], dim=-1)).squeeze(-1)
        pairs = pairs * cosine_cutoff(distance, self.cutoff)  # smooth where a neighbour leaves
        alone = self.alone(batch.atomic_numbers).squeeze(-1)
        return {"energies": alone.index_add(0, i, 0.5 * pairs)}
