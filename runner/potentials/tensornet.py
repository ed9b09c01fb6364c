"""TensorNet: 3 × 3 matrices as the features of atoms, coupled by matrix products."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import silu

from runner.batches import Batch
from runner.config import TensorNetConfig
from runner.potentials.components import (
    AtomEmbedding,
    ExpNormalBasis,
    Readouts,
    both_ways,
    cosine_cutoff,
    half_pair_vectors,
)

Parts: TypeAlias = tuple[
    Float[Tensor, "n 1 channels"], Float[Tensor, "n 3 channels"], Float[Tensor, "n 5 channels"]
]
"""A matrix taken apart, X = t·Id + [a]× + S: t; the vector a; and xx, yy, xy, xz, yz of the
traceless symmetric S. Nine numbers for nine entries: sums over neighbours carry no zeros."""

# Entries of the matrix, row by row, from t, a and S; the inverse is this matrix's sixth. Whole
# numbers, which survive a change of precision.
COMPOSE = (
    (1, 0, 0, 0, 1, 0, 0, 0, 0),
    (0, 0, 0, -1, 0, 0, 1, 0, 0),
    (0, 0, 1, 0, 0, 0, 0, 1, 0),
    (0, 0, 0, 1, 0, 0, 1, 0, 0),
    (1, 0, 0, 0, 0, 1, 0, 0, 0),
    (0, -1, 0, 0, 0, 0, 0, 0, 1),
    (0, 0, -1, 0, 0, 0, 0, 1, 0),
    (0, 1, 0, 0, 0, 0, 0, 0, 1),
    (1, 0, 0, 0, -1, -1, 0, 0, 0),
)
SIX_DECOMPOSE = (
    (2, 0, 0, 0, 2, 0, 0, 0, 2),
    (0, 0, 0, 0, 0, -3, 0, 3, 0),
    (0, 0, 3, 0, 0, 0, -3, 0, 0),
    (0, -3, 0, 3, 0, 0, 0, 0, 0),
    (4, 0, 0, 0, -2, 0, 0, 0, -2),
    (-2, 0, 0, 0, 4, 0, 0, 0, -2),
    (0, 3, 0, 3, 0, 0, 0, 0, 0),
    (0, 0, 3, 0, 0, 0, 3, 0, 0),
    (0, 0, 0, 0, 0, 3, 0, 3, 0),
)


class Matrices(nn.Module):
    """A module that takes matrices apart and puts them together."""

    _compose: Tensor
    _decompose: Tensor

    def __init__(self) -> None:
        """Hold the two changes of basis."""
        super().__init__()
        dtype = torch.get_default_dtype()
        self.register_buffer("_compose", torch.tensor(COMPOSE, dtype=dtype), persistent=False)
        self.register_buffer(
            "_decompose", torch.tensor(SIX_DECOMPOSE, dtype=dtype), persistent=False
        )

    def compose(self, parts: Parts) -> Float[Tensor, "n 3 3 channels"]:
        """The matrices of these parts."""
        entries = torch.matmul(self._compose, torch.cat(parts, dim=1))
        return entries.view(-1, 3, 3, entries.shape[-1])

    def decompose(self, x: Float[Tensor, "n 3 3 channels"]) -> Parts:
        """The parts of these matrices."""
        nine = torch.matmul(self._decompose, x.flatten(1, 2)) / 6
        t, a, s = nine.split_with_sizes([1, 3, 5], dim=1)
        return t, a, s


class TensorNet(Matrices):
    r"""Tensor network of rank 2, in its variant that is equivariant under O(3).

    A pair's matrix is :math:`\varphi Z_{ij}\,(f_I\,\mathrm{Id} + f_A [\hat r]_\times + f_S
    (\hat r\hat r^T - \mathrm{Id}/3))`; an atom's is their sum. A layer replaces X, shrunk to
    :math:`X/(\lVert X\rVert^2 + 1)`, by :math:`X + \Delta X + \Delta X^2`, where :math:`\Delta X`
    comes from :math:`YM + MY`: Y is X with its channels mixed, M the sum of what the neighbours'
    Y send through filters of the distance. Energies are read out of the norms of the parts.

    Source:
        Simeon and De Fabritiis, NeurIPS 2023, arXiv:2306.06482, section "Model architecture":
        embedding, interaction and node update, scalar output. Where the paper leaves a choice, or
        the authors' program (torchmd-net 3.1) has another one, the program is followed:

        - an atom is its own neighbour at distance zero, where a direction is none: an atom by
          itself has features, and an energy that depends on its element;
        - the basis stretches distances by 5/r_c, and has the cutoff function as a factor, which
          multiplies the filters once more;
        - norms are squared Frobenius norms, and have a smooth slope at zero;
        - the readout is a layer of `features` and one of half as many, each with SiLU.

        Left out are its charges of whole molecules (the factor 1 + 0.1 q; `inputs` has another
        way), and the SO(3) variant.
        graph-pes 1.0.2 is another model: no atom is its own neighbour, messages carry the parts
        of X instead of those of Y, filters have a layer less, the basis is trained, neither
        stretched nor cut off, Z_ij has no bias, the readout has one hidden layer, and energies
        are scaled element by element.
    """

    def __init__(self, config: TensorNetConfig, heads: Collection[str]) -> None:
        """Build with random weights.

        Args:
            config: hyperparameters.
            heads: what is read out beside the energies: "charges", "spins".
        """
        super().__init__()
        self.config = config
        features = config.features
        self.embedding = Embedding(features, config.inputs)
        self.filters = Filters(config)
        self.interactions = nn.ModuleList(Interaction(features) for _ in range(config.interactions))
        self.norm = nn.LayerNorm(3 * features)
        self.readout = nn.Linear(3 * features, features)
        self.readouts = Readouts(features, heads)

    def forward(self, batch: Batch) -> dict[str, Float[Tensor, " n_atoms"]]:
        """Per-atom `energies`, of order one, and what else the heads read out."""
        distance, direction = half_pair_vectors(batch)
        first, *filters = self.filters(distance)
        first_own, *filters_own = self.filters(distance.new_zeros(1))
        x = self.embedding(batch, first, first_own, direction)
        for interaction, w, w_own in zip(self.interactions, filters, filters_own, strict=True):
            x = interaction(x, w, w_own, batch.pairs)
        scalars = silu(self.readout(self.norm(part_norms(self.decompose(x)))))
        output: dict[str, Tensor] = self.readouts(scalars)
        return output


class Filters(nn.Module):
    """What pairs are weighted with: three numbers a channel, for the parts I, A and S."""

    def __init__(self, config: TensorNetConfig) -> None:
        """Build those of the embedding and of every interaction."""
        super().__init__()
        self.cutoff, self.features = config.cutoff, config.features
        self.interactions = config.interactions
        self.basis = ExpNormalBasis(config.radial_basis, config.cutoff)
        # the first layers of all in one product: rows of a narrow matrix cost more alone
        self.first = nn.Linear(config.radial_basis, (3 + self.interactions) * self.features)
        self.second = _linears(self.interactions, self.features, 2 * self.features)
        self.third = _linears(self.interactions, 2 * self.features, 3 * self.features)

    def forward(
        self, distance: Float[Tensor, " n_half"]
    ) -> list[Float[Tensor, "n_half 3 channels"]]:
        """The embedding's, which are linear in the basis, then those of each interaction."""
        envelope = cosine_cutoff(distance, self.cutoff).unsqueeze(-1)
        first = self.first(self.basis(distance) * envelope)
        embedding, hidden = first.split_with_sizes(
            [3 * self.features, self.interactions * self.features], dim=-1
        )
        filters = [embedding]
        per_layer = silu(hidden).chunk(self.interactions, dim=-1)
        for second, third, h in zip(self.second, self.third, per_layer, strict=True):
            filters.append(silu(third(silu(second(h)))))
        return [(w * envelope).unflatten(-1, (3, self.features)) for w in filters]


class Embedding(Matrices):
    """An atom's matrices from its neighbours' elements, distances and directions."""

    def __init__(self, features: int, inputs: Collection[str]) -> None:
        """Build for so many channels, with these inputs beside the elements."""
        super().__init__()
        self.elements = AtomEmbedding(features, inputs)
        # Z_ij is linear in both elements' vectors: mixed atom by atom, added pair by pair
        self.centre = nn.Linear(features, features)
        self.neighbor = nn.Linear(features, features, bias=False)
        self.norm = nn.LayerNorm(features)
        self.gates = nn.Sequential(
            nn.Linear(features, 2 * features),
            nn.SiLU(),
            nn.Linear(2 * features, 3 * features),
            nn.SiLU(),
        )
        self.mix = Mix(features)

    def forward(
        self,
        batch: Batch,
        filters: Float[Tensor, "n_half 3 channels"],
        filters_own: Float[Tensor, "1 3 channels"],
        direction: Float[Tensor, "n_half 3"],
    ) -> Float[Tensor, "n_atoms 3 3 channels"]:
        """Matrices of the atoms."""
        i, j = batch.pairs
        elements = self.elements(batch)
        centre, neighbor = self.centre(elements), self.neighbor(elements)
        z = centre.index_select(0, i) + neighbor.index_select(0, j)
        w_i, w_a, w_s = both_ways(z.unsqueeze(1), filters).chunk(3, dim=1)
        t = ((centre + neighbor) * filters_own[:, 0]).unsqueeze(1).index_add(0, i, w_i)
        a, s = (
            t.new_zeros(t.shape[0], geometry.shape[1], t.shape[2]).index_add(
                0, i, w * geometry.unsqueeze(-1)
            )
            for w, geometry in (
                (w_a, torch.cat([direction, -direction])),
                (w_s, traceless_square(direction).repeat(2, 1)),
            )
        )
        norm = self.norm(squared_norm(self.compose((t, a, s))))
        gates = self.gates(norm).unflatten(-1, (3, -1)).chunk(3, dim=1)
        return self.compose(scaled(self.mix((t, a, s)), gates))


class Interaction(Matrices):
    """Messages of the neighbours, and what an atom makes of them."""

    def __init__(self, features: int) -> None:
        """Build for so many channels."""
        super().__init__()
        self.before, self.after = Mix(features), Mix(features)

    def forward(
        self,
        x: Float[Tensor, "n_atoms 3 3 channels"],
        filters: Float[Tensor, "n_half 3 channels"],
        filters_own: Float[Tensor, "1 3 channels"],
        pairs: Tensor,
    ) -> Float[Tensor, "n_atoms 3 3 channels"]:
        """Matrices after the interaction."""
        i, j = pairs
        x = shrunk(x)
        parts = self.before(self.decompose(x))
        own = scaled(parts, filters_own.chunk(3, dim=1))
        t, a, s = (
            mine.index_add(0, i, both_ways(theirs.index_select(0, j), w))
            for mine, theirs, w in zip(own, parts, filters.chunk(3, dim=1), strict=True)
        )
        y, message = self.compose(parts), self.compose((t, a, s))
        product = matrix_product(y, message) + matrix_product(message, y)
        delta = self.compose(self.after(self.decompose(shrunk(product))))
        square: Tensor = matrix_product(delta, delta)
        return x + delta + square


class Mix(nn.Module):
    """Mixes channels, with weights of their own for each part of a matrix."""

    def __init__(self, features: int) -> None:
        """Build for so many channels."""
        super().__init__()
        self.weights = nn.ModuleList(nn.Linear(features, features, bias=False) for _ in range(3))

    def forward(self, parts: Parts) -> Parts:
        """Parts with mixed channels."""
        t, a, s = (mix(part) for mix, part in zip(self.weights, parts, strict=True))
        return t, a, s


@torch.library.custom_op(
    "runner::matrix_product", mutates_args=(), schema="(Tensor left, Tensor right) -> Tensor"
)
def matrix_product(
    left: Float[Tensor, "n 3 3 channels"], right: Float[Tensor, "n 3 3 channels"]
) -> Float[Tensor, "n 3 3 channels"]:
    """Product of two matrices, channel by channel; its derivatives are products again.

    Channels lie last, where a processor takes many at once. It is one operation to a compiler too,
    which would otherwise write out products of products, and take minutes over it.
    """
    product = left.new_empty(left.shape)
    torch.mul(left[:, :, 0, None], right[:, None, 0], out=product)
    product.addcmul_(left[:, :, 1, None], right[:, None, 1])
    return product.addcmul_(left[:, :, 2, None], right[:, None, 2])


@matrix_product.register_fake
def _empty_product(left: Tensor, right: Tensor) -> Tensor:  # noqa: ARG001
    """Shape and strides of the product."""
    return left.new_empty(left.shape)


def _save_factors(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _product_slopes(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """G·Rᵀ and Lᵀ·G."""
    left, right = ctx.saved_tensors
    return (
        matrix_product(gradient, right.transpose(1, 2)),
        matrix_product(left.transpose(1, 2), gradient),
    )


matrix_product.register_autograd(_product_slopes, setup_context=_save_factors)


def traceless_square(vector: Float[Tensor, "n 3"]) -> Float[Tensor, "n 5"]:
    """xx, yy, xy, xz, yz of v·vᵀ − Id/3, for unit vectors v."""
    x, y, z = vector.unbind(-1)
    return torch.stack([x * x - 1 / 3, y * y - 1 / 3, x * y, x * z, y * z], dim=-1)


def squared_norm(x: Float[Tensor, "n 3 3 channels"]) -> Float[Tensor, "n channels"]:
    """Squares of all entries, summed."""
    return (x * x).sum((1, 2))


def shrunk(x: Float[Tensor, "n 3 3 channels"]) -> Float[Tensor, "n 3 3 channels"]:
    """Each matrix divided by its squared norm, plus one."""
    return x * (squared_norm(x) + 1).reciprocal()[:, None, None]


def scaled(parts: Parts, factors: Iterable[Float[Tensor, "n_or_1 1 channels"]]) -> Parts:
    """Parts, each times its factor."""
    t, a, s = (part * factor for part, factor in zip(parts, factors, strict=True))
    return t, a, s


def part_norms(parts: Parts) -> Float[Tensor, "n three_channels"]:
    """Squared norms of the matrices t·Id, [a]× and S, one after the other."""
    t, a, s = parts
    squares = torch.cat([1.5 * t * t, a * a, s * s], dim=1)
    i, a, s = (square.sum(1) for square in squares.split_with_sizes([1, 3, 5], dim=1))
    return 2 * torch.cat([i, a, s + parts[2][:, 0] * parts[2][:, 1]], dim=-1)


def _linears(count: int, size_in: int, size_out: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(size_in, size_out) for _ in range(count))
