"""The fit against numpy and planted answers; every entry of the certificate recomputed naïvely."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from runner import sources
from runner.config import SelfEnergiesConfig, SourceConfig
from runner.errors import SelfEnergyError
from runner.self_energies import (
    check_covered,
    columns_by_level,
    compositions,
    determine_self_energies,
    distinct_compositions,
    fit_self_energies,
    formulas,
    in_words,
    isolated_atoms,
    sum_of_self_energies,
    uncovered,
    values_of_level,
)

ELEMENTS = ["H", "C", "N", "O", "Br"]
PLANTED = np.array([-13.6, -1029.8, -1485.3, -2042.6, -70045.3])


def _data(noise: float, n: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    distinct = rng.integers(0, 6, size=(40, 5)) + (np.arange(5) == 0)
    composition = distinct[rng.integers(0, 40, n)]
    return composition, composition @ PLANTED + rng.normal(scale=noise, size=n)


def _values(fit: object) -> np.ndarray:
    return np.array(list(fit.values.values()))  # type: ignore[attr-defined]


def test_planted_self_energies_are_recovered_each_with_its_element() -> None:
    composition, energies = _data(noise=0.0)
    fit = fit_self_energies(composition, energies, ELEMENTS)
    assert list(fit.values) == ELEMENTS
    assert _values(fit) == pytest.approx(PLANTED, abs=1e-8)


def test_the_order_of_the_columns_does_not_matter() -> None:
    composition, energies = _data(noise=0.5)
    order = [4, 1, 3, 0, 2]
    shuffled = fit_self_energies(composition[:, order], energies, [ELEMENTS[i] for i in order])
    assert shuffled.values == pytest.approx(
        fit_self_energies(composition, energies, ELEMENTS).values, abs=1e-8
    )


def test_equal_to_least_squares_over_all_structures() -> None:
    composition, energies = _data(noise=2.0)
    expected = np.linalg.lstsq(composition.astype(float), energies, rcond=None)[0]
    assert _values(fit_self_energies(composition, energies, ELEMENTS)) == pytest.approx(
        expected, abs=1e-8
    )


def test_the_certificate_equals_the_textbook_over_all_structures() -> None:
    composition, energies = _data(noise=2.0)
    fit = fit_self_energies(composition, energies, ELEMENTS)
    x, n = composition.astype(float), len(energies)
    residual = energies - x @ np.linalg.lstsq(x, energies, rcond=None)[0]
    variance = residual @ residual / (n - 5)
    errors = np.sqrt(variance * np.diag(np.linalg.inv(x.T @ x)))
    assert list(fit.standard_errors.values()) == pytest.approx(list(errors), rel=1e-9)
    assert (fit.rank, fit.n_elements, fit.n_structures) == (5, 5, n)
    assert fit.n_compositions == len({tuple(row) for row in composition})
    assert fit.condition_number == pytest.approx(np.linalg.cond(x), rel=1e-9)
    assert fit.rmse_before == pytest.approx(np.std(energies), rel=1e-12)
    assert fit.rmse_after == pytest.approx(np.sqrt(np.mean(residual**2)), rel=1e-9)
    assert fit.counts == dict(zip(ELEMENTS, composition.sum(axis=0).tolist(), strict=True))
    assert fit.undetermined == []
    assert fit.warning() == ""


def test_standard_errors_are_the_spread_over_repeated_data() -> None:
    composition, _ = _data(noise=0.0)
    rng = np.random.default_rng(1)
    fits = [
        fit_self_energies(composition, composition @ PLANTED + rng.normal(size=400), ELEMENTS)
        for _ in range(300)
    ]
    spread = np.std([_values(fit) for fit in fits], axis=0)
    assert list(fits[0].standard_errors.values()) == pytest.approx(list(spread), rel=0.2)


def test_what_the_data_cannot_tell_apart_is_said() -> None:
    composition = np.array([[6, 2, 1], [4, 1, 1], [6, 2, 1]])  # ethanol and methanol
    energies = composition @ np.array([-13.6, -1030.0, -2043.0]) + np.array([0.1, 0.0, -0.1])
    fit = fit_self_energies(composition, energies, ["H", "C", "O"])
    assert (fit.rank, fit.n_elements) == (2, 3)
    assert fit.undetermined == [{"H": 1, "C": -2, "O": -2}]
    assert "determine 2 of 3 self-energies" in fit.warning()
    assert "H − 2 C − 2 O" in fit.warning()
    assert set(fit.standard_errors.values()) == {None}
    minimum_norm = np.linalg.lstsq(composition.astype(float), energies, rcond=None)[0]
    assert _values(fit) == pytest.approx(minimum_norm, abs=1e-7)


@pytest.mark.parametrize("seed", range(5))
def test_undetermined_combinations_are_a_basis_of_the_null_space(seed: int) -> None:
    rng = np.random.default_rng(seed)
    composition = rng.integers(0, 5, size=(3, 6)) + 1
    fit = fit_self_energies(composition, rng.normal(size=3), list("HCNOFP"))
    vectors = np.array([[c.get(s, 0) for s in "HCNOFP"] for c in fit.undetermined])
    assert len(vectors) == 6 - np.linalg.matrix_rank(composition) == np.linalg.matrix_rank(vectors)
    assert (composition @ vectors.T == 0).all()


def test_a_composition_outside_the_row_space_is_an_error_by_name() -> None:
    composition = np.array([[6, 2, 1], [4, 1, 1]])
    fit = fit_self_energies(composition, np.array([-4200.0, -3100.0]), ["H", "C", "O"])
    inside = np.array([[10, 3, 2], [2, 1, 0], [2, 0, 1]])  # sums and differences of the two
    assert not uncovered(fit, ["H", "C", "O"], inside).any()
    check_covered(fit, ["H", "C", "O"], inside, str)
    with pytest.raises(SelfEnergyError) as error:
        check_covered(fit, ["H", "C", "O"], np.array([[6, 2, 1], [2, 0, 0]]), "file {}".format)
    text = str(error.value)
    assert "H2 is no combination of the compositions in the training split" in text
    assert "rank 2 of 3" in text
    assert "file 1" in text
    assert "remedy" in text


def test_an_element_that_was_never_fitted_is_an_error_by_name() -> None:
    fit = fit_self_energies(np.array([[2, 1], [4, 1]]), np.array([-1.0, -2.0]), ["H", "O"])
    with pytest.raises(SelfEnergyError, match=r"S in H2S: the training split never had(.|\n)*H, O"):
        check_covered(fit, ["H", "S"], np.array([[2, 1]]), str)
    assert uncovered(fit, ["H", "S"], np.array([[2, 0], [0, 1]])).tolist() == [False, True]


def test_given_values_stay_and_the_rest_is_fitted() -> None:
    composition, energies = _data(noise=0.0)
    config = SelfEnergiesConfig.model_validate({"values": {"H": "-13.6 eV", "I": "-1 hartree"}})
    fit = determine_self_energies(config, composition, energies, ELEMENTS)
    assert fit.values["H"] == -13.6
    assert fit.values["I"] == pytest.approx(-27.211386, abs=1e-6)
    assert [fit.values[s] for s in ELEMENTS] == pytest.approx(list(PLANTED), abs=1e-7)
    assert "H" not in fit.standard_errors
    assert (fit.rank, fit.n_elements) == (4, 4)
    check_covered(fit, ["H", "I"], np.array([[1, 1], [0, 2]]), str)


def test_a_given_value_makes_underdetermined_data_determined() -> None:
    composition = np.array([[6, 2, 1], [4, 1, 1]])
    config = SelfEnergiesConfig.model_validate(
        {"values": {"H": "-13.6 eV"}, "if_underdetermined": "error"}
    )
    planted = np.array([-13.6, -1030.0, -2043.0])
    fit = determine_self_energies(config, composition, composition @ planted, ["H", "C", "O"])
    assert [fit.values[s] for s in "HCO"] == pytest.approx(list(planted), abs=1e-8)


def test_underdetermined_is_an_error_if_asked_for() -> None:
    config = SelfEnergiesConfig(if_underdetermined="error")
    with pytest.raises(SelfEnergyError, match=r"determine 1 of 2(.|\n)*remedy:.*give values"):
        determine_self_energies(config, np.array([[4, 1]]), np.array([-1.0]), ["H", "C"])


def test_given_needs_all_and_none_gives_zero() -> None:
    config = SelfEnergiesConfig.model_validate({"method": "given", "values": {"H": "-13.6 eV"}})
    with pytest.raises(SelfEnergyError, match=r"no self-energy is given for C, O"):
        determine_self_energies(config, np.array([[1, 1, 1]]), np.array([0.0]), ["H", "C", "O"])
    none = SelfEnergiesConfig(method="none")
    fit = determine_self_energies(none, np.array([[1, 1]]), np.array([0.0]), ["H", "C"])
    assert fit.values == {"H": 0.0, "C": 0.0}


def test_a_given_value_for_no_element_is_refused() -> None:
    config = SelfEnergiesConfig.model_validate({"values": {"Hx": "-13.6 eV"}})
    with pytest.raises(SelfEnergyError, match='"Hx" is not an element'):
        determine_self_energies(config, np.array([[1]]), np.array([0.0]), ["H"])


def test_structures_without_an_energy_do_not_enter() -> None:
    composition, energies = _data(noise=1.0)
    holes = energies.copy()
    holes[::3] = np.nan
    config = SelfEnergiesConfig()
    known = np.isfinite(holes)
    found = determine_self_energies(config, composition, holes, ELEMENTS)
    assert found.values == fit_self_energies(composition[known], energies[known], ELEMENTS).values
    with pytest.raises(SelfEnergyError, match="no structure of the training split has an energy"):
        determine_self_energies(config, composition, np.full(400, np.nan), ELEMENTS)


def test_an_element_only_in_structures_without_an_energy_is_an_error_by_name() -> None:
    composition = np.array([[1, 0], [1, 1]])
    with pytest.raises(SelfEnergyError, match="F: no structure of the training split that has"):
        determine_self_energies(
            SelfEnergiesConfig(), composition, np.array([1.0, np.nan]), ["H", "F"]
        )


def test_compositions_formulas_and_sums() -> None:
    numbers = np.array([8, 1, 1, 6, 1, 1, 1, 8, 1, 35, 1], np.uint8)
    elements, composition = compositions(np.array([0, 3, 9, 11]), numbers)
    assert elements == ["H", "C", "O", "Br"]
    assert composition.tolist() == [[2, 0, 1, 0], [4, 1, 1, 0], [1, 0, 0, 1]]
    assert formulas(elements, composition) == ["H2O", "CH4O", "BrH"]  # Hill's order
    values = {"H": -1.0, "C": -10.0, "O": -100.0, "Br": -1000.0}
    assert sum_of_self_energies(values, elements, composition).tolist() == [-102, -114, -1001]
    assert in_words({"H": 2, "C": -1}) == "2 H − C"


REAL = [  # file, rank, self-energies of H, C and O, rmse: numpy's least squares over all structures
    ("solvent_clusters/solvent_xtb_test.xyz", "_xtb", 3, (-13.8027, -57.8715, -110.9666), 4.1861),
    ("ethanol_methanol/train_eth_meth.xyz", "", 2, (-698.299, 329.327, -678.477), 0.16996),
    ("acetylacetone/train_300K.xyz", "", 1, (-807.861, -504.913, -201.965), 0.14998),
]


@pytest.mark.parametrize(("name", "suffix", "rank", "published", "rmse"), REAL)
def test_real_data(
    name: str, suffix: str, rank: int, published: tuple[float, ...], rmse: float
) -> None:
    path = Path(__file__).parents[2] / "shared" / "data" / name
    if not path.is_file():
        pytest.skip("the shared data is not there")
    energy = {"key": f"energy{suffix}", "unit": "eV"}
    config = [SourceConfig.model_validate({"path": str(path), "energy": energy})]
    structures = sources.read(sources.locate(config), config, None)
    elements, composition = compositions(structures.first_atom, structures.atoms["atomic_numbers"])
    energies = structures.structures["energy"]
    fit = fit_self_energies(composition, energies, elements)
    expected = np.linalg.lstsq(composition.astype(float), energies, rcond=None)[0]
    assert _values(fit) == pytest.approx(expected, abs=1e-8)
    assert _values(fit) == pytest.approx(published, abs=6e-4)
    assert (fit.rank, len(fit.undetermined)) == (rank, 3 - rank)
    assert fit.rmse_after == pytest.approx(rmse, abs=6e-5)
    for combination in fit.undetermined:
        assert not (composition @ [combination.get(symbol, 0) for symbol in elements]).any()


def test_an_underdetermined_fit_is_exact_for_sums_of_what_it_saw() -> None:
    composition = np.array([[6, 2, 1], [4, 1, 1]])
    fit = fit_self_energies(composition, composition @ PLANTED[[0, 1, 3]], ["H", "C", "O"])
    others = np.array([[10, 3, 2], [2, 1, 0], [16, 5, 3]])
    found = sum_of_self_energies(fit.values, ["H", "C", "O"], others)
    assert found == pytest.approx(others @ PLANTED[[0, 1, 3]], abs=1e-8)


def test_elements_that_are_determined_keep_their_errors_beside_those_that_are_not() -> None:
    rng = np.random.default_rng(0)
    distinct = np.array([[2, 0, 0], [1, 1, 1], [3, 2, 2]])  # H is known; C and O go together
    composition = distinct[rng.integers(0, 3, 60)]
    energies = composition @ PLANTED[[0, 1, 3]] + rng.normal(size=60)
    fit = fit_self_energies(composition, energies, ["H", "C", "O"])
    assert fit.undetermined == [{"C": 1, "O": -1}]
    assert (fit.standard_errors["C"], fit.standard_errors["O"]) == (None, None)
    x = composition[:, :2].astype(float)  # the pair CO as one element
    residual = energies - x @ np.linalg.lstsq(x, energies, rcond=None)[0]
    expected = np.sqrt(residual @ residual / 58 * np.linalg.inv(x.T @ x)[0, 0])
    assert fit.standard_errors["H"] == pytest.approx(expected, rel=1e-9)
    others = np.array([[5, 1, 1], [0, 3, 3], [0, 1, 0]])
    assert uncovered(fit, ["H", "C", "O"], others).tolist() == [False, False, True]


def test_large_energies_keep_their_small_differences() -> None:
    composition, _ = _data(noise=0.0)
    planted = PLANTED * 1000  # 10⁸ eV in a structure: float32 would be wrong by 8 eV
    fit = fit_self_energies(composition, composition @ planted, ELEMENTS)
    left = composition @ planted - sum_of_self_energies(fit.values, ELEMENTS, composition)
    assert np.abs(left).max() < 1e-5


def test_the_order_of_the_structures_does_not_matter() -> None:
    composition, energies = _data(noise=1.0)
    order = np.random.default_rng(2).permutation(len(energies))
    fit = fit_self_energies(composition, energies, ELEMENTS)
    other = fit_self_energies(composition[order], energies[order], ELEMENTS)
    assert other.values == pytest.approx(fit.values, abs=1e-8)
    assert other.rmse_after == pytest.approx(fit.rmse_after, rel=1e-9)


def test_all_values_given_leaves_nothing_to_fit() -> None:
    composition, energies = _data(noise=1.0)
    given = dict(zip(ELEMENTS, PLANTED.tolist(), strict=True))
    fit = fit_self_energies(composition, energies, ELEMENTS, given=given)
    assert fit.values == given
    residual = energies - composition @ PLANTED
    assert fit.rmse_after == pytest.approx(np.sqrt(np.mean(residual**2)), rel=1e-9)
    assert not uncovered(fit, ELEMENTS, composition).any()


def test_what_the_data_fixes_is_said_in_atoms() -> None:
    fit = fit_self_energies(np.array([[6, 2, 1], [4, 1, 1]]), np.zeros(2), ["H", "C", "O"])
    assert fit.determined == [{"H": 2, "C": 1}, {"H": 2, "O": 1}]
    assert "the data fixes 2 H + C, 2 H + O, not C, H and O by themselves" in fit.warning()
    one = fit_self_energies(np.array([[4, 2]]), np.zeros(1), ["H", "C"])
    assert one.determined == [{"H": 2, "C": 1}]
    assert "the data fixes 2 H + C, not C and H by themselves" in one.warning()


@pytest.mark.parametrize("seed", range(20))
def test_the_combinations_that_are_fixed_span_the_row_space(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rank = int(rng.integers(1, 5))
    rows = rng.integers(0, 9, (6, rank)) @ rng.integers(0, 3, (rank, 6)) + 1
    fit = fit_self_energies(rows, rng.normal(size=6), list("HCNOFP"))
    fixed = np.array([[c.get(s, 0) for s in "HCNOFP"] for c in fit.determined])
    if fit.rank == 6:
        assert not fit.determined
        return
    assert len(fixed) == fit.rank == np.linalg.matrix_rank(fixed)
    assert np.linalg.matrix_rank(np.concatenate([rows, fixed])) == fit.rank


def test_worst_compositions_and_leaving_each_out_equal_a_naive_computation() -> None:
    composition, energies = _data(noise=1.0)
    energies = energies + 3.0 * composition[:, 0] * composition[:, 1]  # what no atom alone knows
    fit = fit_self_energies(composition, energies, ELEMENTS)
    residual = energies - composition @ _values(fit)
    distinct = np.unique(composition, axis=0)
    mean = {tuple(r): residual[(composition == r).all(axis=1)].mean() for r in distinct}
    expected = sorted(mean.values(), key=abs, reverse=True)
    found = [entry["mean_residual"] for entry in fit.worst_compositions]
    assert found == pytest.approx(expected[: len(found)], abs=1e-7)
    worst = fit.worst_compositions[0]
    row = max(mean, key=lambda key: abs(mean[key]))
    members = (composition == row).all(axis=1)
    assert worst["formula"] == formulas(ELEMENTS, np.array([row]))[0]
    assert worst["n_structures"] == members.sum()
    assert worst["rms_residual"] == pytest.approx(np.sqrt(np.mean(residual[members] ** 2)))
    errors = []
    for left_out in distinct:
        here = (composition == left_out).all(axis=1)
        values = np.linalg.lstsq(composition[~here].astype(float), energies[~here], rcond=None)[0]
        errors.append(energies[here].mean() - left_out @ values)
    assert fit.leave_one_composition_out == {
        "rmse": pytest.approx(np.sqrt(np.mean(np.square(errors))), rel=1e-8),
        "n_compositions": len(distinct),
        "not_determined": 0,
    }


def test_a_composition_that_no_other_determines_is_not_left_out() -> None:
    composition = np.array([[2, 0, 0], [4, 0, 0], [0, 1, 1]])
    fit = fit_self_energies(composition, np.array([-2.0, -4.5, -7.0]), ["H", "C", "O"])
    found = fit.leave_one_composition_out
    assert found is not None
    assert (found["n_compositions"], found["not_determined"]) == (2, 1)
    assert found["rmse"] == pytest.approx(np.sqrt((0.25**2 + 0.5**2) / 2))


def test_standard_errors_agree_with_a_bootstrap() -> None:
    composition, energies = _data(noise=1.0)
    rng = np.random.default_rng(5)
    draws = []
    for _ in range(400):
        rows = rng.integers(0, len(energies), len(energies))
        draws.append(_values(fit_self_energies(composition[rows], energies[rows], ELEMENTS)))
    fit = fit_self_energies(composition, energies, ELEMENTS)
    expected = np.std(draws, axis=0)
    assert [fit.standard_errors[s] for s in ELEMENTS] == pytest.approx(expected, rel=0.15)


def test_huber_withstands_outliers_and_lists_them() -> None:
    composition, energies = _data(noise=0.05)
    wrong = [3, 50, 117, 200, 333]
    spoiled = energies.copy()
    spoiled[wrong] += [4e3, -2e3, 9e2, -5e2, 27.2]
    planted = dict(zip(ELEMENTS, PLANTED, strict=True))
    least = fit_self_energies(composition, spoiled, ELEMENTS)
    huber = fit_self_energies(composition, spoiled, ELEMENTS, huber_epsilon=1.35)
    assert huber.fit_method == "huber"
    assert huber.values == pytest.approx(planted, abs=0.05)
    assert max(abs(least.values[s] - planted[s]) for s in ELEMENTS) > 1.0
    assert [o["index"] for o in huber.outliers[:5]] == wrong
    assert [o["residual"] for o in huber.outliers[:5]] == pytest.approx(
        [4e3, -2e3, 9e2, -5e2, 27.2], abs=1.0
    )
    assert huber.n_outliers == len(huber.outliers) < 10
    assert not least.outliers


def test_huber_s_standard_errors_agree_with_a_bootstrap() -> None:
    composition, energies = _data(noise=0.5)
    rng = np.random.default_rng(6)
    energies = energies + np.where(rng.random(len(energies)) < 0.05, 20 * rng.normal(size=400), 0)
    draws = []
    for _ in range(100):
        rows = rng.integers(0, len(energies), len(energies))
        fit = fit_self_energies(composition[rows], energies[rows], ELEMENTS, huber_epsilon=1.35)
        draws.append(_values(fit))
    fit = fit_self_energies(composition, energies, ELEMENTS, huber_epsilon=1.35)
    expected = np.std(draws, axis=0)
    assert [fit.standard_errors[s] for s in ELEMENTS] == pytest.approx(expected, rel=0.3)


def test_huber_is_exact_on_exact_data_and_of_minimum_norm_where_underdetermined() -> None:
    composition, energies = _data(noise=0.0)
    fit = fit_self_energies(composition, energies, ELEMENTS, huber_epsilon=1.35)
    assert _values(fit) == pytest.approx(PLANTED, abs=1e-6)
    one = np.tile([[8, 5, 2]], (50, 1))
    noisy = -9391.0 + np.random.default_rng(0).normal(size=50)
    fit = fit_self_energies(one, noisy, ["H", "C", "O"], huber_epsilon=1.35)
    assert np.linalg.matrix_rank(np.array([_values(fit), [8, 5, 2]]), tol=1e-6) == 1
    assert _values(fit) @ [8, 5, 2] == pytest.approx(np.median(noisy), abs=0.3)


def test_levels_of_theory_have_self_energies_of_their_own() -> None:
    composition, energies = _data(noise=0.0)
    level, shift = np.arange(len(energies)) % 2, 3.0 * np.arange(len(ELEMENTS))
    total = energies + np.where(level == 1, composition @ shift, 0.0)
    columns, wide = columns_by_level(ELEMENTS, composition, level, ["dft", "cc"])
    assert columns == [f"{s} ({name})" for name in ("dft", "cc") for s in ELEMENTS]
    fit = determine_self_energies(SelfEnergiesConfig(), wide, total, columns, ["dft", "cc"])
    assert fit.rank == 2 * len(ELEMENTS)
    first = values_of_level(fit.values, "dft", ["dft", "cc"])
    second = values_of_level(fit.values, "cc", ["dft", "cc"])
    assert [first[s] for s in ELEMENTS] == pytest.approx(PLANTED, abs=1e-7)
    assert [second[s] for s in ELEMENTS] == pytest.approx(PLANTED + shift, abs=1e-7)
    assert sum_of_self_energies(fit.values, columns, wide) == pytest.approx(total, abs=1e-7)
    assert fit.worst_compositions[0]["formula"].endswith((" (dft)", " (cc)"))
    assert columns_by_level(ELEMENTS, composition, level * 0, ["dft"])[0] == ELEMENTS


def test_values_of_one_level_stay_and_the_other_is_fitted() -> None:
    composition, energies = _data(noise=0.0)
    level = np.arange(len(energies)) % 2
    columns, wide = columns_by_level(ELEMENTS, composition, level, ["dft", "cc"])
    values = {"cc": {"H": "-13 eV"}}
    config = SelfEnergiesConfig.model_validate({"values": values})
    fit = determine_self_energies(config, wide, energies, columns, ["dft", "cc"])
    assert fit.values["H (cc)"] == -13.0
    assert fit.values["H (dft)"] == pytest.approx(PLANTED[0], abs=1e-7)


def test_isolated_atoms_are_the_lowest_of_each_element() -> None:
    composition = np.array([[1, 0], [1, 0], [0, 1], [2, 1], [1, 0]])
    energies = np.array([-13.0, -13.6, -1029.0, -1060.0, np.nan])
    found = isolated_atoms(composition, energies, ["H", "C"])
    assert found == {"H": -13.6, "C": -1029.0}
    config = SelfEnergiesConfig(method="isolated_atoms")
    fit = determine_self_energies(config, composition[3:4], energies[3:4], ["H", "C"], atoms=found)
    assert (fit.method, fit.values) == ("isolated_atoms", found)
    with pytest.raises(
        SelfEnergyError, match=r"no structure of one neutral atom.* of C(.|\n)*give"
    ):
        determine_self_energies(
            config, composition[3:4], energies[3:4], ["H", "C"], atoms={"H": -1.0}
        )


@pytest.mark.parametrize(("n", "width"), [(500, 4), (500, 90), (1, 3), (0, 2), (7, 0)])
def test_distinct_compositions_are_those_of_a_naive_search(n: int, width: int) -> None:
    rng = np.random.default_rng(n + width)
    composition = rng.integers(0, 3, (max(n // 5, 1), width))[rng.integers(0, max(n // 5, 1), n)]
    rows, owner, counts = distinct_compositions(composition)
    expected = sorted({tuple(row) for row in composition.tolist()})
    assert [tuple(row) for row in rows.tolist()] == expected
    assert np.array_equal(rows[owner], composition)
    assert counts.tolist() == [
        sum(tuple(row) == one for row in composition.tolist()) for one in expected
    ]


def test_distinct_compositions_whose_numbers_collide(monkeypatch: pytest.MonkeyPatch) -> None:
    class Zeros:
        def integers(self, _: int, size: int) -> np.ndarray:
            return np.full(size, -1) // 2

    monkeypatch.setattr(np.random, "default_rng", lambda _: Zeros())
    composition = np.array([[1, 2], [2, 1], [1, 2], [0, 3]])  # all sums are the same
    rows, owner, counts = distinct_compositions(composition)
    assert rows.tolist() == [[0, 3], [1, 2], [2, 1]]
    assert (owner.tolist(), counts.tolist()) == ([1, 2, 1, 0], [1, 2, 1])
