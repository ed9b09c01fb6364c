"""The vocabulary: every quantity that the program reads, stores, learns or predicts.

One unit system inside: eV, Å, e, and what follows from them. Readers convert to it once; nothing
else converts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Per = Literal["atom", "structure"]


@dataclass(frozen=True)
class Field:
    """One quantity.

    Attributes:
        name: its name in configs, arrays, batches, losses, metrics and plots.
        per: whether there is one value an atom or one a structure.
        shape: shape of one value; () is a scalar.
        unit: unit inside the program, as pint writes it; "" has no dimension.
        meaning: what it is, with its sign or origin where that matters.
        assumed_unit: whether a source that names no unit is taken to mean `unit`.
    """

    name: str
    per: Per
    shape: tuple[int, ...]
    unit: str
    meaning: str
    assumed_unit: bool = False

    @property
    def unit_text(self) -> str:
        """The unit as people write it: eV/Å, e·Å."""
        text = self.unit.replace("**2", "²").replace("**3", "³")
        return text.replace("angstrom", "Å").replace("*", "·")


ATOMIC_NUMBERS = Field("atomic_numbers", "atom", (), "", "atomic number Z, stored as uint8")
POSITIONS = Field("positions", "atom", (3,), "angstrom", "Cartesian coordinates", True)
CELL = Field(
    "cell", "structure", (3, 3), "angstrom", "lattice vectors as rows; zero where not periodic"
)
PBC = Field("pbc", "structure", (3,), "", "along which lattice vectors it is periodic, bool")

LABELS: dict[str, Field] = {
    field.name: field
    for field in (
        Field("energy", "structure", (), "eV", "total energy; prepared: offset-corrected"),
        Field("forces", "atom", (3,), "eV/angstrom", "−∂E/∂R"),
        Field("stress", "structure", (3, 3), "eV/angstrom**3", "(1/V) ∂E/∂ε, ASE's sign"),
        Field("total_charge", "structure", (), "e", "charge of the whole structure", True),
        Field("spin_multiplicity", "structure", (), "", "2S + 1", True),
        Field(
            "dipole",
            "structure",
            (3,),
            "e*angstrom",
            "Σ q r about the origin of the positions as given (matters for an ion)",
        ),
        Field(
            "quadrupole",
            "structure",
            (3, 3),
            "e*angstrom**2",
            "Σ q r r about the origin of the positions, traced or traceless as its source declares",
        ),
        Field("charges", "atom", (), "e", "partial charges", True),
    )
}

FROM_CHARGES = frozenset({"charges", "total_charge", "dipole", "quadrupole"})
"""Labels that follow from the partial charges that a potential predicts."""

FIELDS: dict[str, Field] = {
    field.name: field for field in (ATOMIC_NUMBERS, POSITIONS, CELL, PBC)
} | LABELS
