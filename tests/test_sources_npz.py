"""npz files: right numbers in the program's units, or an error that names file and structure."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import units as ase_units
from test_sources_hdf5 import Content, _difference, check_mutations, run_mutations

from runner.config import SourceConfig
from runner.errors import SourceError
from runner.sources import npz, raw
from runner.sources.labels import factors, to_structures

SHARED = Path(__file__).parents[2] / "shared" / "data"
KCAL_MOL = ase_units.kcal / ase_units.mol
ENERGY = {"key": "E", "unit": "eV"}
FORCES = {"key": "F", "unit": "eV/angstrom"}


def _read(path: Path, group_key: str | None = None, **sections: Any) -> dict[str, Any]:
    """Everything of a file by name, flat; `group` and `count` are those of the structures."""
    config = SourceConfig.model_validate({"path": str(path), "format": "npz", **sections})
    units = factors(path, config, npz.units(path), {})
    parts = [to_structures(part, config, units) for part in npz.read(path, config, group_key)]
    found: dict[str, Any] = {
        name: np.concatenate([{**p.atoms, **p.structures}[name] for p in parts])
        for name in (*parts[0].atoms, *parts[0].structures)
    }
    found["count"] = np.concatenate([np.diff(p.first_atom) for p in parts])
    if group_key is not None:
        found["group"] = [name for part in parts for name in part.group or ()]
    return found


def _error(path: Path, group_key: str | None = None, **sections: Any) -> str:
    with pytest.raises(SourceError) as error:
        _read(path, group_key, **(sections or {"energy": ENERGY}))
    assert str(path) in str(error.value)
    return str(error.value)


def _write(path: Path, arrays: dict[str, Any], packed: bool = False) -> Path:
    (np.savez_compressed if packed else np.savez)(path, **arrays)
    return path


def _physnet(seed: int = 0) -> dict[str, Any]:
    """Water, helium, hydrogen fluoride and water, padded to four places."""
    rng = np.random.default_rng(seed)
    return {
        "N": np.array([3, 1, 2, 3]),
        "Z": np.array([[8, 1, 1, 0], [2, 0, 0, 0], [9, 1, 0, 0], [1, 8, 1, 0]]),
        "R": rng.normal(size=(4, 4, 3)),
        "E": rng.normal(size=4),
        "F": rng.normal(size=(4, 4, 3)),
        "Q": np.array([0.0, 1.0, -1.0, 0.0]),
        "D": rng.normal(size=(4, 3)),
    }


def _sgdml(**more: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "type": "d",
        "name": "water",
        "r_unit": "Ang",
        "e_unit": "kcal/mol",
        "z": np.array([8, 1, 1], np.uint8),
        "R": rng.normal(size=(5, 3, 3)),
        "E": rng.normal(size=(5, 1)),
        "F": rng.normal(size=(5, 3, 3)),
        **more,
    }


# --------------------------------------------------------------------------------------------------
# Real files
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "helium_h2p/H2pHe_cc_av5z_62834.npz",
        "formaldehyde/h2co_B3LYP_cc-pVDZ_4001.npz",
        "formaldehyde/h2co_ccsdt_avtz_4001.npz",
    ],
)
def test_equal_to_numpy_on_real_files(name: str) -> None:
    path = SHARED / name
    if not path.is_file():
        pytest.skip("the shared data is not there")
    found = _read(
        path,
        energy=ENERGY,
        forces={"key": "F", "unit": "hartree/bohr"},
        total_charge={"key": "Q"},
        dipole={"key": "D", "unit": "e*angstrom"},
    )
    with np.load(path) as file:
        real = file["Z"] > 0
        assert np.array_equal(found["count"], file["N"])
        assert np.array_equal(found["atomic_numbers"], file["Z"][real])
        assert np.array_equal(found["positions"], file["R"][real])
        assert np.array_equal(found["energy"], file["E"])
        assert np.array_equal(found["total_charge"], file["Q"])
        assert np.array_equal(found["dipole"], file["D"])
        expected = file["F"][real] * (ase_units.Hartree / ase_units.Bohr)
        np.testing.assert_allclose(found["forces"], expected, rtol=1e-7, atol=1e-300)


# --------------------------------------------------------------------------------------------------
# Layouts, in made files
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 100])
def test_physnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, packed: bool) -> None:
    monkeypatch.setattr(raw, "CHUNK", chunk)
    made = _physnet() | {"charges": np.arange(16.0).reshape(4, 4)}
    made["F"] = np.asfortranarray(made["F"])
    made["E"] = made["E"].astype(">f8")
    made["which"] = np.array(["a", "b", "a", "ü"])
    path = _write(tmp_path / "x.npz", made, packed)
    found = _read(
        path,
        "which",
        energy=ENERGY,
        forces=FORCES,
        total_charge={"key": "Q"},
        dipole={"key": "D", "unit": "e*angstrom"},
        charges={"key": "charges"},
        spin_multiplicity={"value": 1},
    )
    real = made["Z"] > 0
    assert found["count"].tolist() == [3, 1, 2, 3]
    assert np.array_equal(found["atomic_numbers"], made["Z"][real])
    assert np.array_equal(found["positions"], made["R"][real])
    assert np.array_equal(found["forces"], made["F"][real])
    assert np.array_equal(found["charges"], made["charges"][real])
    assert np.array_equal(found["energy"], made["E"])
    assert np.array_equal(found["dipole"], made["D"])
    assert found["total_charge"].tolist() == [0, 1, -1, 0]
    assert found["spin_multiplicity"].tolist() == [1] * 4
    assert found["group"] == ["a", "b", "a", "ü"]
    assert npz.keys(path) == ["E", "F", "Q", "D", "charges"]
    assert npz.units(path) == {}


@pytest.mark.parametrize("text", [np.str_, np.bytes_])
@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_sgdml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, text: type[np.generic]
) -> None:
    monkeypatch.setattr(raw, "CHUNK", chunk)
    made = _sgdml(dipole=np.array([1.0, 2.0, 3.0]), Q=np.float32(-1))
    for key in ("type", "r_unit", "e_unit"):
        made[key] = np.array(made[key], text)
    path = _write(tmp_path / "x.npz", made)
    assert npz.units(path) == {"positions": "Ang", "E": "kcal/mol", "F": "kcal/mol/Ang"}
    found = _read(
        path,
        energy={"key": "E"},
        forces={"key": "F"},
        dipole={"key": "dipole", "unit": "e*angstrom"},
        total_charge={"key": "Q"},
    )
    assert found["atomic_numbers"].tolist() == [8, 1, 1] * 5
    assert np.array_equal(found["positions"], made["R"].reshape(-1, 3))
    np.testing.assert_allclose(found["energy"], made["E"].ravel() * KCAL_MOL, rtol=1e-7)
    np.testing.assert_allclose(found["forces"], made["F"].reshape(-1, 3) * KCAL_MOL, rtol=1e-7)
    np.testing.assert_allclose(found["energy"] / made["E"].ravel() / KCAL_MOL, 1.0, rtol=1e-7)
    assert found["dipole"].tolist() == [[1, 2, 3]] * 5
    assert found["total_charge"].tolist() == [-1] * 5


def test_sgdml_in_a_cell(tmp_path: Path) -> None:
    rows = np.array([[10.0, 0, 0], [1, 11, 0], [2, 3, 12]])
    path = _write(tmp_path / "x.npz", _sgdml(lattice=rows.T, r_unit="bohr"))
    found = _read(path, energy={"key": "E"})
    np.testing.assert_allclose(found["cell"], [rows * ase_units.Bohr] * 5, rtol=1e-7)
    assert found["pbc"].all()
    text = _error(_write(path, _sgdml(lattice=np.zeros(3))), energy={"key": "E"})
    assert '"lattice" is not nine numbers' in text


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_rmd17(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(raw, "CHUNK", chunk)
    rng = np.random.default_rng(0)
    made = {
        "nuclear_charges": np.array([6, 1, 1, 8]),
        "coords": rng.normal(size=(3, 4, 3)),
        "energies": rng.normal(size=3),
        "forces": rng.normal(size=(3, 4, 3)),
        "old_indices": np.array([5, 6, 7]),
    }
    path = _write(tmp_path / "x.npz", made)
    found = _read(
        path,
        "old_indices",
        energy={"key": "energies", "unit": "kcal/mol"},
        forces={"key": "forces", "unit": "kcal/mol/angstrom"},
    )
    assert found["atomic_numbers"].tolist() == [6, 1, 1, 8] * 3
    assert np.array_equal(found["positions"], made["coords"].reshape(-1, 3))
    np.testing.assert_allclose(found["energy"], made["energies"] * KCAL_MOL, rtol=1e-7)
    np.testing.assert_allclose(found["forces"], made["forces"].reshape(-1, 3) * KCAL_MOL, rtol=1e-7)
    assert found["group"] == ["5", "6", "7"]
    assert "energy needs a unit" in _error(path, energy={"key": "energies"})


def test_one_structure_and_one_value(tmp_path: Path) -> None:
    made = {k: v[:1] for k, v in _physnet().items()}
    found = _read(_write(tmp_path / "x.npz", made), energy=ENERGY, forces=FORCES)
    assert np.array_equal(found["energy"], made["E"])
    assert np.array_equal(found["forces"], made["F"][0, :3])


def test_only_what_is_wanted_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw, "CHUNK", 2)
    path = _write(tmp_path / "x.npz", _physnet())
    opened = set()
    original = zipfile.ZipFile.open

    def spy(self: Any, name: Any, *args: Any, **more: Any) -> Any:
        opened.add(name)
        return original(self, name, *args, **more)

    monkeypatch.setattr(zipfile.ZipFile, "open", spy)
    _read(path, energy=ENERGY)
    assert opened == {"N.npy", "Z.npy", "R.npy", "E.npy"}


# --------------------------------------------------------------------------------------------------
# Errors
# --------------------------------------------------------------------------------------------------


def test_what_is_no_whole_archive(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    path.write_text("no archive")
    assert "this is not an npz file, or it is cut off" in _error(path)
    whole = _write(tmp_path / "y.npz", _physnet()).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "this is not an npz file, or it is cut off" in _error(path)


@pytest.mark.parametrize("chunk", [1, 100])
@pytest.mark.parametrize("key", ["R", "Z", "N", "E"])
def test_a_checksum_that_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, chunk: int
) -> None:
    monkeypatch.setattr(raw, "CHUNK", chunk)
    path = _write(tmp_path / "x.npz", _physnet())
    with zipfile.ZipFile(path) as file:
        place = file.getinfo(f"{key}.npy").header_offset
    content = bytearray(path.read_bytes())
    crc = content.index(b"\x93NUMPY", place) + 128 + _physnet()[key].nbytes - 1
    content[crc] ^= 1  # the last byte of the last value
    path.write_bytes(content)
    text = _error(path)
    assert (
        "Bad CRC-32" in text or (key == "N" and "says" in text) or (key == "Z" and "says" in text)
    )


def test_python_objects_are_refused(tmp_path: Path) -> None:
    for key in ("E", "R", "N"):
        made = _physnet()
        made[key] = made[key].astype(object)
        text = _error(_write(tmp_path / "x.npz", made))
        assert f'"{key}" holds Python objects, which are not read' in text


def test_no_known_layout(tmp_path: Path) -> None:
    text = _error(_write(tmp_path / "x.npz", {"E": np.zeros(2), "X": np.zeros(2)}))
    assert "the arrays of the file are of no known layout: E, X" in text
    for words in ("R, Z, N (PhysNet)", "R, z (sGDML)", "coords, nuclear_charges (rMD17)"):
        assert words in text
    with zipfile.ZipFile(tmp_path / "y.npz", "w"):
        pass
    assert "no known layout: none" in _error(tmp_path / "y.npz")


def test_other_files_of_sgdml(tmp_path: Path) -> None:
    path = _write(tmp_path / "x.npz", _sgdml(type="t"))
    assert "the file is a training task of sGDML" in _error(path, energy={"key": "E"})


@pytest.mark.parametrize(
    ("key", "values", "expected"),
    [
        ("E", np.zeros(3), '"E" is an array of shape (3,), but there are 4 structures'),
        ("E", np.zeros((4, 2)), 'the key "E" holds an array of shape (4, 2)'),
        ("E", np.array(["1"] * 4), '"E" is of the type <U1'),
        ("E", np.zeros(4, bool), '"E" is of the type bool'),
        ("R", np.zeros((4, 12)), '"R" is an array of shape (4, 12)'),
        ("R", np.zeros((3, 4, 3)), "does not go with the positions"),
        ("N", np.array([3, 1, 2]), '"N" is an array of shape (3,)'),
        ("N", np.array([3.0, 1, 2, 3]), '"N" is of the type float64'),
        ("Z", np.zeros((4, 4)), '"Z" is of the type float64'),
        ("N", np.array([3, 1, 3, 3]), '"N" says 3 atoms, but "Z" is 9 1 0 0'),
        ("N", np.array([3, 1, -2, 3]), '"N" says -2 atoms, but "Z" is 9 1 0 0'),
    ],
)
def test_arrays_that_cannot_be(tmp_path: Path, key: str, values: Any, expected: str) -> None:
    text = _error(_write(tmp_path / "x.npz", _physnet() | {key: values}))
    assert expected in text
    if "says" in expected:
        assert "structure 2 (counted from 0)" in text


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_padding_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(raw, "CHUNK", chunk)
    made = _physnet()
    made["Z"][3] = [1, 0, 8, 1]
    text = _error(_write(tmp_path / "x.npz", made))
    assert '"N" says 3 atoms, but "Z" is 1 0 8 1' in text
    assert "structure 3 (counted from 0)" in text


def test_a_label_that_is_not_there_and_one_that_is_nan(tmp_path: Path) -> None:
    made = _physnet()
    made["E"][2] = np.nan
    path = _write(tmp_path / "x.npz", made)
    assert "structure 2 (counted from 0)" in _error(path)
    found = _read(path, energy={**ENERGY, "missing": "nan"}, charges={"key": "q"})
    assert np.isnan(found["energy"]).tolist() == [False, False, True, False]
    assert np.isnan(found["charges"]).all()


def test_groups_that_cannot_be(tmp_path: Path) -> None:
    path = _write(tmp_path / "x.npz", _physnet() | {"family": np.array(["a"] * 3)})
    assert 'did you mean "family"' in _error(path, "famly", energy=ENERGY)
    assert "cannot group 4 structures" in _error(path, "family", energy=ENERGY)


def test_a_header_that_says_more_than_there_is(tmp_path: Path) -> None:
    path = _write(tmp_path / "x.npz", _physnet())
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    members["E.npy"] = members["E.npy"].replace(b"(4,)", b"(9,)")
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    assert '"E" is damaged: it has not as many values as it says' in _error(path)


# --------------------------------------------------------------------------------------------------
# Damaged bytes
# --------------------------------------------------------------------------------------------------


def _contents(folder: Path) -> list[bytes]:
    arrays = _physnet() | {"which": np.array(["a", "b", "c", "d"])}
    return [
        _write(folder / f"whole{packed}.npz", arrays, packed).read_bytes()
        for packed in (False, True)
    ]


def _with_the_reader(path: Path) -> Content:
    found = _read(path, "which", energy=ENERGY)
    if np.isnan(found["energy"]).all():
        raise SourceError("what prepares a dataset refuses a label that no structure has")
    return found


def _with_numpy(path: Path) -> Content:
    with np.load(path, allow_pickle=False) as file:
        real = file["Z"] > 0
        return {
            "atomic_numbers": file["Z"][real],
            "positions": file["R"][real].astype(np.float64),
            "energy": file["E"].astype(np.float64),
            "group": [str(name) for name in file["which"]],
        }


def _compare(folder: Path, first: int, last: int, log: Path) -> None:
    path, contents = folder / "x.npz", _contents(folder)
    run_mutations(path, contents, _with_the_reader, _with_numpy, range(first, last), log)


def test_both_ways_of_reading_agree_on_whole_files(tmp_path: Path) -> None:
    for content in _contents(tmp_path):
        (tmp_path / "x.npz").write_bytes(content)
        both = (_with_the_reader(tmp_path / "x.npz"), _with_numpy(tmp_path / "x.npz"))
        assert _difference(*both) == ""


def test_damaged_bytes(tmp_path: Path) -> None:
    check_mutations(tmp_path, _compare, range(200))


@pytest.mark.slow
def test_damaged_bytes_at_length(tmp_path: Path) -> None:
    check_mutations(tmp_path, _compare, range(200, 10_200))
