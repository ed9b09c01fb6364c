"""Units: parsed by pint, checked for their dimension, converted once."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from runner.errors import UnitError

if TYPE_CHECKING:
    import pint


OTHER_SPELLINGS = (  # as other programs write them into their files
    "@alias angstrom = Ang = Angstrom",
    "@alias hartree = Hartree = Ha",
    "@alias debye = Debye",
    "@alias bohr = Bohr",
    "kilojoule_per_mole = kilojoule / mole",
    "kilocalorie_per_mole = kilocalorie / mole",
    "eAng = elementary_charge * angstrom",
)


@functools.cache
def _registry() -> pint.UnitRegistry[Any]:
    """pint's registry; imported late because it takes a quarter of a second."""
    import pint

    registry: pint.UnitRegistry[Any] = pint.UnitRegistry()
    for spelling in OTHER_SPELLINGS:
        registry.define(spelling)
    return registry


MACROSCOPIC = 1e20  # eV: kJ and kcal are more, J is not


def conversion_factor(unit: str, target: str) -> float:
    """The number by which values in `unit` are multiplied to be in `target`.

    Energies per amount of substance (kcal/mol) are taken per molecule.

    Args:
        unit: any unit that pint knows, e.g. "hartree/bohr".
        target: the unit inside the program, e.g. "eV/angstrom".

    Raises:
        UnitError: unknown unit, or one of another dimension than `target`.
    """
    if unit == target:  # as in most files: there pint, which takes its time, has nothing to say
        return 1.0
    registry = _registry()
    found = _parse(unit)
    if found.dimensionality.get("[substance]") == -1:
        found = found / registry.Quantity(1.0, "avogadro_constant")
    wanted = registry.Quantity(1.0, target or "dimensionless")
    if found.dimensionality != wanted.dimensionality:
        raise UnitError(
            f'the unit "{unit}" has the wrong dimension: it does not convert to "{target}"',
            allowed=f'units of the same dimension as "{target}"',
        )
    factor = float(found.to(wanted.units).magnitude)
    if target == "eV" and factor > MACROSCOPIC:
        raise UnitError(
            f'the unit "{unit}" is one of matter in bulk: {factor:.1e} eV',
            remedy=f'for energies of molecules, write "{unit}/mol"',
        )
    return factor


def parse_quantity(text: str, target: str) -> float:
    """The value in `target` of a quantity with its unit, e.g. "5 angstrom".

    Raises:
        UnitError: no number, no unit, an unknown one, or one of another dimension.
    """
    number, _, unit = text.strip().partition(" ")
    try:
        value = float(number)
    except ValueError:
        raise UnitError(
            f'"{text}" is not a quantity',
            allowed=f'a number, a space and a unit, such as "5 {target}"',
        ) from None
    if not unit.strip():
        raise UnitError(
            f'"{text}" has no unit', allowed=f'a quantity with its unit, such as "{text} {target}"'
        )
    return value * conversion_factor(unit.strip(), target)


def _parse(unit: str) -> pint.Quantity[Any]:
    """One `unit`; pint's many ways of refusing a text become one error."""
    registry = _registry()
    try:
        return registry.Quantity(1.0, registry.parse_units(unit))
    except Exception as error:  # pint raises tokenize, syntax, attribute and its own errors
        raise UnitError(
            f'"{unit}" is not a unit',
            allowed="a unit such as eV, hartree, kcal/mol, eV/angstrom, hartree/bohr, e*angstrom",
        ) from error
