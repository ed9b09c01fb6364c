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
from molecules import SELF_ENERGIES, springs, without, write_experiment, write_extxyz

from runner.config import load_config
from runner.errors import SelfEnergyError
from runner.fields import LABELS
from runner.prepare import default_data_dir, find_prepared, prepare
from runner.self_energies import compositions
from runner.store import PreparedDataset
from runner.structures import Structures
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
    assert attributes["units"] == {"atomic_numbers": "", "positions": "angstrom"} | {
        name: field.unit for name, field in LABELS.items()
    }


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
