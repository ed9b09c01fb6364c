"""DeePMD folders: right numbers, or an error that says which file is wrong."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase.data import atomic_numbers as ATOMIC_NUMBER_OF
from test_sources_ase import _mutations

from runner.config import SourceConfig
from runner.errors import InputError, SourceError
from runner.sources import deepmd, raw
from runner.sources.labels import factors, to_structures
from runner.structures import Structures, concatenate
from runner.units import conversion_factor

LABELS = {
    "energy": {"key": "energy"},
    "forces": {"key": "force"},
    "stress": {"key": "virial", "virial": True},
    "dipole": {"key": "dipole", "unit": "debye"},
}


def _read(path: Path, group: str | None = None, **labels: Any) -> Structures:
    """What the registry of the formats does with a reader."""
    config = SourceConfig.model_validate(
        {"path": str(path), "format": "deepmd", **(labels or LABELS)}
    )
    units = factors(path, config, deepmd.units(path), deepmd.USUAL)
    return concatenate(
        to_structures(part, config, units) for part in deepmd.read(path, config, group)
    )


def _error(path: Path, group: str | None = None, **labels: Any) -> str:
    with pytest.raises(SourceError) as error:
        _read(path, group, **labels)
    return str(error.value)


def _arrays(n: int, atoms: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "coord": rng.normal(size=(n, 3 * atoms)) * 3,
        "box": (np.eye(3) * 11 + rng.normal(size=(n, 3, 3)) * 0.2).reshape(n, 9),
        "energy": rng.normal(size=n) - 1e4,
        "force": rng.normal(size=(n, 3 * atoms)),
        "virial": rng.normal(size=(n, 9)),
        "dipole": rng.normal(size=(n, 3)),
    }


def _write(path: Path, sizes: tuple[int, ...] = (3, 2)) -> list[dict[str, np.ndarray]]:
    """A periodic system of O H H with a set for each size."""
    path.mkdir()
    (path / "type.raw").write_text("0\n1\n1\n")
    (path / "type_map.raw").write_text("O\nH\n")
    sets = [_arrays(n, 3, seed) for seed, n in enumerate(sizes)]
    for number, arrays in enumerate(sets):
        folder = path / f"set.{number:03}"
        folder.mkdir()
        for key, array in arrays.items():
            np.save(folder / f"{key}.npy", array)
    return sets


def _put_together(sets: list[dict[str, np.ndarray]], key: str) -> np.ndarray:
    return np.concatenate([arrays[key] for arrays in sets])


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 100])
def test_equal_to_what_was_written(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raw, "CHUNK", chunk)
    sets = _write(tmp_path / "x", (5, 3, 1))
    found = _read(tmp_path / "x")
    assert len(found) == 9
    assert found.atoms["atomic_numbers"].tolist() == [8, 1, 1] * 9
    assert np.array_equal(found.atoms["positions"], _put_together(sets, "coord").reshape(-1, 3))
    assert np.array_equal(found.atoms["forces"], _put_together(sets, "force").reshape(-1, 3))
    assert np.array_equal(found.structures["energy"], _put_together(sets, "energy"))
    cells = _put_together(sets, "box").reshape(-1, 3, 3)
    assert np.array_equal(found.structures["cell"], cells)
    assert found.structures["pbc"].all()
    virial = _put_together(sets, "virial").reshape(-1, 3, 3)
    volume = np.abs(np.linalg.det(cells))[:, None, None]
    assert found.structures["stress"] == pytest.approx(-virial / volume, rel=1e-12)
    debye = 0.20819433270
    assert found.structures["dipole"] == pytest.approx(_put_together(sets, "dipole") * debye)


def test_keys_are_the_names_of_the_files(tmp_path: Path) -> None:
    _write(tmp_path / "x")
    assert deepmd.keys(tmp_path / "x") == ["dipole", "energy", "force", "virial"]


@pytest.mark.parametrize("how", ["float32", "fortran", "big", "shaped", "column"])
def test_other_ways_to_store_the_same(tmp_path: Path, how: str) -> None:
    sets = _write(tmp_path / "x", (4,))
    change = {
        "float32": lambda a: a.astype(np.float32),
        "fortran": np.asfortranarray,
        "big": lambda a: a.astype(">f8"),
        "shaped": lambda a: a.reshape(4, -1, 3) if a.ndim == 2 else a,
        "column": lambda a: a[:, None] if a.ndim == 1 else a,
    }[how]
    for key, array in sets[0].items():
        np.save(tmp_path / "x" / "set.000" / f"{key}.npy", change(array))
    found = _read(tmp_path / "x")
    exact = {key: change(array).astype(np.float64) for key, array in sets[0].items()}
    assert np.array_equal(found.atoms["positions"], exact["coord"].reshape(-1, 3))
    assert np.array_equal(found.atoms["forces"], exact["force"].reshape(-1, 3))
    assert np.array_equal(found.structures["energy"], exact["energy"].ravel())


def test_a_single_frame_may_be_flat(tmp_path: Path) -> None:
    sets = _write(tmp_path / "x", (1,))
    for key, array in sets[0].items():
        np.save(tmp_path / "x" / "set.000" / f"{key}.npy", array.ravel())
    found = _read(tmp_path / "x")
    assert np.array_equal(found.atoms["forces"], sets[0]["force"].reshape(3, 3))
    assert np.array_equal(found.structures["cell"], sets[0]["box"].reshape(1, 3, 3))


def test_nopbc_makes_molecules(tmp_path: Path) -> None:
    _write(tmp_path / "x")
    (tmp_path / "x" / "nopbc").touch()
    assert not {"cell", "pbc"} & set(_read(tmp_path / "x", energy={"key": "energy"}).structures)
    for folder in (tmp_path / "x").glob("set.*"):
        (folder / "box.npy").unlink()
    assert len(_read(tmp_path / "x", energy={"key": "energy"})) == 5


def test_a_set_without_a_label_has_it_missing(tmp_path: Path) -> None:
    _write(tmp_path / "x")
    (tmp_path / "x" / "set.001" / "force.npy").unlink()
    found = _read(tmp_path / "x")
    assert np.isfinite(found.atoms["forces"]).all(axis=1).tolist() == [True] * 9 + [False] * 6
    assert np.isfinite(found.structures["energy"]).all()


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_mixed_types_with_places_without_an_atom(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raw, "CHUNK", chunk)
    sets = _write(tmp_path / "x")
    (tmp_path / "x" / "type.raw").write_text("0\n0\n0\n")
    types = np.array([[0, 1, 1], [1, 1, -1], [1, -1, 0], [0, -1, -1], [0, 0, 0]])
    np.save(tmp_path / "x" / "set.000" / "real_atom_types.npy", types[:3].astype(np.int32))
    np.save(tmp_path / "x" / "set.001" / "real_atom_types.npy", types[3:])
    found = _read(tmp_path / "x")
    assert np.diff(found.first_atom).tolist() == [3, 2, 2, 1, 3]
    assert found.atoms["atomic_numbers"].tolist() == [8, 1, 1, 1, 1, 1, 8, 8, 8, 8, 8]
    real = types >= 0
    force = _put_together(sets, "force").reshape(5, 3, 3)
    assert np.array_equal(found.atoms["forces"], force[real])
    assert "set.000" in _refused_types(tmp_path / "x", np.array([[0, 2, 1]] * 3))
    assert "whole numbers" in _refused_types(tmp_path / "x", np.zeros((3, 3)))
    assert "whole numbers" in _refused_types(tmp_path / "x", np.zeros((3, 2), int))
    (tmp_path / "x" / "set.000" / "real_atom_types.npy").unlink()
    assert "some sets have a real_atom_types.npy" in _error(tmp_path / "x")


def _refused_types(path: Path, types: np.ndarray) -> str:
    file = path / "set.000" / "real_atom_types.npy"
    kept = file.read_bytes()
    np.save(file, types)
    message = _error(path)
    file.write_bytes(kept)
    return message


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    path = tmp_path / "x"
    sets = _write(path)
    box = path / "set.001" / "box.npy"
    box.unlink()
    message = _error(path)
    assert "the set has no box.npy, though the system is periodic" in message
    assert f"make an empty file {path / 'nopbc'}" in message
    np.save(box, sets[1]["box"])
    (path / "set.001" / "coord.npy").unlink()
    assert "the set has no coord.npy" in _error(path)
    shutil.rmtree(path / "set.001")
    (path / "type_map.raw").unlink()
    message = _error(path)
    assert "there is no type_map.raw with the names of the types" in message
    assert "write the chemical symbols of types 0, 1, … into it" in message
    (path / "type_map.raw").write_text("O H")
    (path / "type.raw").unlink()
    assert "there is no type.raw with the type of each atom" in _error(path)
    shutil.rmtree(path / "set.000")
    message = _error(path)
    assert "no set.* in it" in message
    assert 'path = "data/*"' in message


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    path = tmp_path / "x"
    sets = _write(path, (3,))
    (path / "type.raw").write_text("0 1 2")
    assert "the type 2 is not in type_map.raw, which names 2" in _error(path)
    (path / "type.raw").write_text("0 1 -1")
    assert 'found "-1" where a type should stand' in _error(path)
    (path / "type.raw").write_text(" \n")
    assert "type.raw is empty" in _error(path)
    (path / "type.raw").write_text("0 1 1 1")
    message = _error(path)
    assert "coord.npy" in message
    assert "12 numbers a frame" in message
    (path / "type.raw").write_text("0 1 1")
    (path / "type_map.raw").write_text("O Hx")
    assert "'Hx' is not an element" in _error(path)
    (path / "type_map.raw").write_bytes(b"O \0")  # which numpy takes for an empty name
    assert "is not an element" in _error(path)
    (path / "type_map.raw").write_text("O H")
    file = path / "set.000" / "energy.npy"
    np.save(file, sets[0]["energy"][:2])
    assert "shape (2,), but coord.npy has 3 frames" in _error(path)
    np.save(file, np.array([{}, 1, 2]), allow_pickle=True)
    message = _error(path)
    assert f"{file}" in message
    assert "the array cannot be read" in message
    file.write_bytes(b"\x93NUMPY")
    assert "the array cannot be read" in _error(path)
    np.save(file, sets[0]["energy"] * np.array([1, np.nan, 1]))
    message = _error(path)
    assert "energy is NaN" in message
    assert "set.000, frame 1 (counted from 0)" in message


def test_a_key_of_another_shape_is_refused(tmp_path: Path) -> None:
    _write(tmp_path / "x", (3,))
    message = _error(tmp_path / "x", dipole={"key": "energy", "unit": "e*angstrom"})
    assert 'the key "energy" holds an array of float64, 1 a frame' in message
    message = _error(tmp_path / "x", energy={"key": "energy"}, forces=LABELS["dipole"] | {
        "unit": "eV/angstrom"
    })  # fmt: skip
    assert "cannot be the label forces" in message


def test_there_are_no_groups(tmp_path: Path) -> None:
    _write(tmp_path / "x")
    assert 'a DeePMD folder has no key "molecule" to group by' in _error(tmp_path / "x", "molecule")


# --------------------------------------------------------------------------------------------------
# Damage
# --------------------------------------------------------------------------------------------------

READ = ("coord", "box", "energy", "force", "dipole")
FILES = [
    "type.raw",
    "type_map.raw",
    *(f"set.000/{key}.npy" for key in READ),
]


def _check(path: Path) -> bool:
    """Whether a folder is read; if it is, then exactly as by numpy."""
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # of cells as large as 1e200
            found = _read(path, **{name: LABELS[name] for name in ("energy", "forces", "dipole")})
    except InputError:
        return False
    sets = [
        {key: np.load(folder / f"{key}.npy") for key in READ}
        for folder in sorted(path.glob("set.*"))
    ]
    types = [int(text) for text in re.findall(rb"[0-9]+", (path / "type.raw").read_bytes())]
    names = re.findall("[A-Za-z]+", (path / "type_map.raw").read_text("latin-1"))
    numbers = [ATOMIC_NUMBER_OF[names[index]] for index in types]
    assert found.atoms["atomic_numbers"].tolist() == numbers * len(found)
    energies = np.concatenate([arrays["energy"].astype(float).ravel() for arrays in sets])
    assert np.array_equal(found.structures["energy"], energies)
    for name, key in (("positions", "coord"), ("forces", "force")):
        expected = [arrays[key].astype(float).reshape(-1, 3) for arrays in sets]
        assert np.array_equal(found.atoms[name], np.concatenate(expected))
    debye = conversion_factor("debye", "e*angstrom")
    dipoles = np.concatenate([arrays["dipole"].astype(float).reshape(-1, 3) for arrays in sets])
    assert np.array_equal(found.structures["dipole"], dipoles * debye)
    boxes = [arrays["box"].astype(float).reshape(-1, 3, 3) for arrays in sets]
    assert np.array_equal(found.structures["cell"], np.concatenate(boxes))
    return True


def _try_mutations(path: Path, name: str, first: int, count: int) -> int:
    """Number of damaged folders that were read."""
    _write(path, (2, 1))
    assert _check(path)
    return sum(_check(path) for _ in _mutations(path / name, first, count))


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_give_an_error_or_what_numpy_reads(tmp_path: Path, name: str) -> None:
    _try_mutations(tmp_path / "x", name, 0, 200)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_many_damaged_files(tmp_path: Path, name: str) -> None:
    _try_mutations(tmp_path / "x", name, 1000, 10_000)
