"""From a file to a prepared dataset, in float64, and what is said of it."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase.data import chemical_symbols
from molecules import (
    SELF_ENERGIES,
    random_structures,
    springs,
    without,
    write_experiment,
    write_extxyz,
)

from runner.config import load_config
from runner.errors import ConfigError, DatasetError, SelfEnergyError
from runner.fields import FIELDS
from runner.prepare import default_data_dir, find_prepared, prepare
from runner.self_energies import compositions
from runner.store import PreparedDataset, write_dataset
from runner.structures import Structures, concatenate
from runner.terminal import Terminal


def _prepare(config_file: Path, *settings: str) -> dict[str, Any]:
    config = load_config(config_file, settings)
    return prepare(config, config_file.parent / "prepared", Terminal())


def _in_stored_order(dataset: PreparedDataset) -> list[Structures]:
    return [dataset.read(split) for split in ("train", "val", "test")]


def test_stored_energy_plus_self_energies_is_the_file_s(tmp_path: Path) -> None:
    written = springs(n=200)
    config_file = write_experiment(tmp_path, written)
    dataset = PreparedDataset(Path(_prepare(config_file)["dataset"]))
    values = dataset.attributes["self_energies"]
    seen = []
    for split in _in_stored_order(dataset):
        elements, composition = compositions(split.first_atom, split.atoms["atomic_numbers"])
        absolute = split.structures["energy"] + composition @ [values[e] for e in elements]
        origin = split.structures["source_index"]
        assert np.abs(absolute - written.structures["energy"][origin]).max() < 1e-9
        for name in ("positions", "forces"):
            assert np.array_equal(split.atoms[name], written.take(origin).atoms[name])
        seen.append(origin)
    assert sorted(np.concatenate(seen)) == list(range(200))
    assert [len(part) for part in seen] == [160, 20, 20]
    correlation = np.corrcoef(np.arange(160), seen[0])[0, 1]  # shuffled within the split
    assert abs(correlation) < 0.3


def test_self_energies_are_those_of_the_training_split_alone(tmp_path: Path) -> None:
    written = springs(n=200)
    result = _prepare(write_experiment(tmp_path, written))
    train = PreparedDataset(Path(result["dataset"])).read("train").structures["source_index"]
    chosen = written.take(train)
    _, composition = compositions(chosen.first_atom, chosen.atoms["atomic_numbers"])
    expected = np.linalg.lstsq(composition.astype(float), chosen.structures["energy"], rcond=None)[
        0
    ]
    assert list(result["self_energies"].values()) == pytest.approx(list(expected), abs=1e-8)
    assert expected == pytest.approx(list(SELF_ENERGIES.values()), abs=1.0)


def test_the_result_says_what_the_design_names(tmp_path: Path) -> None:
    result = _prepare(write_experiment(tmp_path))
    assert set(result) == {
        "dataset", "fingerprint", "reused", "structures", "atoms", "elements", "splits",
        "self_energies", "fit", "seconds",
    }  # fmt: skip
    assert result["splits"] == {"train": 48, "val": 6, "test": 6}
    assert result["elements"] == ["H", "C", "N", "O"]
    assert set(result["fit"]) >= {
        "method", "n_structures", "n_compositions", "rank", "n_elements", "condition_number",
        "rmse_before", "rmse_after", "standard_errors", "counts", "undetermined",
    }  # fmt: skip
    assert Path(result["dataset"]).name == f"springs-{result['fingerprint'][:16]}.zarr"
    json.dumps(result)
    attributes = PreparedDataset(Path(result["dataset"])).attributes
    assert set(attributes) >= {
        "schema_version", "fingerprint", "prepare", "sources", "units", "splits",
        "self_energies", "fit", "statistics", "energy_range",
    }  # fmt: skip
    assert attributes["units"] == {name: field.unit for name, field in FIELDS.items()}


def test_the_width_of_the_energy_within_a_composition_does_not_change(tmp_path: Path) -> None:
    spans = PreparedDataset(
        Path(_prepare(write_experiment(tmp_path, springs(n=300)))["dataset"])
    ).attributes["energy_range"]
    assert spans["before"]["width"] > 0.1
    assert spans["after"]["width"] == pytest.approx(spans["before"]["width"], abs=1e-9)
    assert spans["before"]["min"] < -3000 < -20 < spans["after"]["min"]
    largest = max(abs(spans["before"]["min"]), abs(spans["before"]["max"]))
    assert spans["before"]["float32_spacing"] == np.spacing(np.float32(largest))


def test_the_same_input_is_reused_and_another_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config_file = write_experiment(tmp_path)
    first = _prepare(config_file)
    assert not first["reused"]
    again = _prepare(config_file, "train.epochs=99", "train.seed=5")
    assert again["reused"]
    assert again["dataset"] == first["dataset"]
    assert "reused" in capsys.readouterr().out
    other = _prepare(config_file, "prepare.split.seed=1")
    assert not other["reused"]
    assert other["dataset"] != first["dataset"]
    assert "split.seed: 0 → 1" in capsys.readouterr().out
    data = tmp_path / "data.extxyz"
    data.write_text(data.read_text().replace("energy=", "energy= ", 1))
    changed = _prepare(config_file)
    assert not changed["reused"]
    assert "the content of the source files" in capsys.readouterr().out


def test_many_at_once_make_one_dataset(tmp_path: Path) -> None:
    config_file = write_experiment(tmp_path)
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda _: _prepare(config_file), range(3)))
    assert len({result["dataset"] for result in results}) == 1
    left = {path.suffix for path in (tmp_path / "prepared").iterdir()}
    assert left == {".zarr", ".png"}
    PreparedDataset(Path(results[0]["dataset"])).read("train")


def test_the_account(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = without(springs(), "dipole", [3])
    config_file = write_experiment(tmp_path, written)
    text = config_file.read_text()
    config_file.write_text(text.replace('"e*angstrom" }', '"e*angstrom", missing = "nan" }'))
    result = _prepare(config_file)
    text = capsys.readouterr().out
    assert "60 structures: train 48, val 6, test 6" in text
    assert "dipole 59 (98.3 %)" in text
    for symbol, value in result["self_energies"].items():
        assert f"{symbol:9s}" in text
        assert f"{value:.6f}" in text
    assert "rank 4 of 4 elements" in text
    assert "float32 step, meV" in text
    assert f"picture: {result['dataset'].removesuffix('.zarr')}.png" in text
    picture = Path(result["dataset"]).with_suffix(".png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_statistics_and_coverage(tmp_path: Path) -> None:
    written = without(springs(), "dipole", [3])
    config_file = write_experiment(tmp_path, written)
    text = config_file.read_text()
    config_file.write_text(text.replace('"e*angstrom" }', '"e*angstrom", missing = "nan" }'))
    dataset = PreparedDataset(Path(_prepare(config_file)["dataset"]))
    assert dataset.labels == {"energy": 60, "forces": 60, "total_charge": 60, "dipole": 59}
    train = dataset.read("train")
    per_atom = train.structures["energy"] / np.diff(train.first_atom)
    statistics = dataset.attributes["statistics"]["train"]
    assert statistics["energy_per_atom_std"] == pytest.approx(per_atom.std())
    assert statistics["energy_per_atom_mean"] == pytest.approx(per_atom.mean())
    rms = np.sqrt((train.atoms["forces"] ** 2).mean())
    assert statistics["forces_rms"] == pytest.approx(rms)
    assert (statistics["n_structures"], statistics["n_atoms"]) == (48, train.n_atoms)
    numbers = train.atoms["atomic_numbers"]
    for z, symbol in ((1, "H"), (6, "C"), (8, "O")):
        rms = np.sqrt(np.square(train.atoms["forces"][numbers == z]).mean())
        assert statistics["forces_rms_by_element"][symbol] == pytest.approx(rms)
    # least squares has taken out what elements can explain
    assert max(abs(value) for value in statistics["energy_by_element"].values()) < 1e-9


def test_groups_stay_together(tmp_path: Path) -> None:
    config_file = write_experiment(tmp_path)
    grouped = ["prepare.split.method=group", "prepare.split.group_by=molecule"]
    dataset = PreparedDataset(Path(_prepare(config_file, *grouped)["dataset"]))
    molecules = [set(s.structures["source_index"] % 7) for s in _in_stored_order(dataset)]
    assert all(molecules)
    assert sum(map(len, molecules)) == 7
    by_formula = ["prepare.split.method=group", "prepare.split.group_by=formula"]
    dataset = PreparedDataset(Path(_prepare(config_file, *by_formula)["dataset"]))
    formulas = []
    for split in _in_stored_order(dataset):
        elements, composition = compositions(split.first_atom, split.atoms["atomic_numbers"])
        formulas.append({tuple(zip(elements, row, strict=True)) for row in composition.tolist()})
    assert not formulas[0] & formulas[1]


def test_an_element_that_training_never_saw_is_an_error_by_name(tmp_path: Path) -> None:
    written = springs()
    numbers = written.atoms["atomic_numbers"].copy()
    config_file = write_experiment(tmp_path, written)
    dataset = PreparedDataset(Path(_prepare(config_file)["dataset"]))
    lonely = int(dataset.read("test").structures["source_index"][0])
    numbers[written.first_atom[lonely]] = 16
    atoms = written.atoms | {"atomic_numbers": numbers}
    write_extxyz(tmp_path / "data.extxyz", replace(written, atoms=atoms))
    with pytest.raises(SelfEnergyError) as error:
        _prepare(config_file)
    text = str(error.value)
    assert "S in " in text
    assert "the training split never had this element" in text
    assert f"data.extxyz, structure {lonely} (counted from 0), in the test split" in text
    assert "allowed: H, C, N, O" in text
    given = _prepare(config_file, 'prepare.self_energies.values={ S = "-10800 eV" }')
    assert given["self_energies"]["S"] == -10800


def test_one_composition_is_prepared_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = springs().take(np.zeros(20, np.int64))
    energies = {"energy": -3000 + np.linspace(0, 1, 20)}
    result = _prepare(
        write_experiment(tmp_path, replace(one, structures=one.structures | energies))
    )
    assert result["fit"]["rank"] == 1
    assert "warning: the compositions determine 1 of" in capsys.readouterr().out


def test_no_energies_can_be_prepared_with_no_self_energies(tmp_path: Path) -> None:
    config_file = write_experiment(tmp_path)
    text = config_file.read_text().replace('energy = { key = "energy", unit = "eV" }\n', "")
    config_file.write_text(text)
    result = _prepare(config_file, "prepare.self_energies.method=none")
    assert set(result["self_energies"].values()) == {0.0}


def test_where_datasets_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config_file = write_experiment(tmp_path / "project" / "experiments" / "one")
    monkeypatch.delenv("RUNNER_DATA_DIR", raising=False)
    assert default_data_dir(config_file) == tmp_path / "project" / "data" / "prepared"
    monkeypatch.setenv("RUNNER_DATA_DIR", str(tmp_path / "elsewhere"))
    assert default_data_dir(config_file) == tmp_path / "elsewhere"


def test_find_prepared_finds_it(tmp_path: Path) -> None:
    config_file = write_experiment(tmp_path)
    result = _prepare(config_file)
    config = load_config(config_file)
    assert find_prepared(config, tmp_path / "prepared", "").path == Path(result["dataset"])


def test_everything_on_disk_is_float64_and_says_where_it_came_from(tmp_path: Path) -> None:
    config_file = write_experiment(tmp_path)
    dataset = PreparedDataset(Path(_prepare(config_file)["dataset"]))
    train = dataset.read("train")
    for name, array in (train.atoms | train.structures).items():
        exact = {"atomic_numbers": np.uint8, "source": np.int16, "source_index": np.int64}
        assert array.dtype == exact.get(name, np.float64), name
    (source,) = dataset.attributes["sources"]
    content = (tmp_path / "data.extxyz").read_bytes()
    assert source["name"] == "data.extxyz"
    assert (source["bytes"], source["sha256"]) == (
        len(content),
        hashlib.sha256(content).hexdigest(),
    )
    assert dataset.attributes["splits"] == {"train": [0, 48], "val": [48, 54], "test": [54, 60]}


def test_a_composition_outside_the_row_space_of_training_is_an_error_by_name(
    tmp_path: Path,
) -> None:
    one = springs().take(np.zeros(20, np.int64))  # one composition: rank 1
    energies = {"energy": -3000 + np.linspace(0, 1, 20)}
    written = replace(one, structures=one.structures | energies)
    config_file = write_experiment(tmp_path, written)
    dataset = PreparedDataset(Path(_prepare(config_file)["dataset"]))
    stray = int(dataset.read("val").structures["source_index"][0])
    numbers = written.atoms["atomic_numbers"].copy()
    rows = slice(written.first_atom[stray], written.first_atom[stray + 1])
    distinct, counts = np.unique(numbers[rows], return_counts=True)
    assert len(distinct) > 1
    numbers[rows] = distinct[np.argmax(counts)]  # known elements, in another proportion
    atoms = written.atoms | {"atomic_numbers": numbers}
    write_extxyz(tmp_path / "data.extxyz", replace(written, atoms=atoms))
    with pytest.raises(SelfEnergyError) as error:
        _prepare(config_file)
    text = str(error.value)
    assert "is no combination of the compositions in the training split" in text
    assert f"data.extxyz, structure {stray} (counted from 0), in the val split" in text
    assert "remedy:" in text
    with pytest.raises(SelfEnergyError, match=r"determine 1 of(.|\n)*remedy:.*give values"):
        _prepare(config_file, "prepare.self_energies.if_underdetermined=error")
    assert len(list((tmp_path / "prepared").glob("*.zarr"))) == 1


@pytest.mark.parametrize("name", ["energy", "forces"])
def test_a_training_split_without_one_label_is_prepared_in_silence(
    tmp_path: Path, name: str
) -> None:
    written = springs()
    train = PreparedDataset(Path(_prepare(write_experiment(tmp_path / "all"))["dataset"])).read(
        "train"
    )
    bare = without(written, name, train.structures["source_index"].tolist())
    config_file = write_experiment(tmp_path / "some", bare)
    text = config_file.read_text()
    config_file.write_text(text.replace('" }\nforces', '", missing = "nan" }\nforces').replace(
        '"eV/angstrom" }', '"eV/angstrom", missing = "nan" }'))  # fmt: skip
    given = {"H": "-13.6 eV", "C": "-1029.8 eV", "N": "-1485.3 eV", "O": "-2042.6 eV"}
    values = ", ".join(f'{symbol} = "{value}"' for symbol, value in given.items())
    result = _prepare(
        config_file,
        "prepare.self_energies.method=given",
        f"prepare.self_energies.values={{ {values} }}",
    )
    dataset = PreparedDataset(Path(result["dataset"]))
    assert dataset.labels[name] == 12
    assert result["fit"]["method"] == "given"
    key = "energy_per_atom_mean" if name == "energy" else "forces_rms"
    assert dataset.attributes["statistics"]["train"][key] is None


def test_real_data_of_one_composition(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parents[2] / "shared" / "data" / "acetylacetone" / "train_300K.xyz"
    if not path.is_file():
        pytest.skip("the shared data is not there")
    config_file = tmp_path / "config.toml"
    config_file.write_text(f"""
[prepare]
name = "acetylacetone"
[[prepare.source]]
path = "{path}"
energy = {{ key = "energy", unit = "eV" }}
forces = {{ key = "forces", unit = "eV/angstrom" }}
""")
    result = _prepare(config_file)
    assert (result["structures"], result["atoms"], result["elements"]) == (500, 7500, [*"HCO"])
    assert (result["fit"]["rank"], result["fit"]["n_elements"]) == (1, 3)
    assert "warning: the compositions determine 1 of 3" in capsys.readouterr().out
    spans = PreparedDataset(Path(result["dataset"])).attributes["energy_range"]
    for span in spans.values():  # one composition: its width is the whole range
        assert span["width"] == pytest.approx(span["max"] - span["min"], abs=1e-9)
    assert spans["after"]["float32_spacing"] < 1e-6 < 1e-4 < spans["before"]["float32_spacing"]


SOURCE = """
[[prepare.source]]
path = "{path}"
energy = {{ key = "energy", unit = "eV" }}
forces = {{ key = "forces", unit = "eV/angstrom" }}
"""


def _experiment(folder: Path, sources: dict[str, Structures], tail: str = "", **extra: str) -> Path:
    """An experiment over several made-up files; `extra` are lines of a file's source."""
    folder.mkdir(parents=True, exist_ok=True)
    text = '[prepare]\nname = "x"\n'
    for name, structures in sources.items():
        write_extxyz(folder / f"{name}.xyz", structures)
        text += SOURCE.format(path=f"{name}.xyz") + extra.get(name, "") + "\n"
    (folder / "config.toml").write_text(text + tail)
    return folder / "config.toml"


def _totals(dataset: PreparedDataset) -> dict[tuple[int, int], float]:
    """Total energy by (file, structure), self-energies added back by hand."""
    found = {}
    levels, by_level = (
        dataset.attributes["levels"],
        dataset.attributes.get("self_energies_by_level"),
    )
    for part in _in_stored_order(dataset):
        for index in range(len(part)):
            numbers = part.atoms["atomic_numbers"][
                part.first_atom[index] : part.first_atom[index + 1]
            ]
            values = dataset.attributes["self_energies"]
            if by_level:
                values = by_level[levels[part.structures["level"][index]]]
            origin = (
                int(part.structures["source"][index]),
                int(part.structures["source_index"][index]),
            )
            offset = sum(values[chemical_symbols[z]] for z in numbers)
            found[origin] = part.structures["energy"][index] + offset
    return found


def test_what_filters_drop_is_counted_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = springs(n=80)
    limit = float(np.median(np.abs(written.atoms["forces"]).max(axis=1)))
    tail = f'[prepare.filter]\nmax_atoms = 4\nmax_force = "{3 * limit!r} eV/angstrom"\n'
    result = _prepare(_experiment(tmp_path, {"a": written}, tail))
    large = [i for i in range(80) if i % 3 == 2]
    strong = [
        i
        for i in range(80)
        if i not in large
        and np.linalg.norm(
            written.atoms["forces"][written.first_atom[i] : written.first_atom[i + 1]], axis=1
        ).max()
        > 3 * limit
    ]
    dataset = PreparedDataset(Path(result["dataset"]))
    assert {k: v["count"] for k, v in dataset.attributes["dropped"].items()} == {
        "more than 4 atoms": len(large),
        f"a force above {3 * limit:g} eV/Å": len(strong),
    }
    assert strong
    assert set(_totals(dataset)) == {(0, i) for i in range(80)} - {(0, i) for i in large + strong}
    text = capsys.readouterr().out
    assert f"dropped {len(large)}: more than 4 atoms (such as a.xyz structure 2, a.xyz" in text


def test_filters_that_leave_nothing_are_refused(tmp_path: Path) -> None:
    config = _experiment(tmp_path, {"a": springs(n=9)}, "[prepare.filter]\nmin_atoms = 9\n")
    with pytest.raises(
        DatasetError, match=r"drop every structure: 9 with fewer than 9(.|\n)*loosen"
    ):
        _prepare(config)


def _atoms(energies: dict[int, float]) -> Structures:
    """One isolated atom of each element."""
    n = len(energies)
    made = random_structures([1] * n)
    made.atoms["atomic_numbers"][:] = list(energies)
    made.structures["energy"][:] = list(energies.values())
    made.structures["total_charge"][:] = 0
    return made


def test_isolated_atoms_give_their_energies_and_leave_the_splits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    energies = {1: -13.5, 6: -1029.0, 7: -1485.0, 8: -2042.0}
    tail = '[prepare.self_energies]\nmethod = "isolated_atoms"\n'
    written = {"molecules": springs(n=40), "atoms": _atoms(energies | {6: -1029.0})}
    result = _prepare(_experiment(tmp_path, written, tail))
    assert result["self_energies"] == {chemical_symbols[z]: e for z, e in energies.items()}
    assert result["structures"] == 40
    dataset = PreparedDataset(Path(result["dataset"]))
    expected = written["molecules"].structures["energy"]
    found = _totals(dataset)
    assert [found[0, i] for i in range(40)] == pytest.approx(expected, abs=1e-9)
    text = capsys.readouterr().out
    assert "dropped 4: isolated atoms, used for the self-energies" in text
    assert "isolated atom" in text
    del energies[8]
    config = _experiment(tmp_path / "b", {"m": springs(n=40), "a": _atoms(energies)}, tail)
    with pytest.raises(SelfEnergyError, match=r"one neutral atom.* of O(.|\n)*isolated atoms"):
        _prepare(config)


def test_charged_atoms_are_no_reference(tmp_path: Path) -> None:
    atoms = _atoms({1: -13.5, 6: -1029.0, 7: -1485.0, 8: -2042.0})
    ion = _atoms({1: -14.3})
    ion.structures["total_charge"][:] = -1
    charge = 'total_charge = { key = "total_charge" }'
    config = _experiment(
        tmp_path,
        {"m": springs(n=20), "a": concatenate([atoms, ion])},
        '[prepare.self_energies]\nmethod = "isolated_atoms"\n',
        a=charge,
        m=charge,
    )
    assert _prepare(config)["self_energies"]["H"] == -13.5


def test_levels_of_theory_are_fitted_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    low, high = springs(n=60), springs(seed=1, n=60)
    numbers = high.atoms["atomic_numbers"]
    shift = np.add.reduceat(np.where(numbers == 6, 7.0, 0.5), high.first_atom[:-1])
    high = replace(high, structures=high.structures | {"energy": high.structures["energy"] + shift})
    level = {name: f'level_of_theory = "{name}"' for name in ("dft", "cc")}
    config_file = _experiment(tmp_path, {"dft": low, "cc": high}, **level)
    result = _prepare(config_file)
    dataset = PreparedDataset(Path(result["dataset"]))
    by_level = dataset.attributes["self_energies_by_level"]
    assert set(by_level) == {"dft", "cc"}
    assert result["self_energies"] == by_level["dft"]
    assert by_level["cc"]["C"] - by_level["dft"]["C"] == pytest.approx(7.0, abs=1.5)
    assert result["fit"]["rank"] == 8
    span = dataset.attributes["energy_range"]  # of one composition at one level
    assert span["after"]["width"] == pytest.approx(span["before"]["width"], abs=1e-9)
    assert result["fit"]["rmse_after"] < 3
    found = _totals(dataset)
    for source, written in enumerate((low, high)):
        totals = [found[source, i] for i in range(60)]
        assert totals == pytest.approx(written.structures["energy"], abs=1e-9)
    text = capsys.readouterr()
    assert "C (cc)" in text.out
    assert "predicts energies at the first, dft" in text.out + text.err
    mixed = config_file.read_text().replace('level_of_theory = "cc"', "")
    config_file.write_text(mixed)
    with pytest.raises(ConfigError, match="energies of different levels cannot share self-ener"):
        _prepare(config_file)
    with pytest.raises(
        ConfigError, match="one set of self-energies cannot serve the levels dft, cc"
    ):
        _prepare(
            _experiment(tmp_path / "b", {"dft": low, "cc": high}, **level),
            'prepare.self_energies.values={H="-13 eV"}',
        )


def test_duplicates_across_splits_are_said_and_can_be_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = springs(n=40)
    every = concatenate([written, written.take(np.arange(20))])
    config_file = _experiment(tmp_path, {"a": every})
    dataset = PreparedDataset(Path(_prepare(config_file)["dataset"]))
    found = dataset.attributes["duplicates"]
    assert found["structures"] == 20
    split_of = {
        int(index): name for name in ("train", "val", "test") for _, index in dataset.origins(name)
    }
    pairs = [{split_of[i], split_of[i + 40]} for i in range(20)]
    for pair, entry in found["across_splits"].items():
        assert entry["count"] == pairs.count(set(pair.split("/")))
        for one, other in entry["examples"]:
            assert abs(one[1] - other[1]) == 40
    across = sum(entry["count"] for entry in found["across_splits"].values())
    assert across == sum(len(pair) == 2 for pair in pairs) > 0
    text = capsys.readouterr()
    assert "that are duplicates of structures of the train split: " in text.out + text.err
    dropped = _prepare(config_file, 'prepare.filter.duplicates="drop"')
    assert dropped["structures"] == 40
    assert not PreparedDataset(Path(dropped["dataset"])).attributes["warnings"]


def test_a_label_that_is_zero_throughout_is_asked_about(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = springs(n=30)
    written.structures["dipole"][:] = 0
    written.structures["total_charge"][:] = 0
    more = (
        'dipole = { key = "dipole", unit = "e*angstrom" }\ntotal_charge = { key = "total_charge" }'
    )
    config_file = _experiment(tmp_path, {"a": written}, a=more)
    for _ in range(2):  # made, and reused
        _prepare(config_file)
        text = capsys.readouterr()
        said = text.out + text.err
        assert 'dipole (key "dipole") of a.xyz is zero in every structure. Is it a label?' in said
        assert "total_charge (key" not in said


def test_spin_multiplicities_that_cannot_be_are_asked_about(tmp_path: Path) -> None:
    written = springs(n=30)
    more = 'spin_multiplicity = {{ key = "total_charge", scale = {} }}'
    cases = (("a", [0, 2], 1, True), ("b", [1, 3], 1, False), ("c", [1, 2], 0.5, True))
    for name, spins, scale, asked in cases:
        written.structures["total_charge"][:] = np.tile(spins, 15)
        config_file = _experiment(tmp_path / name, {"x": written}, x=more.format(scale))
        warnings = PreparedDataset(Path(_prepare(config_file)["dataset"])).attributes["warnings"]
        said = [text for text in warnings if "Does the file hold 2S, or S?" in text]
        assert bool(said) == asked
        if name == "a":
            assert "has the values 0, 2 (such as x.xyz structure 0)" in said[0]


def test_a_split_is_written_out_and_used_again(tmp_path: Path) -> None:
    config_file = _experiment(tmp_path, {"a": springs(n=40), "b": springs(seed=1, n=20)})
    config = load_config(config_file)
    first = prepare(config, tmp_path / "prepared", Terminal(), tmp_path / "split.json")
    again = _prepare(
        config_file,
        'prepare.split={method="file", file="split.json"}'.replace(
            "split.json", str(tmp_path / "split.json")
        ),
    )
    one, other = (PreparedDataset(Path(r["dataset"])) for r in (first, again))
    assert again["splits"] == first["splits"]
    for name in ("train", "val", "test"):
        assert sorted(one.origins(name).tolist()) == sorted(other.origins(name).tolist())
    assert again["self_energies"] == pytest.approx(first["self_energies"], abs=1e-9)
    written = json.loads((tmp_path / "split.json").read_text())
    assert written["sources"] == ["a.xyz", "b.xyz"]
    (tmp_path / "split.json").write_text(
        json.dumps({"train": [0, 1, 2, 3], "val": [5], "test": [45]})
    )
    third = _prepare(
        config_file,
        f'prepare.split={{method="file", file="{tmp_path / "split.json"}"}}',
        'prepare.self_energies.method="none"',
    )
    assert third["fingerprint"] != again["fingerprint"]
    assert PreparedDataset(Path(third["dataset"])).origins("test").tolist() == [[1, 5]]


def test_each_source_may_be_a_split(tmp_path: Path) -> None:
    files = {"train": springs(n=40), "val": springs(seed=1, n=8), "test": springs(seed=2, n=9)}
    pinned = {name: f'split = "{name}"' for name in files}
    result = _prepare(_experiment(tmp_path, files, '[prepare.split]\nmethod = "file"\n', **pinned))
    assert result["splits"] == {"train": 40, "val": 8, "test": 9}
    dataset = PreparedDataset(Path(result["dataset"]))
    for number, name in enumerate(files):
        assert set(dataset.origins(name)[:, 0]) == {number}


def test_coverage_by_source_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = 'dipole = { key = "dipole", unit = "e*angstrom" }'
    config_file = _experiment(tmp_path, {"a": springs(n=20), "b": springs(seed=1, n=10)}, a=more)
    _prepare(config_file)
    text = capsys.readouterr().out
    assert "labels: energy 30, forces 30, dipole 20 (66.7 %)" in text
    assert "a.xyz, 20 structures: energy 20, forces 20, dipole 20" in text
    assert "b.xyz, 10 structures: energy 10, forces 10\n" in text


def test_outliers_of_the_huber_fit_are_listed_by_source_and_index(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = springs(n=60)
    written.structures["energy"][17] += 1234.5
    tail = '[prepare.self_energies]\nfit_method = "huber"\n'
    tail += "[prepare.split]\ntrain = 1.0\nval = 0\ntest = 0\n"
    result = _prepare(_experiment(tmp_path, {"b": springs(seed=4, n=9), "a": written}, tail))
    worst = result["fit"]["outliers"][0]
    assert (worst["source"], worst["source_index"]) == (1, 17)
    assert worst["residual"] == pytest.approx(1234.5, abs=20)
    assert "the worst a.xyz structure 17 (+12" in capsys.readouterr().out


def test_a_prepared_dataset_is_a_source_too(tmp_path: Path) -> None:
    written = springs(n=50)
    first = _prepare(_experiment(tmp_path / "a", {"a": written}))
    text = (
        '[prepare]\nname = "y"\n[[prepare.source]]\n'
        f'path = "{first["dataset"]}"\n'
        'energy = { key = "energy" }\nforces = { key = "forces" }\n'
        "[prepare.filter]\nmax_atoms = 4\n"
    )
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.toml").write_text(text)
    second = PreparedDataset(Path(_prepare(tmp_path / "b" / "config.toml")["dataset"]))
    origins = np.concatenate(
        [PreparedDataset(Path(first["dataset"])).origins(n) for n in ("train", "val", "test")]
    )
    kept = [i for i in range(50) if i % 3 != 2]
    found = {int(origins[index][1]): total for (_, index), total in _totals(second).items()}
    assert sorted(found) == kept
    expected = written.structures["energy"][kept]
    assert [found[i] for i in kept] == pytest.approx(expected, abs=1e-9)


def test_memory_holds_no_more_than_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arrays of the atoms are mapped from files while a dataset is made."""
    seen = []
    monkeypatch.setattr(
        "runner.prepare.write_dataset",
        lambda path, structures, *args, **kwargs: (
            seen.append(structures),
            write_dataset(path, structures, *args, **kwargs),
        ),
    )
    _prepare(_experiment(tmp_path, {"a": springs(n=30)}))
    assert all(isinstance(array, np.memmap) for array in seen[0].atoms.values())
    assert {path.suffix for path in (tmp_path / "prepared").iterdir()} == {".zarr", ".png"}


SHARED = Path(__file__).parents[2] / "shared" / "data"
EV, FORCE = 'unit = "eV"', 'unit = "eV/angstrom"'
SPICE = """
positions = { unit = "bohr" }
energy = { key = "dft_total_energy", unit = "hartree" }
forces = { key = "dft_total_gradient", unit = "hartree/bohr", scale = -1 }
dipole = { key = "scf_dipole", unit = "e*bohr" }
quadrupole = { key = "scf_quadrupole", unit = "e*bohr**2", convention = "traced" }
charges = { key = "mbis_charges" }
"""
MODELFORGE = """
energy = { key = "internal_energy_at_0K" }
dipole = { key = "dipole_moment_per_system" }
charges = { key = "partial_charges" }
"""
ANI1X = """
energy = { key = "wb97x_dz.energy", unit = "hartree" }
forces = { key = "wb97x_dz.forces", unit = "hartree/angstrom" }
dipole = { key = "wb97x_dz.dipole", unit = "e*angstrom", missing = "nan" }
charges = { key = "wb97x_dz.cm5_charges", missing = "nan" }
"""
PHYSNET = """
energy = { key = "E", unit = "eV" }
forces = { key = "F", unit = "eV/angstrom" }
total_charge = { key = "Q" }
dipole = { key = "D", unit = "e*angstrom" }
"""
CARBENE = """
energy = { key = "energy" }
forces = { key = "forces" }
dipole = { key = "dipole_moment" }
total_charge = { key = "total_charge" }
spin_multiplicity = { key = "spin_multiplicity" }
"""


def _xyz(energy: str, forces: str) -> str:
    return f'energy = {{ key = "{energy}", {EV} }}\nforces = {{ key = "{forces}", {FORCE} }}\n'


REAL = [
    # file, labels, structures, rank of elements, what is warned of
    ("ethanol_methanol/train_eth_meth.xyz", _xyz("energy", "forces"), 1300, (2, 3), "fixes"),
    (
        "acetylacetone/train_300K.xyz",
        _xyz("energy", "forces"),
        500,
        (1, 3),
        "fixes 8 H + 5 C + 2 O",
    ),
    ("solvent_clusters/solvent_xtb_test.xyz", _xyz("energy_xtb", "forces_xtb"), 1000, (3, 3), ""),
    ("silicon_germanium/training.extxyz", _xyz("energy", "forces"), 442, (2, 2), ""),
    ("helium_h2p/H2pHe_cc_av5z_62834.npz", PHYSNET, 62834, (1, 2), 'dipole (key "D")'),
    ("formaldehyde/h2co_B3LYP_cc-pVDZ_4001.npz", PHYSNET, 4001, (1, 3), "fixes 2 H + C + O"),
    ("curated_hdf5/SPICE-1.1.4_n2.hdf5", SPICE, 55, None, ""),
    ("curated_hdf5/ani1_n5.hdf5", ANI1X, None, None, ""),
    ("curated_hdf5/qm9_dataset_v1.1_ntc_10.hdf5", MODELFORGE, 10, None, ""),
    (
        "ase_db/ase_carbene_2200.db",
        CARBENE,
        2200,
        (1, 2),
        "has the values 0, 2 (such as ase_carbene_2200.db",
    ),
]


@pytest.mark.parametrize(("name", "labels", "n", "rank", "warning"), REAL)
def test_real_files_are_prepared(
    name: str,
    labels: str,
    n: int | None,
    rank: tuple[int, int] | None,
    warning: str,
    tmp_path: Path,
) -> None:
    if not (SHARED / name).is_file():
        pytest.skip("the shared data is not there")
    text = f'[prepare]\nname = "x"\n[[prepare.source]]\npath = "{SHARED / name}"\n{labels}'
    text += "[prepare.split]\ntrain = 1.0\nval = 0\ntest = 0\n"
    (tmp_path / "config.toml").write_text(text)
    result = _prepare(tmp_path / "config.toml")
    if n is not None:
        assert result["structures"] == n
    if rank is not None:
        assert (result["fit"]["rank"], result["fit"]["n_elements"]) == rank
    dataset = PreparedDataset(Path(result["dataset"]))
    said = " ".join(dataset.attributes["warnings"])
    assert warning in said
    span = dataset.attributes["energy_range"]
    assert span["after"]["width"] == pytest.approx(span["before"]["width"], abs=1e-7)
    page = (dataset.path / "self_energies.html").read_text(encoding="utf-8")
    assert page.lstrip().lower().startswith("<!doctype html>")
