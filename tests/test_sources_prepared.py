"""Prepared datasets as sources: absolute energies and everything else come back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase.data import chemical_symbols
from molecules import SELF_ENERGIES, springs, without, write_experiment

from runner.config import SourceConfig, load_config
from runner.errors import DatasetError, InputError, SourceError
from runner.fields import FIELDS
from runner.prepare import prepare
from runner.sources import prepared
from runner.sources.labels import factors, to_structures
from runner.store import SCHEMA_VERSION, PreparedDataset, write_dataset
from runner.structures import Structures, concatenate
from runner.terminal import Terminal

ALL = {name: {"key": name} for name in ("energy", "forces", "dipole", "charges", "total_charge")}


def _read(path: Path, group: str | None = None, **labels: Any) -> Structures:
    """What the registry of the formats does with a reader."""
    config = SourceConfig.model_validate(
        {"path": str(path), "format": "prepared", **(labels or ALL)}
    )
    units = factors(path, config, prepared.units(path), prepared.USUAL)
    return concatenate(
        to_structures(part, config, units) for part in prepared.read(path, config, group)
    )


def _error(path: Path, kind: type[InputError], group: str | None = None, **labels: Any) -> str:
    with pytest.raises(kind) as error:
        _read(path, group, **labels)
    return str(error.value)


def _write(path: Path, structures: Structures, **attributes: Any) -> Path:
    """A dataset of three splits, the second empty, the energies as they are given."""
    n = len(structures)
    write_dataset(
        path,
        structures,
        {
            "schema_version": SCHEMA_VERSION,
            "splits": {"train": [0, n - 2], "val": [n - 2, n - 2], "test": [n - 2, n]},
            "self_energies": {chemical_symbols[z]: e for z, e in SELF_ENERGIES.items()},
            "units": {name: field.unit for name, field in FIELDS.items()},
            "statistics": {"coverage": dict.fromkeys(("energy", "forces"), n)},
            **attributes,
        },
        lambda picture: picture.touch(),
    )
    return path


def _corrected(structures: Structures, energies: dict[int, float]) -> np.ndarray:
    """Energies without those of the elements, summed in the plainest way."""
    result = structures.structures["energy"].copy()
    for index in range(len(structures)):
        rows = slice(structures.first_atom[index], structures.first_atom[index + 1])
        result[index] -= sum(energies[int(z)] for z in structures.atoms["atomic_numbers"][rows])
    return result


def _with(structures: Structures, **arrays: np.ndarray) -> Structures:
    return replace(structures, structures=structures.structures | arrays)


def test_absolute_energies_come_back_from_what_prepare_made(tmp_path: Path) -> None:
    written = springs(n=50)
    config_file = write_experiment(tmp_path, written)
    result = prepare(load_config(config_file), tmp_path / "prepared", Terminal())
    path = Path(result["dataset"])
    found = _read(path, "split", energy={"key": "energy"}, forces={"key": "forces"},
                  dipole={"key": "dipole"}, total_charge={"key": "total_charge"})  # fmt: skip
    original = written.take(_source_indices(path))
    assert len(found) == 50
    assert np.abs(found.structures["energy"] - original.structures["energy"]).max() < 1e-9
    for name in ("positions", "forces", "atomic_numbers"):
        assert np.array_equal(found.atoms[name], original.atoms[name])
    for name in ("dipole", "total_charge"):
        assert np.array_equal(found.structures[name], original.structures[name])
    assert list(found.group or []) == ["train"] * 40 + ["val"] * 5 + ["test"] * 5
    assert set(prepared.keys(path)) == {"energy", "forces", "dipole", "total_charge"}
    assert prepared.units(path)["energy"] == "eV"


def _source_indices(path: Path) -> np.ndarray:
    """Which of the written structures are stored, in their order."""
    dataset = PreparedDataset(path)
    parts = [dataset.read(split) for split in dataset.attributes["splits"]]
    return np.concatenate([part.structures["source_index"] for part in parts])


def test_cells_and_missing_labels_come_back(tmp_path: Path) -> None:
    made = without(without(springs(n=9), "energy", [1, 8]), "forces", [0, 7])
    rng = np.random.default_rng(0)
    pbc = rng.random((9, 3)) < 0.6
    cell = (np.eye(3) * 9 + rng.normal(size=(9, 3, 3))) * pbc.any(axis=1)[:, None, None]
    made = _with(made, cell=cell, pbc=pbc)
    stored = _with(made, energy=_corrected(made, SELF_ENERGIES))
    found = _read(_write(tmp_path / "x.zarr", stored))
    assert np.array_equal(found.structures["cell"], cell)
    assert np.array_equal(found.structures["pbc"], pbc)
    assert np.array_equal(found.atoms["forces"], made.atoms["forces"], equal_nan=True)
    assert np.array_equal(found.atoms["charges"], made.atoms["charges"])
    energies = made.structures["energy"]
    assert np.array_equal(np.isnan(found.structures["energy"]), np.isnan(energies))
    assert np.nanmax(np.abs(found.structures["energy"] - energies)) < 1e-9


def test_levels_of_theory_are_not_mixed(tmp_path: Path) -> None:
    made = springs(n=12)
    several = _write(tmp_path / "x.zarr", made, levels=["b3lyp", "ccsd"])
    text = _error(several, SourceError, energy={"key": "energy"})
    assert "several levels of theory, b3lyp, ccsd, which cannot share self-energies" in text
    assert "prepare from the files that it was made from" in text
    one = _write(tmp_path / "y.zarr", made, levels=["ccsd"])
    text = _error(one, SourceError, energy={"key": "energy"})
    assert 'energies of the level "ccsd", and the source says none' in text
    assert 'write level_of_theory = "ccsd"' in text
    assert len(_read(one, energy={"key": "energy"}, level_of_theory="ccsd")) == 12
    assert len(_read(several, forces={"key": "forces"})) == 12


def test_a_dataset_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write(tmp_path / "x.zarr", springs(n=12))
    whole = _read(path)
    monkeypatch.setattr(prepared, "PART", 3)
    found = _read(path)
    for name, array in (whole.atoms | whole.structures).items():
        assert np.array_equal((found.atoms | found.structures)[name], array, equal_nan=True)
    bad = springs(n=12)
    bad.structures["energy"][7] = np.inf
    text = _error(_write(tmp_path / "y.zarr", bad), SourceError)
    assert "split train, structure 7 (counted from 0)" in text


def test_values_and_keys_that_are_not_there(tmp_path: Path) -> None:
    path = _write(tmp_path / "x.zarr", springs(n=5))
    found = _read(
        path,
        charges={"value": 0.5},
        total_charge={"value": 2},
        dipole={"key": "mu", "unit": "debye"},
    )
    assert (found.atoms["charges"] == 0.5).all()
    assert found.structures["total_charge"].tolist() == [2.0] * 5
    assert np.isnan(found.structures["dipole"]).all()


def test_what_cannot_be_a_label_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "x.zarr", springs(n=5))
    message = _error(path, SourceError, total_charge={"key": "charges"})
    assert 'the key "charges" holds an array of float64' in message
    assert f"{path}, split train, structure 0 (counted from 0)" in message
    message = _error(path, SourceError, charges={"key": "total_charge"})
    assert "cannot be the label charges" in message
    assert "has the wrong dimension" in _error(path, SourceError, energy={"key": "forces"})
    message = _error(path, SourceError, energy={"key": "energy", "unit": "hartree"})
    assert 'the config gives energy the unit "hartree", but the file states "eV"' in message


def test_only_splits_are_groups(tmp_path: Path) -> None:
    path = _write(tmp_path / "x.zarr", springs(n=5))
    assert list(_read(path, "split").group or []) == ["train"] * 3 + ["test"] * 2
    message = _error(path, SourceError, "molecule")
    assert 'a prepared dataset has no key "molecule" to group by' in message


def test_an_element_without_a_self_energy_is_an_error(tmp_path: Path) -> None:
    path = _write(tmp_path / "x.zarr", springs(n=5), self_energies={"H": -13.6, "C": -1029.8})
    message = _error(path, DatasetError)
    assert "the prepared dataset has no self-energy for" in message
    assert str(path) in message


def test_a_folder_that_is_no_dataset_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.zarr").mkdir()
    assert "the prepared dataset is damaged" in _error(tmp_path / "x.zarr", DatasetError)
    path = _write(tmp_path / "y.zarr", springs(n=5))
    for chunk in (path / "structures" / "energy").rglob("c/*"):
        chunk.write_bytes(chunk.read_bytes()[:-9])
    assert "energy" in _error(path, DatasetError)


@pytest.mark.parametrize(
    "seeds", [range(150), pytest.param(range(150, 10_150), marks=pytest.mark.slow)]
)
def test_mutations_give_an_error_or_the_right_numbers(tmp_path: Path, seeds: range) -> None:
    path = _write(tmp_path / "x.zarr", springs(n=6))
    expected = _read(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    refused = 0
    for seed in seeds:
        rng = np.random.default_rng(seed)
        file = files[int(rng.integers(len(files)))]
        content = file.read_bytes()
        damaged = bytearray(content)
        at = int(rng.integers(len(content)))
        if seed % 3 == 0:
            damaged[at] ^= 1 << int(rng.integers(8))
        elif seed % 3 == 1:
            damaged[at:at] = rng.bytes(int(rng.integers(1, 4)))
        else:
            del damaged[at : at + int(rng.choice([1, 3, len(content)]))]
        file.write_bytes(damaged)
        try:
            found = _read(path)
        except InputError:
            refused += 1
        else:
            for name, array in (expected.atoms | expected.structures).items():
                same = (found.atoms | found.structures)[name]
                assert np.array_equal(same, array, equal_nan=True), (seed, file, name)
        file.write_bytes(content)
    assert refused > len(seeds) / 2
