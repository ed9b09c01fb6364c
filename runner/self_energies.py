"""The energies of the elements: fitted by least squares, certified, and subtracted in float64.

Nearly all of a total energy is the sum of its atoms' self-energies. What remains after they are
subtracted is small enough for a float32 network to learn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from ase.data import atomic_numbers as ATOMIC_NUMBER_OF
from ase.data import chemical_symbols
from jaxtyping import Bool, Float64, Int64, UInt8

from runner.config import SelfEnergiesConfig
from runner.errors import SelfEnergyError

ROW_SPACE_TOLERANCE = 1e-8  # of a composition's length: how much of it may lie outside
SMALLEST_SCALE = 1e-6  # eV; residuals below it are no more than what energies are written with
OUTLIER = 5.0  # scales of Huber's fit between a structure and the fit that make it an outlier
MOST_COMPOSITIONS = 20  # listed as fitted worst
MOST_OUTLIERS = 200  # listed by number


@dataclass(frozen=True)
class SelfEnergyFit:
    """Self-energies, and what is known of how well the data determines them.

    Attributes:
        method: fit, given, isolated_atoms or none.
        values: self-energy of each element, eV; with several levels of theory, of each element at
            each level, as `columns_by_level` names them.
        fit_method: least_squares or huber.
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
        determined: where there are such, the shortest combinations that the data does fix.
        worst_compositions: those whose mean energy is furthest off, with their formula, number of
            structures, mean residual and root mean square residual, eV.
        leave_one_composition_out: how far off the mean energy of a composition is when the fit has
            not seen it, eV (`rmse` over the compositions that the others determine, and how many
            those are; `not_determined` are the others).
        outliers: structures more than `OUTLIER` scales from the Huber fit, worst first, by their
            number among those fitted, with their residual, eV.
        n_outliers: how many there are; `outliers` lists the worst of them.
        row_space: orthonormal basis of the compositions that the fit covers, over `elements`.
        elements: symbols of all elements that have a value, the order of the columns.
    """

    method: str
    values: dict[str, float]
    fit_method: str | None = None
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
    determined: list[dict[str, int]] = field(default_factory=list)
    worst_compositions: list[dict[str, Any]] = field(default_factory=list)
    leave_one_composition_out: dict[str, Any] | None = None
    outliers: list[dict[str, Any]] = field(default_factory=list)
    n_outliers: int = 0
    row_space: list[list[float]] = field(default_factory=list)
    elements: list[str] = field(default_factory=list)

    def certificate(self) -> dict[str, Any]:
        """All but the values: the `fit` of a prepared dataset."""
        return {name: value for name, value in vars(self).items() if name != "values"}

    def of_level(self, level: str, levels: Sequence[str]) -> SelfEnergyFit:
        """The self-energies of one level of theory, by element, with what they cover."""
        if len(levels) == 1:
            return self
        mine = [number for number, s in enumerate(self.elements) if s.endswith(f" ({level})")]
        rows = np.array(self.row_space).reshape(-1, len(self.elements))[:, mine]
        _, singular, basis = np.linalg.svd(rows, full_matrices=False)  # blocks may be mixed in it
        return replace(
            self,
            values=values_of_level(self.values, level, levels),
            row_space=basis[singular > ROW_SPACE_TOLERANCE].tolist(),
            elements=[self.elements[number].partition(" ")[0] for number in mine],
        )

    def warning(self) -> str:
        """What an underdetermined fit is good for, in words; empty where it is determined."""
        if not self.undetermined:
            return ""
        combinations = "; ".join(in_words(combination) for combination in self.undetermined)
        fixed = ", ".join(in_words(combination) for combination in self.determined)
        free = _listed(sorted({symbol for c in self.undetermined for symbol in c}))
        return (
            f"the compositions determine {self.rank} of {self.n_elements} self-energies: the data "
            f"fixes {fixed}, not {free} by themselves. No energy changes if you add any multiple "
            f"of: {combinations}. The minimum-norm solution is used. It is exact for compositions "
            "that are combinations of those in the training split, and meaningless for others and "
            "for the elements by themselves."
        )


def in_words(combination: Mapping[str, int]) -> str:
    """`2 H − C` for {"H": 2, "C": −1}."""
    terms = [
        f"{'−' if n < 0 else '+'} {f'{abs(n)} ' if abs(n) != 1 else ''}{symbol}"
        for symbol, n in combination.items()
    ]
    return " ".join(terms).removeprefix("+ ")


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


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


def distinct_compositions(
    composition: Int64[np.ndarray, "n_structures n_elements"],
) -> tuple[
    Int64[np.ndarray, "n_compositions n_elements"],
    Int64[np.ndarray, " n_structures"],
    Int64[np.ndarray, " n_compositions"],
]:
    """The compositions that occur, in order, which of them each structure has, and how often each
    occurs: `np.unique` over rows, many times as fast."""
    width = composition.shape[1]
    mixed = np.random.default_rng(0).integers(1 << 62, size=width) * 2 + 1
    keys = composition @ mixed  # wraps round: a number for each row, as good as different
    _, first, owner = np.unique(keys, return_index=True, return_inverse=True)
    rows, owner = composition[first], owner.ravel()
    if not np.array_equal(rows[owner], composition):  # two rows had one number after all
        rows, owner = np.unique(composition, axis=0, return_inverse=True)
        return rows, owner.ravel(), np.bincount(owner.ravel(), minlength=len(rows))
    order = np.lexsort(rows.T[::-1]) if width else np.arange(len(rows))
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    owner = place[owner]
    return rows[order], owner, np.bincount(owner, minlength=len(rows))


def formulas(
    elements: Sequence[str], composition: Int64[np.ndarray, "n_structures n_elements"]
) -> list[str]:
    """`C2H6O`: in Hill's order, C and H first where there is C, else by the alphabet."""
    rows, inverse, _ = distinct_compositions(composition)
    names = []
    for row in rows:
        counts = {s: n for s, n in zip(elements, row.tolist(), strict=True) if n}
        first = ("C", "H") if "C" in counts else ()
        order = sorted(counts, key=lambda s: (first.index(s) if s in first else len(first), s))
        names.append("".join(f"{s}{counts[s] if counts[s] > 1 else ''}" for s in order))
    return [names[index] for index in inverse.tolist()]


def columns_by_level(
    elements: Sequence[str],
    composition: Int64[np.ndarray, "n_structures n_elements"],
    level: Int64[np.ndarray, " n_structures"],
    levels: Sequence[str],
) -> tuple[list[str], Int64[np.ndarray, "n_structures n_columns"]]:
    """The block system in which every level of theory has self-energies of its own.

    Args:
        elements: symbols, in the order of the columns of `composition`.
        composition: atoms of each element in each structure.
        level: number of each structure's level of theory.
        levels: their names.

    Returns:
        Names of the columns, the symbols where there is one level and `C (name)` where there are
        several, and the composition over them: zero in the columns of other levels.
    """
    if len(levels) == 1:
        return list(elements), composition
    blocks = [composition * (level == number)[:, None] for number in range(len(levels))]
    wide = np.concatenate(blocks, axis=1)
    columns = [f"{symbol} ({name})" for name in levels for symbol in elements]
    seen = np.any(wide, axis=0).tolist()
    return [name for name, here in zip(columns, seen, strict=True) if here], wide[:, seen]


def values_by_column(
    by_level: Mapping[str, Mapping[str, float]], levels: Sequence[str]
) -> dict[str, float]:
    """Given self-energies by the names of `columns_by_level`."""
    if len(levels) == 1:
        return {symbol: e for values in by_level.values() for symbol, e in values.items()}
    return {f"{s} ({level})": e for level, values in by_level.items() for s, e in values.items()}


def values_of_level(
    values: Mapping[str, float], level: str, levels: Sequence[str]
) -> dict[str, float]:
    """Self-energies of one level of theory by element, from those by column."""
    if len(levels) == 1:
        return dict(values)
    end = f" ({level})"
    return {column.removesuffix(end): e for column, e in values.items() if column.endswith(end)}


def isolated_atoms(
    composition: Int64[np.ndarray, "n_structures n_columns"],
    energies: Float64[np.ndarray, " n_structures"],
    columns: Sequence[str],
) -> dict[str, float]:
    """Lowest energy of each column's structures of one atom, eV.

    Of several states of an atom (other spins, other fields) the lowest is its ground state.
    """
    single = (composition.sum(axis=1) == 1) & np.isfinite(energies)
    which = composition[single].argmax(axis=1)
    return {
        name: float(energies[single][which == column].min())
        for column, name in enumerate(columns)
        if (which == column).any()
    }


def determine_self_energies(
    config: SelfEnergiesConfig,
    composition: Int64[np.ndarray, "n_structures n_elements"],
    energies: Float64[np.ndarray, " n_structures"],
    elements: Sequence[str],
    levels: Sequence[str] = ("",),
    atoms: Mapping[str, float] | None = None,
) -> SelfEnergyFit:
    """Self-energies by the method of the config, from the training split's structures.

    Args:
        config: method, and given values.
        composition: atoms of each element in each structure.
        energies: total energies, eV; NaN where a structure has none.
        elements: symbols, or names of `columns_by_level`, in the order of the columns.
        levels: names of the levels of theory.
        atoms: energies of isolated atoms, by column.

    Raises:
        SelfEnergyError: an element without a value, no energies to fit, or, if the config asks
            for it, compositions that do not determine all elements.
    """
    given = values_by_column(config.values_by_level, levels)
    for symbol in given:
        if symbol.partition(" ")[0] not in ATOMIC_NUMBER_OF or symbol == "X":
            raise SelfEnergyError(
                f'"{symbol}" is not an element', where="prepare.self_energies.values"
            )
    if config.method == "none":
        return SelfEnergyFit("none", dict.fromkeys(elements, 0.0), elements=list(elements))
    if config.method == "given":
        return _given(given, elements)
    if config.method == "isolated_atoms":
        return _from_atoms(given | dict(atoms or {}), elements)
    known = np.isfinite(energies)
    epsilon = config.huber_epsilon if config.fit_method == "huber" else None
    fit = fit_self_energies(composition[known], energies[known], elements, given, epsilon)
    fit = replace(
        fit,
        outliers=[o | {"index": int(np.flatnonzero(known)[o["index"]])} for o in fit.outliers],
    )
    if fit.undetermined and config.if_underdetermined == "error":
        raise SelfEnergyError(
            fit.warning(),
            where="prepare.self_energies.if_underdetermined",
            remedy="give values for some elements, bring structures of other compositions into "
            'the training split, or write if_underdetermined = "minimum_norm"',
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


def _from_atoms(values: Mapping[str, float], elements: Sequence[str]) -> SelfEnergyFit:
    missing = [symbol for symbol in elements if symbol not in values]
    if missing:
        raise SelfEnergyError(
            f"there is no structure of one neutral atom, with an energy, of {', '.join(missing)}",
            where="prepare.self_energies",
            remedy="add a source with the isolated atoms, give the missing ones in values, or "
            'write method = "fit"',
        )
    return SelfEnergyFit("isolated_atoms", dict(values), elements=list(values))


def fit_self_energies(
    composition: Int64[np.ndarray, "n_structures n_elements"],
    energies: Float64[np.ndarray, " n_structures"],
    elements: Sequence[str],
    given: Mapping[str, float] | None = None,
    huber_epsilon: float | None = None,
) -> SelfEnergyFit:
    r"""Fit one self-energy per element by ordinary least squares, or by Huber's regression.

    Minimises :math:`\sum_s (E_s - \sum_Z n_{sZ}\,\varepsilon_Z)^2`, float64 throughout. Structures
    of one composition share a row of the design matrix: the fit over them equals the fit over the
    distinct compositions with their mean energies, weighted by their counts. Where compositions
    cannot tell elements apart, the solution of minimum norm is taken.

    With `huber_epsilon` the squares are replaced by Huber's function of the residual over a scale
    that is fitted with it, which needs all structures rather than the distinct compositions.

    Args:
        composition: atoms of each element in each structure.
        energies: total energies, eV.
        elements: symbols, in the order of the columns.
        given: self-energies that stay as they are, eV; the others are fitted.
        huber_epsilon: residual, in units of the scale, from which Huber's function is linear.

    Returns:
        Self-energies with the rank, the condition number and the uncertainty of the fit.

    Raises:
        SelfEnergyError: no structure has an energy, or an element is in none that has.

    Source:
        Huber, Ann. Math. Stat. 35, 73 (1964), doi:10.1214/aoms/1177703732; standard errors of the
        robust fit: Huber & Ronchetti, Robust Statistics (2009), eq. 7.81.
    """
    given = dict(given or {})
    _check_seen(composition, elements, given)
    fitted = [column for column, symbol in enumerate(elements) if symbol not in given]
    offsets = np.array([given.get(symbol, 0.0) for symbol in elements])
    targets = energies - composition @ offsets
    seen = composition[:, fitted]
    rows, means, weights, scatter = _distinct(seen, targets)
    solution = _least_squares(rows, means, weights)
    singular, basis = _row_space(rows, weights)
    rank, n = len(singular), len(energies)
    robust = None
    if huber_epsilon is not None and rank:
        robust = _huber(seen, targets, basis, huber_epsilon)
        solution = robust.solution
    residual = scatter + float(weights @ (means - rows @ solution) ** 2)
    variance = residual / (n - rank) if n > rank else np.nan
    if robust is not None:
        variance = robust.variance
    symbols = [elements[column] for column in fitted]
    errors = _standard_errors(rows, weights, variance)
    free = [symbol for symbol in given if symbol not in elements]
    values = given | {s: float(e) for s, e in zip(symbols, solution, strict=True)}
    underdetermined = rank < len(fitted)
    return SelfEnergyFit(
        method="fit",
        fit_method="least_squares" if huber_epsilon is None else "huber",
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
        undetermined=_null_space(rows, symbols) if underdetermined else [],
        determined=_fixed_combinations(rows, symbols) if underdetermined else [],
        worst_compositions=_worst_compositions(
            composition, targets - composition[:, fitted] @ solution, elements
        ),
        leave_one_composition_out=_leave_one_out(rows, means, weights),
        outliers=[] if robust is None else robust.outliers[:MOST_OUTLIERS],
        n_outliers=0 if robust is None else len(robust.outliers),
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
    rows, owner, counts = distinct_compositions(composition)
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


@dataclass(frozen=True)
class _Robust:
    """Huber's fit: its solution, eV; the variance of a residual that stands for it in the standard
    errors, eV²; the outliers, worst first."""

    solution: np.ndarray
    variance: float
    outliers: list[dict[str, Any]]


def _huber(
    composition: np.ndarray, targets: np.ndarray, basis: np.ndarray, epsilon: float
) -> _Robust:
    """Huber's regression over structures, in an orthonormal basis of the row space.

    That makes the problem well conditioned, and its solution the one of minimum norm. It starts
    from the fit to the medians of the compositions, which outliers do not move.
    """
    from sklearn.linear_model import HuberRegressor  # late: it takes a second

    rows, owner, counts = distinct_compositions(composition)
    order = np.lexsort((targets, owner))
    starts = np.cumsum(counts) - counts
    low, high = order[starts + (counts - 1) // 2], order[starts + counts // 2]
    medians = targets[low] / 2 + targets[high] / 2
    start = _least_squares(rows.astype(np.float64), medians, counts.astype(np.float64))
    start = basis.T @ (basis @ start)
    left = targets - composition @ start
    scale = max(float(np.median(np.abs(left))) / 0.6745, SMALLEST_SCALE)
    _, singular, turn = np.linalg.svd(
        (rows @ basis.T) * np.sqrt(counts / len(targets))[:, None], full_matrices=False
    )
    coordinates = composition @ (basis.T @ turn.T / singular)
    model = HuberRegressor(
        epsilon=epsilon, alpha=0.0, fit_intercept=False, max_iter=10_000, tol=1e-8
    ).fit(coordinates, left / scale)
    solution = start + scale * (basis.T @ (turn.T @ (model.coef_ / singular)))
    residual = targets - composition @ solution
    s = scale * float(model.scale_)
    inside = np.abs(residual) <= epsilon * s
    psi = np.clip(residual, -epsilon * s, epsilon * s)
    n, rank = len(targets), len(basis)
    share = max(float(inside.mean()), 1 / n)
    variance = float(psi @ psi) / (n - rank) / share**2 if n > rank else np.nan
    far = np.abs(residual) > OUTLIER * s
    worst = np.flatnonzero(far)[np.argsort(-np.abs(residual[far]), kind="stable")]
    outliers = [{"index": int(i), "residual": float(residual[i])} for i in worst]
    return _Robust(solution, variance, outliers)


def _leave_one_out(rows: np.ndarray, means: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    """Least squares without one composition, at that composition, for each of them.

    With the leverage h of a composition the residual that it has when it is left out is
    r / (1 − h); where h is 1 no other composition determines it.
    """
    scaled = rows * np.sqrt(weights)[:, None]
    residual = means - rows @ _least_squares(rows, means, weights)
    basis = np.linalg.svd(scaled, full_matrices=False)[0][:, : len(_row_space(rows, weights)[0])]
    leverage = np.sum(basis**2, axis=1)
    apart = leverage < 1 - ROW_SPACE_TOLERANCE
    left_out = residual[apart] / (1 - leverage[apart])
    return {
        "rmse": float(np.sqrt(np.mean(left_out**2))) if apart.any() else None,
        "n_compositions": int(apart.sum()),
        "not_determined": int((~apart).sum()),
    }


def _worst_compositions(
    composition: np.ndarray, residual: np.ndarray, columns: Sequence[str]
) -> list[dict[str, Any]]:
    """The compositions whose mean energy is furthest off, at most `MOST_COMPOSITIONS`."""
    rows, owner, counts = distinct_compositions(composition)
    mean = np.bincount(owner, residual) / counts
    rms = np.sqrt(np.bincount(owner, residual**2) / counts)
    worst = np.argsort(-np.abs(mean), kind="stable")[:MOST_COMPOSITIONS]
    return [
        {
            "formula": name,
            "n_structures": int(counts[index]),
            "mean_residual": float(mean[index]),
            "rms_residual": float(rms[index]),
        }
        for index, name in zip(worst, formulas_of_columns(columns, rows[worst]), strict=True)
    ]


def formulas_of_columns(columns: Sequence[str], rows: np.ndarray) -> list[str]:
    """`C2H6O (level)`, from columns such as `C (level)`, as `columns_by_level` names them."""
    level = [column.partition(" ")[2] for column in columns]
    symbols = [column.partition(" ")[0] for column in columns]
    names = []
    for row in rows:
        here = np.flatnonzero(row)
        name = formulas([symbols[i] for i in here], row[None, here])[0]
        names.append(f"{name} {level[here[0]]}".strip())
    return names


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


def _fixed_combinations(rows: np.ndarray, symbols: Sequence[str]) -> list[dict[str, int]]:
    """Short integer combinations of elements that span all that the compositions fix.

    A reduced basis (Lenstra, Lenstra & Lovász 1982) of the lattice of a spanning set of them.
    """
    from sympy.polys.domains import ZZ  # late: it takes half a second, and is seldom needed
    from sympy.polys.matrices import DomainMatrix

    independent = _independent_rows(rows).astype(int)
    matrix = DomainMatrix(
        [[ZZ(n) for n in row] for row in independent.tolist()], independent.shape, ZZ
    )
    short = np.array([[int(n) for n in row] for row in matrix.lll().to_list()])
    for index in range(len(short)):
        short[index] = _as_atoms(short, index)
    combinations = []
    for row in short:
        integers = row // np.gcd.reduce(row)
        combinations.append({s: int(n) for s, n in zip(symbols, integers, strict=True) if n})
    return combinations


def _as_atoms(vectors: np.ndarray, index: int) -> np.ndarray:
    """One of some vectors plus few times the others, so that it counts atoms, if there is a way:
    2 H + C says more to a chemist than C − O."""
    others = np.delete(vectors, index, axis=0)
    choices: np.ndarray = vectors[index][None] * np.array([[1], [-1]])
    if 0 < len(others) <= 4:
        grid = np.meshgrid(*[np.arange(-2, 3)] * len(others))
        steps = np.stack(grid, axis=-1).reshape(-1, len(others))
        choices = (choices[:, None] + (steps @ others)[None]).reshape(-1, vectors.shape[1])
    counts = choices[(choices >= 0).all(axis=1)]
    if len(counts) == 0:
        counts = vectors[index][None] * (1 if vectors[index].sum() >= 0 else -1)
    fewest: np.ndarray = counts[np.argmin(counts.sum(axis=1))]
    return fewest


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
