"""What every reader does with its raw numbers: check them, convert them, mark what is missing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from ase.data import atomic_numbers as ATOMIC_NUMBER_OF
from jaxtyping import Bool, Float64, Int64, UInt8

from runner.config import LabelConfig
from runner.errors import SourceError
from runner.fields import Field

Where = Callable[[int], str]
"""Names a structure of the chunk at hand, for an error."""


def converted(
    quantity: Field,
    label: LabelConfig,
    values: Float64[np.ndarray, "n_rows ..."],
    present: Bool[np.ndarray, " n_structures"],
    counts: Int64[np.ndarray, " n_structures"],
    where: Where,
) -> Float64[np.ndarray, "n_rows ..."]:
    """Values of one label in the program's unit; NaN where a structure has none.

    Args:
        quantity: the label.
        label: key, unit and meaning of NaN in the source.
        values: as they stand in the file, a row a structure or an atom.
        present: whether a structure has the label at all; rows of others are NaN.
        counts: atoms of each structure.
        where: names a structure.

    Raises:
        SourceError: an infinite value, or a NaN that is not declared to mean "missing".
    """
    with np.errstate(over="ignore"):  # what becomes too large is refused as infinite
        values = values * label.factor(quantity)
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
    places, times = np.unique(np.column_stack([owner, positions]), axis=0, return_counts=True)
    if (times > 1).any():
        first = int(places[np.argmax(times > 1), 0])
        raise SourceError("two atoms are at the same place", where=where(first))


def elements_of(
    symbols: np.ndarray, counts: Int64[np.ndarray, " n_structures"], where: Where
) -> UInt8[np.ndarray, " n_atoms"]:
    """Atomic numbers of chemical symbols.

    Raises:
        SourceError: a symbol that is no element.
    """
    distinct, inverse = np.unique(symbols, return_inverse=True)
    numbers = np.array([ATOMIC_NUMBER_OF.get(str(symbol), 0) for symbol in distinct], np.uint8)
    result: np.ndarray = numbers[inverse]
    if not result.all():
        row = int(np.argmin(result))
        raise SourceError(
            f'"{symbols[row]}" is not an element',
            where=where(int(np.repeat(np.arange(len(counts)), counts)[row])),
            allowed="chemical symbols such as H, C, Cl",
        )
    return result


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
