"""Every potential conforms, and every way of not conforming is found."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from runner.batches import Batch
from runner.check_potential import statistics_of
from runner.config import ForeignConfig, potential_config
from runner.conformance import CHECKS, examine
from runner.potentials import POTENTIALS, Potential, build_potential
from runner.potentials.components import cosine_cutoff, pair_vectors

ELEMENTS = ["H", "C", "O"]
CUTOFF = 4.0
SMALL = {"cutoff": "4 angstrom", "features": 16, "radial_basis": 8}
EVERYTHING = {
    "inputs": ["total_charge", "spin_multiplicity"],
    "energy": {"scale": "per_element", "shift": "per_element", "learnt": True},
    "charges": {"equalise": True},
    "coulomb": {"cutoff": "5.5 angstrom"},
    "zbl": {"cutoff": "3 angstrom"},
}
MOLECULES_ONLY = {"stress", "periodic images", "extensivity"}
VARIANTS: dict[str, tuple[Mapping[str, object], set[str]]] = {
    "plain": ({}, {"inputs"}),
    "everything": (EVERYTHING, {"extensivity"}),
    "free charges at any distance": (
        {"coulomb": {}, "energy": {"shift": "one"}},
        {"inputs"} | MOLECULES_ONLY,
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", POTENTIALS)
def test_every_architecture_with_every_term_conforms(name: str, variant: str) -> None:
    torch.manual_seed(0)
    more, not_applicable = VARIANTS[variant]
    config = potential_config({"name": name, **SMALL, **more})
    quantities = ["energy", "forces", "stress", *(["dipole", "quadrupole"] if more else [])]
    potential = build_potential(config, quantities, statistics_of(ELEMENTS), ELEMENTS)
    findings = {finding.check: finding for finding in examine(potential, ELEMENTS)}
    assert not [finding for finding in findings.values() if finding.passed is False]
    assert {n for n, finding in findings.items() if finding.passed is None} == not_applicable


class Pairs(nn.Module):
    """A proper sum over pairs, of which one thing is then made wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = nn.Embedding(119, 4)
        self.by_distance = nn.Sequential(nn.Linear(5, 8), nn.SiLU(), nn.Linear(8, 1))
        self.constant = nn.Parameter(torch.tensor(0.3))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        distance, direction = self.vectors(batch)
        _, j = batch.pairs
        features = torch.cat([self.neighbors(batch, j), distance.unsqueeze(-1)], dim=-1)
        values = self.by_distance(features).squeeze(-1) * self.cut(distance)
        return {"energies": self.gather(batch, values, direction)}

    def vectors(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return pair_vectors(batch)

    def neighbors(self, batch: Batch, j: Tensor) -> Tensor:
        elements = self.elements(batch.atomic_numbers)
        found: Tensor = elements[j] * elements[batch.pairs[0]]
        return found

    def cut(self, distance: Tensor) -> Tensor:
        return cosine_cutoff(distance, CUTOFF)

    def gather(self, batch: Batch, values: Tensor, direction: Tensor) -> Tensor:  # noqa: ARG002
        zeros = values.new_zeros(batch.positions.shape[0])
        return zeros.index_add(0, batch.pairs[0], values) + self.constant


class Detached(Pairs):
    def vectors(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return pair_vectors(batch.at(batch.positions.detach() + 0.1 * batch.positions))


class NoShifts(Pairs):
    def vectors(self, batch: Batch) -> tuple[Tensor, Tensor]:
        i, j = batch.pairs
        separation = batch.positions[j] - batch.positions[i]
        distance = (separation.square().sum(-1) + 0.01).sqrt()
        return distance, separation / distance.unsqueeze(-1)


class OneAxis(Pairs):
    def gather(self, batch: Batch, values: Tensor, direction: Tensor) -> Tensor:
        return super().gather(batch, values * (1 + direction[:, 0] ** 2), direction)


class Handed(Pairs):
    def gather(self, batch: Batch, values: Tensor, direction: Tensor) -> Tensor:
        i, _ = batch.pairs
        sums = [
            values.new_zeros(batch.positions.shape[0], 3).index_add(0, i, w[:, None] * direction)
            for w in (values, values**2, torch.sin(3 * values))
        ]
        return torch.linalg.det(torch.stack(sums, dim=1)) * 10 + super().gather(
            batch, values, direction
        )


class FromOrigin(Pairs):
    def gather(self, batch: Batch, values: Tensor, direction: Tensor) -> Tensor:
        distant = 0.01 * batch.positions.square().sum(-1)
        return super().gather(batch, values, direction) + distant


class Ordered(Pairs):
    def gather(self, batch: Batch, values: Tensor, direction: Tensor) -> Tensor:
        even = batch.pairs[0] % 2 == 0
        return super().gather(batch, values * torch.where(even, 1.5, 0.5), direction)


class Blind(Pairs):
    def neighbors(self, batch: Batch, j: Tensor) -> Tensor:  # noqa: ARG002
        i = batch.pairs[0]
        found: Tensor = self.elements(batch.atomic_numbers)[i]
        return found


class Intensive(Pairs):
    def gather(self, batch: Batch, values: Tensor, direction: Tensor) -> Tensor:
        return super().gather(batch, values, direction) / batch.n_atoms[batch.structure]


class Mixing(Pairs):
    def gather(self, batch: Batch, values: Tensor, direction: Tensor) -> Tensor:
        found = super().gather(batch, values, direction)
        return found + 0.1 * found.mean()


class Stepping(Pairs):
    def cut(self, distance: Tensor) -> Tensor:
        return torch.ones_like(distance)


class Kinked(Pairs):
    def cut(self, distance: Tensor) -> Tensor:
        return 1 - distance / CUTOFF


class NotANumber(Pairs):
    def gather(self, batch: Batch, values: Tensor, direction: Tensor) -> Tensor:
        found = super().gather(batch, values, direction)
        ones = torch.ones_like(values)
        n = torch.zeros_like(found).index_add(0, batch.pairs[0], ones)
        return found / n


class Rounded(Pairs):
    def gather(self, batch: Batch, values: Tensor, direction: Tensor) -> Tensor:
        return super().gather(batch, values.half().to(values.dtype), direction)


class Untrainable(Pairs):
    def neighbors(self, batch: Batch, j: Tensor) -> Tensor:
        return super().neighbors(batch, j).detach() + 0 * self.constant.detach()

    def cut(self, distance: Tensor) -> Tensor:
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        self.elements.weight.requires_grad_(True)
        return super().cut(distance)


class Random(Pairs):
    def gather(self, batch: Batch, values: Tensor, direction: Tensor) -> Tensor:
        return nn.functional.dropout(super().gather(batch, values, direction))


class Huge(Pairs):
    def gather(self, batch: Batch, values: Tensor, direction: Tensor) -> Tensor:
        return super().gather(batch, (values + 1e6) - 1e6, direction)


class Crashing(Pairs):
    def gather(self, batch: Batch, values: Tensor, direction: Tensor) -> Tensor:
        if batch.cell is not None:
            raise RuntimeError("no cells here")
        return super().gather(batch, values, direction)


WRONG = {
    Detached: "forces",
    NoShifts: "periodic images",
    OneAxis: "rotation, reflection",
    Handed: "rotation, reflection",
    FromOrigin: "translation",
    Ordered: "permutation",
    Blind: "elements of neighbours",
    Intensive: "extensivity",
    Mixing: "batch against single",
    Stepping: "smooth at the cutoff",
    Kinked: "smooth at the cutoff",
    NotANumber: "isolated atoms",
    Rounded: "forces",
    Untrainable: "gradients of a training",
    Random: "saved and loaded",
    Huge: "single precision",
    Crashing: "stress",
}


def _examined(kind: type[Pairs]) -> dict[str, tuple[bool | None, str]]:
    torch.manual_seed(0)
    config = ForeignConfig(name="here:Pairs", cutoff="4 angstrom")  # type: ignore[arg-type]
    return {f.check: (f.passed, f.detail) for f in examine(Potential(kind(), config), ELEMENTS)}


def test_a_sum_over_pairs_conforms() -> None:
    found = _examined(Pairs)
    assert [name for name, (passed, _) in found.items() if passed is not True] == ["inputs"]
    assert list(found) == list(CHECKS)


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_found(kind: type[Pairs]) -> None:
    passed, detail = _examined(kind)[WRONG[kind]]
    assert passed is False
    assert len(detail) > 20


def test_an_input_without_effect_is_found() -> None:
    config = ForeignConfig(name="here:Pairs", cutoff="4 angstrom", inputs=["total_charge"])  # type: ignore[arg-type]
    (finding,) = (f for f in examine(Potential(Pairs(), config), ELEMENTS) if f.check == "inputs")
    assert finding.passed is False
    assert finding.detail == "another total_charge changes nothing"
