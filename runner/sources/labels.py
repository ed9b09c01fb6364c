"""From raw numbers to structures in eV, Å and e: checked, converted, NaN where missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase.data import atomic_numbers as ATOMIC_NUMBER_OF
from ase.data import chemical_symbols
from jaxtyping import Bool, Float64, Int64, Shaped, UInt8

from runner.config import TENSOR_COMPONENTS, LabelConfig, SourceConfig, StressConfig, TensorConfig
from runner.errors import SourceError, UnitError
from runner.fields import LABELS, POSITIONS, Field
from runner.sources.raw import Raw, Where
from runner.structures import Structures
from runner.units import conversion_factor

LARGEST_CELL = 1e9  # in the file's unit


@dataclass(frozen=True)
class Factors:
    """What the numbers of a file are multiplied by to be in the program's units.

    Attributes:
        positions: of positions and cells.
        labels: of each label, its `scale` included.
    """

    positions: float
    labels: dict[str, float]


def factors(
    path: Path, config: SourceConfig, stated: Mapping[str, str], usual: Mapping[str, str]
) -> Factors:
    """Settle the units of a file.

    Args:
        path: the file.
        config: the units that the config gives.
        stated: units that the file itself states, by its keys; those of the positions under
            `positions`.
        usual: units that its format prescribes, likewise; a config may say otherwise.

    Raises:
        SourceError: the config contradicts the file; nobody gives a unit.
    """
    labels = {}
    for name, label in config.labels.items():
        meant, key = label.unit_in_file(LABELS[name]), label.key or ""
        unit = _settled(path, name, meant, label.unit, stated.get(key), usual.get(key))
        if unit is None and not LABELS[name].assumed_unit and label.value is None:
            raise SourceError(
                f"{name} needs a unit: the file does not state one",
                where=str(path),
                remedy=f'give it in the source, for example unit = "{meant}"',
            )
        labels[name] = label.scale * conversion_factor(unit or meant, meant)
    length = _settled(
        path,
        "positions",
        POSITIONS.unit,
        config.positions.unit,
        stated.get("positions"),
        usual.get("positions"),
    )
    return Factors(conversion_factor(length or POSITIONS.unit, POSITIONS.unit), labels)


def _settled(
    path: Path, name: str, meant: str, given: str | None, stated: str | None, usual: str | None
) -> str | None:
    """The unit of one quantity, by the config, the file or its format."""
    if stated is None:
        return given or usual
    try:
        from_file = conversion_factor(stated, meant)
    except UnitError as error:
        if given is not None:
            return given
        raise SourceError(
            f'the file states the unit "{stated}" for {name}: {error.what}',
            where=str(path),
            remedy=f'give the unit of {name} in the source, for example unit = "{meant}"',
        ) from None
    if given is not None and not np.isclose(conversion_factor(given, meant), from_file, rtol=1e-5):
        raise SourceError(
            f'the config gives {name} the unit "{given}", but the file states "{stated}"',
            where=str(path),
            remedy=f"take the unit of {name} out of the source, or correct it",
        )
    return stated


def to_structures(raw: Raw, config: SourceConfig, units: Factors) -> Structures:
    """Check and convert some structures.

    Raises:
        SourceError: no atoms, an unknown element, positions that cannot be, a cell without volume,
            an infinite value, a NaN that is not declared to mean "missing".
    """
    counts, where = raw.counts, raw.where
    if (counts == 0).any():
        raise SourceError("the structure has no atoms", where=where(int(np.argmin(counts))))
    check_positions(raw.positions, counts, where)
    atoms: dict[str, np.ndarray] = {
        "atomic_numbers": elements_of(raw.species, counts, where),
        "positions": raw.positions * units.positions,
    }
    structures: dict[str, np.ndarray] = {}
    if raw.cell is not None and raw.pbc is not None:
        _check_cells(raw.cell, raw.pbc, where)
        periodic = np.any(raw.pbc, axis=1, keepdims=True)[:, :, None]
        structures["cell"] = raw.cell * units.positions * periodic
        structures["pbc"] = raw.pbc
    for name, label in config.labels.items():
        quantity = LABELS[name]
        values = converted(
            quantity, label, units.labels[name], raw.labels[name], raw.present[name], counts, where
        )
        if isinstance(label, TensorConfig) and label.order is not None:
            values = _full_tensor(values, label)
        if isinstance(label, StressConfig) and label.virial:
            values = -values / _volumes(structures, raw.present[name], where)[:, None, None]
        (atoms if quantity.per == "atom" else structures)[name] = values
    first_atom = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return Structures(first_atom, atoms, structures, raw.group)


def converted(
    quantity: Field,
    label: LabelConfig,
    factor: float,
    values: Float64[np.ndarray, "n_rows ..."],
    present: Bool[np.ndarray, " n_structures"],
    counts: Int64[np.ndarray, " n_structures"],
    where: Where,
) -> Float64[np.ndarray, "n_rows ..."]:
    """Values of one label in the program's unit; NaN where a structure has none.

    Args:
        quantity: the label.
        label: key and meaning of NaN in the source.
        factor: from the file's unit to the program's.
        values: as they stand in the file, a row a structure or an atom.
        present: whether a structure has the label at all; rows of others are NaN.
        counts: atoms of each structure.
        where: names a structure.

    Raises:
        SourceError: an infinite value, or a NaN that is not declared to mean "missing".
    """
    with np.errstate(over="ignore"):  # what becomes too large is refused as infinite
        values = values * factor
    if not np.isfinite(values).all():
        _refuse(quantity, values, present, counts, where, nan_allowed=label.missing == "nan")
    return values


def check_positions(
    positions: Float64[np.ndarray, "n_atoms 3"],
    counts: Int64[np.ndarray, " n_structures"],
    where: Where,
) -> None:
    """Refuse positions that are not finite numbers, and two atoms at the same place."""
    owner = np.repeat(np.arange(len(counts)), counts)
    bad = ~np.isfinite(positions).all(axis=1)
    if bad.any():
        raise SourceError(
            "a position is not a finite number", where=where(int(owner[np.argmax(bad)]))
        )
    order = np.lexsort((*positions.T, owner))
    apart = np.column_stack([np.diff(owner[order]), np.diff(positions[order], axis=0)])
    same: np.ndarray = np.abs(apart).max(axis=1, initial=0) == 0
    if same.any():
        first = int(owner[order][np.argmax(same)])
        raise SourceError("two atoms are at the same place", where=where(first))


def elements_of(
    species: Shaped[np.ndarray, " n_atoms"],
    counts: Int64[np.ndarray, " n_structures"],
    where: Where,
) -> UInt8[np.ndarray, " n_atoms"]:
    """Atomic numbers of chemical symbols, or of numbers that should be atomic numbers.

    Raises:
        SourceError: a symbol or a number that is no element.
    """
    distinct, inverse = np.unique(species, return_inverse=True)
    if distinct.dtype.kind in "iu":
        numbers = np.where((distinct > 0) & (distinct < len(chemical_symbols)), distinct, 0)
        allowed = f"atomic numbers from 1 to {len(chemical_symbols) - 1}"
    else:
        known = [ATOMIC_NUMBER_OF.get(str(symbol), 0) for symbol in distinct]
        numbers, allowed = np.array(known, np.int64), "chemical symbols such as H, C, Cl"
    result: np.ndarray = numbers.astype(np.uint8)[inverse.ravel()]
    if not result.all():
        row = int(np.argmin(result))
        raise SourceError(
            f'"{species[row]}" is not an element',
            where=where(int(np.repeat(np.arange(len(counts)), counts)[row])),
            allowed=allowed,
        )
    return result


def _check_cells(cell: np.ndarray, pbc: np.ndarray, where: Where) -> None:
    """Refuse periodic directions without a lattice vector, and those that lie in one plane."""
    here: np.ndarray = np.logical_or.reduce(pbc, axis=1)
    strange = here & ~(np.abs(cell) < LARGEST_CELL).all(axis=(1, 2))  # NaN is strange too
    if strange.any():
        raise SourceError(
            f"the cell is not of finite numbers below {LARGEST_CELL:g}",
            where=where(int(np.argmax(strange))),
        )
    vectors = np.where((pbc & here[:, None])[:, :, None], np.nan_to_num(cell), 0.0)
    lengths = np.linalg.norm(vectors, axis=2, keepdims=True)
    directions = vectors / np.where(lengths > 0, lengths, 1.0)
    gram = directions @ directions.transpose(0, 2, 1) + np.eye(3) * ~pbc[:, None, :]
    flat = here & (np.linalg.det(gram) < 1e-12)  # the squared volume that the directions span
    if flat.any():
        raise SourceError(
            "the structure is periodic along lattice vectors that are zero or linearly dependent",
            where=where(int(np.argmax(flat))),
            remedy='for a molecule in a box write pbc="F F F"',
        )


def _full_tensor(values: np.ndarray, label: TensorConfig) -> np.ndarray:
    """Symmetric 3 × 3 tensors of six components in the order of the config."""
    column = {name: number for number, name in enumerate(label.components)}
    full = np.empty((len(values), 3, 3))
    for name in TENSOR_COMPONENTS:
        i, j = ("xyz".index(axis) for axis in name)
        full[:, i, j] = full[:, j, i] = values[:, column[name]]
    return full


def _volumes(structures: Mapping[str, np.ndarray], present: np.ndarray, where: Where) -> np.ndarray:
    """Volume of each cell, Å³; NaN where there is no virial."""
    n = len(present)
    cells = structures.get("cell", np.zeros((n, 3, 3)))
    volumes = np.abs(np.linalg.det(cells))
    pbc = structures.get("pbc", np.zeros((n, 3), bool)).all(axis=1)
    without = present & ~pbc
    if without.any():
        raise SourceError(
            "a virial makes a stress only in a cell that is periodic along three vectors",
            where=where(int(np.argmax(without))),
            remedy="take stress out of the source, or put these structures into another source",
        )
    return np.where(present, volumes, np.nan)


def _refuse(
    quantity: Field,
    values: np.ndarray,
    present: np.ndarray,
    counts: np.ndarray,
    where: Where,
    *,
    nan_allowed: bool,
) -> None:
    """Raise for the first structure with a value that cannot be, if there is one."""
    bad = np.isinf(values) if nan_allowed else ~np.isfinite(values)
    rows = bad.reshape(len(values), -1).any(axis=1)
    owner = (
        np.repeat(np.arange(len(counts)), counts)
        if quantity.per == "atom"
        else np.arange(len(counts))
    )
    rows &= present[owner]
    if not rows.any():
        return
    row = int(np.argmax(rows))
    infinite = bool(np.isinf(values[row]).any())
    raise SourceError(
        f"{quantity.name} is {'infinite' if infinite else 'NaN'}",
        where=where(int(owner[row])),
        allowed="finite numbers",
        remedy="correct the file, or take the structure out of it"
        if infinite
        else 'correct the file, or, if NaN means that there is no label, add missing = "nan"',
    )
