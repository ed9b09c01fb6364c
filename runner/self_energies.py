"""The energies of the elements: fitted by least squares, certified, and subtracted in float64.

Nearly all of a total energy is the sum of its atoms' self-energies. What remains after they are
subtracted is small enough for a float32 network to learn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ase.data import atomic_numbers as ATOMIC_NUMBER_OF
from ase.data import chemical_symbols
from jaxtyping import Bool, Float64, Int64, UInt8

from runner.config import SelfEnergiesConfig
from runner.errors import SelfEnergyError

ROW_SPACE_TOLERANCE = 1e-8  # of a composition's length: how much of it may lie outside


@dataclass(frozen=True)
class SelfEnergyFit:
    """Self-energies, and what is known of how well the data determines them.

    Attributes:
        method: fit, given or none.
        values: self-energy of each element, eV.
        n_structures: structures with an energy that the fit saw.
        n_compositions: distinct compositions among them.
        rank: of their composition matrix, over the elements that were fitted.
        n_elements: elements that were fitted.
        condition_number: largest over smallest non-zero singular value of the weighted matrix.
        rmse_before: spread of the energy about its mean, eV.
        rmse_after: root mean square of what the self-energies leave, eV.
        standard_errors: of each fitted element, eV; None where the data does not determine it.
        counts: atoms of each element that the fit saw.
        undetermined: combinations that may be added to the self-energies without changing the
            energy of any composition that was seen: {symbol: coefficient} each.
        row_space: orthonormal basis of the compositions that the fit covers, over `elements`.
        elements: symbols of all elements that have a value, the order of the columns.
    """

    method: str
    values: dict[str, float]
    n_structures: int = 0
    n_compositions: int = 0
    rank: int = 0
    n_elements: int = 0
    condition_number: float | None = None
    rmse_before: float | None = None
    rmse_after: float | None = None
    standard_errors: dict[str, float | None] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    undetermined: list[dict[str, int]] = field(default_factory=list)
    row_space: list[list[float]] = field(default_factory=list)
    elements: list[str] = field(default_factory=list)

    def certificate(self) -> dict[str, Any]:
        """All but the values: the `fit` of a prepared dataset."""
        return {name: value for name, value in vars(self).items() if name != "values"}

    def warning(self) -> str:
        """What an underdetermined fit is good for, in words; empty where it is determined."""
        if not self.undetermined:
            return ""
        combinations = "; ".join(in_words(combination) for combination in self.undetermined)
        return (
            f"the compositions determine {self.rank} of {self.n_elements} self-energies. They do "
            f"not change if you add any multiple of: {combinations}. The minimum-norm solution is "
            "used. It is exact for compositions that are combinations of those in the training "
            "split, and meaningless for others and for the elements by themselves."
        )


def in_words(combination: Mapping[str, int]) -> str:
    """`2 H − 1 C` for {"H": 2, "C": −1}."""
    terms = [f"{'−' if n < 0 else '+'} {abs(n)} {symbol}" for symbol, n in combination.items()]
    return " ".join(terms).removeprefix("+ ")


def compositions(
    first_atom: Int64[np.ndarray, " n_structures_plus_1"],
    atomic_numbers: UInt8[np.ndarray, " n_atoms"],
) -> tuple[list[str], Int64[np.ndarray, "n_structures n_elements"]]:
    """The elements that occur, by atomic number, and how many atoms of each a structure has."""
    numbers, column = np.unique(atomic_numbers, return_inverse=True)
    n_structures = len(first_atom) - 1
    row = np.repeat(np.arange(n_structures), np.diff(first_atom))
    flat = np.bincount(row * len(numbers) + column, minlength=n_structures * len(numbers))
    symbols = [str(chemical_symbols[number]) for number in numbers]
    return symbols, flat.reshape(n_structures, len(numbers)).astype(np.int64)


def formulas(
    elements: Sequence[str], composition: Int64[np.ndarray, "n_structures n_elements"]
) -> list[str]:
    """`C2H6O`: in Hill's order, C and H first where there is C, else by the alphabet."""
    rows, inverse = np.unique(composition, axis=0, return_inverse=True)
    names = []
    for row in rows:
        counts = {s: n for s, n in zip(elements, row.tolist(), strict=True) if n}
        first = ("C", "H") if "C" in counts else ()
        order = sorted(counts, key=lambda s: (first.index(s) if s in first else len(first), s))
        names.append("".join(f"{s}{counts[s] if counts[s] > 1 else ''}" for s in order))
    return [names[index] for index in inverse.ravel()]


def determine_self_energies(
    config: SelfEnergiesConfig,
    composition: Int64[np.ndarray, "n_structures n_elements"],
    energies: Float64[np.ndarray, " n_structures"],
    elements: Sequence[str],
) -> SelfEnergyFit:
    """Self-energies by the method of the config, from the training split's structures.

    Args:
        config: method, and given values.
        composition: atoms of each element in each structure.
        energies: total energies, eV; NaN where a structure has none.
        elements: symbols, in the order of the columns.

    Raises:
        SelfEnergyError: an element without a value, no energies to fit, or, if the config asks
            for it, compositions that do not determine all elements.
    """
    for symbol in config.values:
        if symbol not in ATOMIC_NUMBER_OF or symbol == "X":
            raise SelfEnergyError(
                f'"{symbol}" is not an element', where="prepare.self_energies.values"
            )
    if config.method == "none":
        return SelfEnergyFit("none", dict.fromkeys(elements, 0.0), elements=list(elements))
    if config.method == "given":
        return _given(config.values, elements)
    known = np.isfinite(energies)
    fit = fit_self_energies(composition[known], energies[known], elements, given=config.values)
    if fit.undetermined and config.if_underdetermined == "error":
        raise SelfEnergyError(
            fit.warning(),
            where="prepare.self_energies",
            remedy="give values for some elements, add other compositions (free atoms help), or "
            'write if_underdetermined = "minimum_norm"',
        )
    return fit


def _given(values: Mapping[str, float], elements: Sequence[str]) -> SelfEnergyFit:
    missing = [symbol for symbol in elements if symbol not in values]
    if missing:
        raise SelfEnergyError(
            f"no self-energy is given for {', '.join(missing)}",
            where="prepare.self_energies.values",
            remedy='give them all, or write method = "fit" to have the others fitted',
        )
    return SelfEnergyFit("given", dict(values), elements=list(values))


def fit_self_energies(
    composition: Int64[np.ndarray, "n_structures n_elements"],
    energies: Float64[np.ndarray, " n_structures"],
    elements: Sequence[str],
    given: Mapping[str, float] | None = None,
) -> SelfEnergyFit:
    r"""Fit one self-energy per element by ordinary least squares.

    Minimises :math:`\sum_s (E_s - \sum_Z n_{sZ}\,\varepsilon_Z)^2`, float64 throughout. Structures
    of one composition share a row of the design matrix: the fit over them equals the fit over the
    distinct compositions with their mean energies, weighted by their counts. Where compositions
    cannot tell elements apart, the solution of minimum norm is taken.

    Args:
        composition: atoms of each element in each structure.
        energies: total energies, eV.
        elements: symbols, in the order of the columns.
        given: self-energies that stay as they are, eV; the others are fitted.

    Returns:
        Self-energies with the rank, the condition number and the uncertainty of the fit.

    Raises:
        SelfEnergyError: no structure has an energy, or an element is in none that has.
    """
    given = dict(given or {})
    _check_seen(composition, elements, given)
    fitted = [column for column, symbol in enumerate(elements) if symbol not in given]
    offsets = np.array([given.get(symbol, 0.0) for symbol in elements])
    targets = energies - composition @ offsets
    rows, means, weights, scatter = _distinct(composition[:, fitted], targets)
    solution = _least_squares(rows, means, weights)
    residual = scatter + float(weights @ (means - rows @ solution) ** 2)
    singular, basis = _row_space(rows, weights)
    rank, n = len(singular), len(energies)
    symbols = [elements[column] for column in fitted]
    errors = _standard_errors(rows, weights, residual / (n - rank) if n > rank else np.nan)
    free = [symbol for symbol in given if symbol not in elements]
    values = given | {s: float(e) for s, e in zip(symbols, solution, strict=True)}
    return SelfEnergyFit(
        method="fit",
        values={symbol: values[symbol] for symbol in [*elements, *free]},
        n_structures=n,
        n_compositions=len(rows),
        rank=rank,
        n_elements=len(fitted),
        condition_number=float(singular[0] / singular[-1]) if rank else None,
        rmse_before=float(np.std(energies)),
        rmse_after=float(np.sqrt(residual / n)),
        standard_errors={s: errors[i] for i, s in enumerate(symbols)},
        counts={s: int(composition[:, c].sum()) for c, s in enumerate(elements)},
        undetermined=_null_space(rows, symbols) if rank < len(fitted) else [],
        row_space=_embedded(basis, fitted, [s in given for s in elements], len(free)),
        elements=[*elements, *free],
    )


def _check_seen(
    composition: np.ndarray, elements: Sequence[str], given: Mapping[str, float]
) -> None:
    if len(composition) == 0:
        raise SelfEnergyError(
            "no structure of the training split has an energy, so there is nothing to fit",
            where="prepare.self_energies",
            remedy='give values, or write method = "none"',
        )
    unseen = [
        symbol
        for symbol, count in zip(elements, composition.sum(axis=0), strict=True)
        if count == 0 and symbol not in given
    ]
    if unseen:
        raise SelfEnergyError(
            f"{', '.join(unseen)}: no structure of the training split that has an energy has "
            "this element",
            where="prepare.self_energies",
            remedy="give its value, or bring structures that have it into the training split",
        )


def _distinct(
    composition: np.ndarray, energies: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Distinct compositions, their mean energies and counts, and the scatter about the means."""
    rows, owner, counts = np.unique(composition, axis=0, return_inverse=True, return_counts=True)
    owner = owner.ravel()
    reference = np.zeros(len(rows))
    reference[owner] = energies  # any member: differences to it are small, sums stay exact
    means = reference + np.bincount(owner, energies - reference[owner]) / counts
    scatter = float(np.sum((energies - means[owner]) ** 2))
    return rows.astype(np.float64), means, counts.astype(np.float64), scatter


def _least_squares(rows: np.ndarray, means: np.ndarray, weights: np.ndarray) -> np.ndarray:
    from sklearn.linear_model import LinearRegression  # late: it takes a second

    if rows.shape[1] == 0:
        return np.zeros(0)
    model = LinearRegression(fit_intercept=False).fit(rows, means, sample_weight=weights)
    return np.asarray(model.coef_, np.float64)


def _row_space(rows: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Non-zero singular values of the weighted matrix, and an orthonormal basis of its rows."""
    _, singular, basis = np.linalg.svd(rows * np.sqrt(weights)[:, None], full_matrices=False)
    threshold = singular.max(initial=0.0) * max(rows.shape) * np.finfo(np.float64).eps
    rank = int(np.sum(singular > threshold))
    return singular[:rank], basis[:rank]


def _standard_errors(rows: np.ndarray, weights: np.ndarray, variance: float) -> list[float | None]:
    """√(σ² (XᵀX)⁺)_ZZ, None for an element that the rows do not determine."""
    inverse = np.linalg.pinv(rows.T @ (rows * weights[:, None]), hermitian=True)
    _, basis = _row_space(rows, weights)
    inside = np.sum(basis**2, axis=0) > 1 - ROW_SPACE_TOLERANCE
    errors = np.sqrt(variance * np.diag(inverse))
    return [
        float(error) if ok and np.isfinite(error) else None
        for error, ok in zip(errors, inside, strict=True)
    ]


def _null_space(rows: np.ndarray, symbols: Sequence[str]) -> list[dict[str, int]]:
    """Integer combinations of elements that no composition can see, exactly."""
    import sympy  # late: it takes half a second, and is seldom needed

    independent = _independent_rows(rows)
    vectors = sympy.Matrix(independent.astype(int).tolist()).nullspace()
    combinations = []
    for vector in vectors:
        scale = sympy.ilcm(*[entry.q for entry in vector])
        integers = [int(entry * scale) for entry in vector]
        sign = next(1 if n > 0 else -1 for n in integers if n)
        combinations.append({s: sign * n for s, n in zip(symbols, integers, strict=True) if n})
    return combinations


def _independent_rows(rows: np.ndarray) -> np.ndarray:
    """As many rows as the rank, which span the same space."""
    chosen: list[int] = []
    for index in range(len(rows)):
        if np.linalg.matrix_rank(rows[[*chosen, index]]) > len(chosen):
            chosen.append(index)
    return rows[chosen]


def _embedded(
    basis: np.ndarray, fitted: Sequence[int], is_given: Sequence[bool], n_free: int
) -> list[list[float]]:
    """The row space over all elements: a given element is covered by itself."""
    width = len(is_given) + n_free
    covered = np.zeros((len(basis), width))
    covered[:, fitted] = basis
    by_itself = np.eye(width)[[*np.flatnonzero(is_given), *range(len(is_given), width)]]
    return np.concatenate([covered, by_itself]).tolist()  # type: ignore[no-any-return]


def uncovered(
    fit: SelfEnergyFit,
    elements: Sequence[str],
    composition: Int64[np.ndarray, "n_structures n_elements"],
) -> Bool[np.ndarray, " n_structures"]:
    """Which compositions the self-energies say nothing about.

    Args:
        fit: the self-energies.
        elements: symbols, in the order of the columns; one that has no value is uncovered.
        composition: atoms of each element in each structure.
    """
    known = np.array([symbol in fit.values for symbol in elements], bool)
    unknown_element: np.ndarray = np.any(composition[:, ~known], axis=1)
    if fit.method != "fit":
        return unknown_element
    column = {symbol: number for number, symbol in enumerate(fit.elements)}
    wide = np.zeros((len(composition), len(fit.elements)))
    for number, symbol in enumerate(elements):
        if symbol in column:
            wide[:, column[symbol]] = composition[:, number]
    basis = np.array(fit.row_space).reshape(-1, len(fit.elements))
    outside = np.linalg.norm(wide - wide @ basis.T @ basis, axis=1)
    lengths = np.maximum(np.linalg.norm(wide, axis=1), 1.0)
    result: np.ndarray = np.logical_or(unknown_element, outside > ROW_SPACE_TOLERANCE * lengths)
    return result


def check_covered(
    fit: SelfEnergyFit,
    elements: Sequence[str],
    composition: Int64[np.ndarray, "n_structures n_elements"],
    where: Callable[[int], str],
) -> None:
    """Refuse a composition that the self-energies say nothing about.

    Args:
        fit: the self-energies.
        elements: symbols, in the order of the columns.
        composition: atoms of each element in each structure.
        where: names a structure by its number.

    Raises:
        SelfEnergyError: names the first such structure, and its element or composition.
    """
    bad = uncovered(fit, elements, composition)
    if not bad.any():
        return
    first = int(np.argmax(bad))
    row = composition[first]
    unknown = [s for s, n in zip(elements, row, strict=True) if n and s not in fit.values]
    formula = formulas(elements, row[None])[0]
    if unknown:
        raise SelfEnergyError(
            f"{', '.join(unknown)} in {formula}: the training split never had this element, so "
            "there is no self-energy for it",
            where=where(first),
            allowed=", ".join(fit.values),
            remedy="bring structures with it into the training split, or give its value in "
            "prepare.self_energies.values",
        )
    raise SelfEnergyError(
        f"{formula} is no combination of the compositions in the training split, which do not "
        f"determine the self-energies by themselves (rank {fit.rank} of {fit.n_elements})",
        where=where(first),
        remedy="bring this composition into the training split, or give values for some elements "
        "in prepare.self_energies.values",
    )


def sum_of_self_energies(
    values: Mapping[str, float],
    elements: Sequence[str],
    composition: Int64[np.ndarray, "n_structures n_elements"],
) -> Float64[np.ndarray, " n_structures"]:
    """Σ_Z n_Z ε_Z of each structure, eV, in float64."""
    total: np.ndarray = composition @ np.array([values[symbol] for symbol in elements])
    return total
