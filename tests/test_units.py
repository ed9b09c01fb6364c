"""Units against their CODATA values, and what is said of those that do not fit."""

from __future__ import annotations

import pytest
from ase import units as ase_units

from runner.errors import UnitError
from runner.fields import LABELS
from runner.units import conversion_factor, parse_quantity


@pytest.mark.parametrize(
    ("unit", "target", "factor"),
    [
        ("eV", "eV", 1.0),
        ("meV", "eV", 1e-3),
        ("hartree", "eV", ase_units.Hartree),
        ("kcal/mol", "eV", ase_units.kcal / ase_units.mol),
        ("kJ/mol", "eV", ase_units.kJ / ase_units.mol),
        ("hartree/bohr", "eV/angstrom", ase_units.Hartree / ase_units.Bohr),
        ("kcal/mol/angstrom", "eV/angstrom", ase_units.kcal / ase_units.mol),
        ("nm", "angstrom", 10.0),
        ("debye", "e*angstrom", ase_units.Debye),
        ("e*bohr", "e*angstrom", ase_units.Bohr),
        ("e", "e", 1.0),
    ],
)
def test_factors(unit: str, target: str, factor: float) -> None:
    assert conversion_factor(unit, target) == pytest.approx(factor, rel=1e-7)


@pytest.mark.parametrize("name", sorted(LABELS))
def test_the_program_s_own_units_are_understood(name: str) -> None:
    assert conversion_factor(LABELS[name].unit, LABELS[name].unit) == 1.0


def test_a_wrong_dimension_is_refused() -> None:
    with pytest.raises(UnitError) as error:
        conversion_factor("eV", "eV/angstrom")
    assert 'the unit "eV" has the wrong dimension' in str(error.value)
    assert 'allowed: units of the same dimension as "eV/angstrom"' in str(error.value)


@pytest.mark.parametrize("unit", ["electronvoltz", "eV/", "3 eV +", "", "?"])
def test_what_is_no_unit_is_refused(unit: str) -> None:
    with pytest.raises(UnitError, match=r"is not a unit|has the wrong dimension"):
        conversion_factor(unit, "eV")


def test_quantities() -> None:
    assert parse_quantity("5 angstrom", "angstrom") == 5.0
    assert parse_quantity(" 0.5 nm ", "angstrom") == pytest.approx(5.0)
    assert parse_quantity("-1.5e1 hartree", "eV") == pytest.approx(-15 * ase_units.Hartree)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5", r'"5" has no unit(.|\n)*"5 angstrom"'),
        ("five angstrom", r'"five angstrom" is not a quantity(.|\n)*"5 angstrom"'),
        ("5 eV", "wrong dimension"),
        ("5 angstrm", '"angstrm" is not a unit'),
    ],
)
def test_what_is_no_quantity_is_refused(text: str, message: str) -> None:
    with pytest.raises(UnitError, match=message):
        parse_quantity(text, "angstrom")


@pytest.mark.parametrize("text", ["angstrom", "", "nan", "5 ", "5,0 angstrom", "0x5 angstrom"])
def test_a_quantity_is_a_number_and_a_unit(text: str) -> None:
    with pytest.raises(UnitError, match=r'is not a quantity|has no unit(.|\n)*"5? ?.*angstrom"'):
        parse_quantity(text, "angstrom")


@pytest.mark.parametrize("unit", ["kcal", "kJ"])
def test_energies_of_matter_in_bulk_are_refused(unit: str) -> None:
    with pytest.raises(UnitError, match=rf'matter in bulk(.|\n)*write "{unit}/mol"'):
        conversion_factor(unit, "eV")
    assert conversion_factor("J", "eV") == pytest.approx(1 / ase_units._e)
