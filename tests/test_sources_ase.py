"""ASE databases and other files of ASE: right numbers, or an error that says where."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.db import connect
from molecules import random_structures

from runner.config import SourceConfig
from runner.errors import InputError, SourceError
from runner.sources import ase_db, ase_io, raw
from runner.sources.labels import factors, to_structures
from runner.structures import Structures, concatenate

SHARED = Path(__file__).parents[2] / "shared" / "data"
CARBENE = SHARED / "ase_db" / "ase_carbene_2200.db"
ENERGY, FORCES = {"key": "energy"}, {"key": "forces"}
ALL = {
    "energy": ENERGY,
    "forces": FORCES,
    "stress": {"key": "stress"},
    "dipole": {"key": "dipole"},
    "charges": {"key": "charges"},
    "total_charge": {"key": "q"},
}


def _read(reader: ModuleType, path: Path, group: str | None = None, **labels: Any) -> Structures:
    """What the registry of the formats does with a reader."""
    form = "ase" if reader is ase_io else "ase_db"
    config = SourceConfig.model_validate(
        {"path": str(path), "format": form, **(labels or {"energy": ENERGY, "forces": FORCES})}
    )
    units = factors(path, config, reader.units(path), reader.USUAL)
    return concatenate(
        to_structures(part, config, units) for part in reader.read(path, config, group)
    )


def _error(reader: ModuleType, path: Path, group: str | None = None, **labels: Any) -> str:
    with pytest.raises(SourceError) as error:
        _read(reader, path, group, **labels)
    return str(error.value)


def _frames(n: int = 7, periodic: bool = True) -> list[Atoms]:
    """Made-up atoms with all results that ASE's calculators know; every other one is periodic."""
    made = random_structures([2 + index % 3 for index in range(n)], seed=n)
    rng = np.random.default_rng(n)
    frames = []
    for index in range(n):
        rows = slice(made.first_atom[index], made.first_atom[index + 1])
        cell = np.eye(3) * 9 + rng.normal(size=(3, 3)) * 0.3
        here = periodic and index % 2 == 0
        atoms = Atoms(
            made.atoms["atomic_numbers"][rows],
            made.atoms["positions"][rows],
            cell=cell if here else None,
            pbc=[True, True, index % 4 == 0] if here else False,
        )
        atoms.calc = SinglePointCalculator(
            atoms,
            energy=float(made.structures["energy"][index]) - 1e4,
            forces=made.atoms["forces"][rows],
            stress=rng.normal(size=6),
            dipole=made.structures["dipole"][index],
            charges=made.atoms["charges"][rows],
        )
        frames.append(atoms)
    return frames


def _write(path: Path, frames: list[Atoms]) -> Path:
    """A database with charges and groups in `key_value_pairs`, and more in `data`."""
    database = connect(str(path), use_lock_file=False)
    for index, atoms in enumerate(frames):
        database.write(
            atoms,
            key_value_pairs={"q": index % 3 - 1, "molecule": f"m{index % 4}"},
            data={"other": {"energy": 2.0 * index}, "mu": np.arange(3.0) + index},
        )
    if path.suffix == ".aselmdb":
        database.close()
        path.with_name(f"{path.name}-lock").unlink()
    return path


def _equal(found: Structures, frames: list[Atoms], stress: bool = True) -> None:
    assert np.array_equal(np.diff(found.first_atom), [len(atoms) for atoms in frames])
    per_atom = {
        "atomic_numbers": [atoms.numbers for atoms in frames],
        "positions": [atoms.positions for atoms in frames],
        "forces": [atoms.calc.results["forces"] for atoms in frames],
    }
    for name, expected in per_atom.items():
        assert np.array_equal(found.atoms[name], np.concatenate(expected)), name
    energies = [atoms.calc.results["energy"] for atoms in frames]
    assert np.array_equal(found.structures["energy"], energies)
    if any(atoms.pbc.any() for atoms in frames):
        assert np.array_equal(found.structures["pbc"], [atoms.pbc for atoms in frames])
        assert np.array_equal(found.structures["cell"], [np.array(atoms.cell) for atoms in frames])
    if stress:
        voigt = [(0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)]
        for column, (i, j) in enumerate(voigt):
            expected = [atoms.calc.results["stress"][column] for atoms in frames]
            assert np.array_equal(found.structures["stress"][:, i, j], expected)
            assert np.array_equal(found.structures["stress"][:, j, i], expected)
        dipoles = [atoms.calc.results["dipole"] for atoms in frames]
        charges = [atoms.calc.results["charges"] for atoms in frames]
        assert np.array_equal(found.structures["dipole"], dipoles)
        assert np.array_equal(found.atoms["charges"], np.concatenate(charges))


# --------------------------------------------------------------------------------------------------
# Databases
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".db", ".aselmdb"])
@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_a_database_is_equal_to_what_was_written(
    tmp_path: Path, suffix: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raw, "CHUNK", chunk)
    frames = _frames(7)
    path = _write(tmp_path / f"x{suffix}", frames)
    before = path.read_bytes()
    found = _read(ase_db, path, "molecule", **ALL)
    _equal(found, frames)
    assert list(found.structures["total_charge"]) == [index % 3 - 1 for index in range(7)]
    assert list(found.group or []) == [f"m{index % 4}" for index in range(7)]
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".db", ".aselmdb"])
def test_keys_are_those_of_results_pairs_and_data(tmp_path: Path, suffix: str) -> None:
    path = _write(tmp_path / f"x{suffix}", _frames(2))
    assert ase_db.keys(path) == [
        "charges", "dipole", "energy", "forces", "molecule", "mu", "other", "q", "stress",
    ]  # fmt: skip
    assert ase_db.units(path) == {}


@pytest.mark.parametrize("suffix", [".db", ".aselmdb"])
def test_rows_come_by_id_and_deleted_ones_do_not(tmp_path: Path, suffix: str) -> None:
    frames = _frames(6)
    path = _write(tmp_path / f"x{suffix}", frames)
    with connect(str(path), use_lock_file=False) as database:
        database.delete([2, 5])
    _equal(_read(ase_db, path), [frames[i] for i in (0, 2, 3, 5)], stress=False)


def test_equal_to_sqlite_on_a_real_file() -> None:
    if not CARBENE.is_file():
        pytest.skip("the shared data is not there")
    labels = {
        "energy": ENERGY,
        "forces": FORCES,
        "dipole": {"key": "dipole_moment"},
        "total_charge": {"key": "total_charge"},
        "spin_multiplicity": {"key": "spin_multiplicity"},
    }
    found = _read(ase_db, CARBENE, "spin_multiplicity", **labels)
    with contextlib.closing(sqlite3.connect(f"{CARBENE.as_uri()}?mode=ro", uri=True)) as database:
        rows = database.execute("SELECT numbers, positions, data FROM systems ORDER BY id")
        rows = rows.fetchall()
    assert len(found) == len(rows) == 2200
    assert not {"cell", "pbc"} & set(found.structures)
    names = ["energy", "forces", "total_charge", "spin_multiplicity", "dipole_moment"]
    for index, (numbers, positions, data) in enumerate(rows):
        atoms = slice(3 * index, 3 * index + 3)
        assert np.array_equal(found.atoms["atomic_numbers"][atoms], np.frombuffer(numbers, "<i4"))
        assert found.atoms["positions"][atoms].tobytes() == positions
        described = json.loads(data[int.from_bytes(data[:8], "little") :])
        for name in names:
            shape, dtype, offset = described[name]["__ndarray__"]
            expected = np.frombuffer(data, dtype, int(np.prod(shape)), offset)
            array = found.atoms["forces"][atoms] if name == "forces" else None
            if array is None:
                array = found.structures[name.removesuffix("_moment")][index]
            assert array.ravel() == pytest.approx(expected.astype(float), abs=1e-9)
    assert found.group == [str(s) for s in found.structures["spin_multiplicity"].tolist()]


def test_units_of_schnetpack_s_metadata_count() -> None:
    if not CARBENE.is_file():
        pytest.skip("the shared data is not there")
    assert ase_db.units(CARBENE) == {
        "energy": "eV", "forces": "eV/Ang", "dipole_moment": "eAng", "positions": "Ang",
    }  # fmt: skip
    message = _error(ase_db, CARBENE, energy={"key": "energy", "unit": "hartree"})
    assert 'the config gives energy the unit "hartree", but the file states "eV"' in message
    assert str(CARBENE) in message


def _schnetpack(path: Path, **values: Any) -> Path:
    """A database as schnetpack writes it, in hartree and bohr."""
    database = connect(str(path), use_lock_file=False)
    for index in range(3):
        atoms = Atoms("OH", [[0, 0, 0], [0, 0, 1.8 + index]])
        database.write(atoms, data={"energy": np.array([-1.5 - index]), **values})
    database.metadata = {
        "_property_unit_dict": {"energy": "Hartree", "q": 1.0, "weird": "furlong"},
        "_distance_unit": "bohr",
    }
    if path.suffix == ".aselmdb":
        database.close()
    return path


@pytest.mark.parametrize("suffix", [".db", ".aselmdb"])
def test_stated_units_are_converted(tmp_path: Path, suffix: str) -> None:
    path = _schnetpack(tmp_path / f"x{suffix}", q=1, weird=1.0)
    found = _read(ase_db, path, energy=ENERGY, total_charge={"key": "q"})
    hartree, bohr = 27.211386245988, 0.529177210903
    assert found.structures["energy"] == pytest.approx(-hartree * np.array([1.5, 2.5, 3.5]))
    assert found.atoms["positions"][1::2, 2] == pytest.approx(bohr * np.array([1.8, 2.8, 3.8]))
    assert list(found.structures["total_charge"]) == [1, 1, 1]
    assert "furlong" in _error(ase_db, path, energy={"key": "weird"})


def test_a_label_outside_the_results_needs_a_unit(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    database = connect(str(path), use_lock_file=False)
    database.write(Atoms("H"), data={"energy": -13.6})
    message = _error(ase_db, path, energy=ENERGY)
    assert 'the key "energy" needs a unit: it stands in data' in message
    assert "row id 1" in message
    found = _read(ase_db, path, energy={"key": "energy", "unit": "hartree"})
    assert found.structures["energy"] == pytest.approx([-13.6 * 27.211386245988])


def test_a_key_with_two_values_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    database = connect(str(path), use_lock_file=False)
    atoms = _frames(1)[0]
    energy = atoms.calc.results["energy"]
    database.write(atoms, data={"energy": np.array([energy])})
    assert list(_read(ase_db, path).structures["energy"]) == [energy]
    database.write(atoms, data={"energy": energy + 1e-9})
    message = _error(ase_db, path)
    assert 'the key "energy" has one value in the calculator results and another in data' in message
    assert f"{path}, row id 2" in message


def test_stress_as_six_numbers_in_ase_s_order_only(tmp_path: Path) -> None:
    frames = _frames(3)
    path = _write(tmp_path / "x.db", frames)
    six = {"key": "stress", "order": "xx yy zz yz xz xy"}
    assert np.array_equal(
        _read(ase_db, path, stress=six).structures["stress"],
        _read(ase_db, path, stress={"key": "stress"}).structures["stress"],
    )
    message = _error(ase_db, path, stress={"key": "stress", "order": "xx yy zz xy yz xz"})
    assert "another order than the config says" in message


def test_a_label_that_some_rows_lack_is_nan(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    database = connect(str(path), use_lock_file=False)
    frames = _frames(2, periodic=False)
    database.write(frames[0])
    database.write(Atoms(frames[1].numbers, frames[1].positions))
    found = _read(ase_db, path)
    assert np.isfinite(found.structures["energy"]).tolist() == [True, False]
    assert np.isnan(found.atoms["forces"][len(frames[0]) :]).all()


def test_what_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    path.write_text("not a database")
    assert "the file is not an ASE database: it is neither SQLite nor LMDB" in _error(ase_db, path)
    path.unlink()
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE t (x INTEGER)")
        other.commit()
    assert "the file is not an ASE database" in _error(ase_db, path)
    path.unlink()
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE systems (id INTEGER)")
        other.execute("CREATE TABLE information (name TEXT, value TEXT)")
        other.execute("INSERT INTO information VALUES ('version', '99')")
        other.commit()
    assert "version 99 of its format" in _error(ase_db, path)


@pytest.mark.parametrize("suffix", [".db", ".aselmdb"])
def test_a_database_without_rows_is_refused(tmp_path: Path, suffix: str) -> None:
    path = _write(tmp_path / f"x{suffix}", _frames(1))
    with connect(str(path), use_lock_file=False) as database:
        database.delete([1])
    assert "the database has no rows" in _error(ase_db, path)


@pytest.mark.parametrize("suffix", [".db", ".aselmdb"])
def test_a_database_that_is_cut_off_is_refused(tmp_path: Path, suffix: str) -> None:
    path = _write(tmp_path / f"x{suffix}", _frames(40))
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    message = _error(ase_db, path)
    assert str(path) in message
    assert "get" in message


def test_a_damaged_row_is_named(tmp_path: Path) -> None:
    path = _write(tmp_path / "x.db", _frames(4))
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("UPDATE systems SET forces = x'00' WHERE id = 3")
        database.commit()
    message = _error(ase_db, path)
    assert f"{path}, row id 3" in message
    assert "the row cannot be read" in message


def test_arrays_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "x.db", _frames(2))
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("UPDATE systems SET positions = zeroblob(24) WHERE id = 2")
        database.commit()
    message = _error(ase_db, path)
    assert "the positions have shape (1, 3), for 3 atoms" in message
    assert "row id 2" in message


def test_a_database_that_is_being_written_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "x.db", _frames(2))
    path.with_name("x.db-wal").write_bytes(b"x")
    assert "x.db-wal lies beside the database" in _error(ase_db, path)


def test_a_group_that_a_row_lacks_is_an_error(tmp_path: Path) -> None:
    path = _write(tmp_path / "x.db", _frames(2))
    assert 'no key "mol" to group by' in _error(ase_db, path, "mol")


def test_lmdb_without_the_extra_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _write(tmp_path / "x.aselmdb", _frames(2))
    monkeypatch.setitem(sys.modules, "lmdb", None)
    assert "pip install 'nnp-runner[aselmdb]'" in _error(ase_db, path)


def test_importing_the_reader_imports_no_backend() -> None:
    code = "import sys, runner.sources.ase_db, runner.sources.ase_io\n"
    code += (
        "print([m for m in ('lmdb', 'ase_db_backends', 'ase.db', 'ase.io') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --------------------------------------------------------------------------------------------------
# Other files
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.traj", "x.json", "y.xyz", "with@1.traj"])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_trajectories_are_equal_to_what_was_written(
    tmp_path: Path, name: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raw, "CHUNK", chunk)
    frames = _frames(7)
    labels = {key: label for key, label in ALL.items() if key != "total_charge"}
    with (tmp_path / name).open("w" if name != "x.traj" and "@" not in name else "wb") as file:
        format = {".traj": "traj", ".xyz": "extxyz"}.get(Path(name).suffix, "json")
        if format != "json":
            ase.io.write(file, frames, format=format)
    if format == "json":
        (tmp_path / name).unlink()
        ase.io.write(tmp_path / name, frames)
    if format == "extxyz":  # eight decimals
        found = _read(ase_io, tmp_path / name, **labels)
        assert found.structures["energy"] == pytest.approx(
            [atoms.calc.results["energy"] for atoms in frames], abs=1e-9
        )
        assert found.structures["stress"].shape == (7, 3, 3)
        return
    _equal(_read(ase_io, tmp_path / name, **labels), frames)


def test_formats_without_results_give_structures(tmp_path: Path) -> None:
    atoms = Atoms("NaCl", [[0, 0, 0], [2.8, 0.1, 0]], cell=[[5.6, 0, 0], [0.3, 5, 0], [0, 1, 6]],
                  pbc=True)  # fmt: skip
    for name in ("x.cif", "POSCAR", "x.xsf", "x.gen"):
        ase.io.write(tmp_path / name, atoms)
        found = _read(ase_io, tmp_path / name, total_charge={"value": 0})
        assert list(found.atoms["atomic_numbers"]) == [11, 17]
        distance = np.linalg.norm(np.diff(found.atoms["positions"], axis=0))
        assert distance == pytest.approx(np.hypot(2.8, 0.1), abs=1e-4)
        assert np.abs(np.linalg.det(found.structures["cell"])) == pytest.approx([168], abs=0.1)
        assert found.structures["pbc"].all()


def test_keys_and_groups_of_info_and_arrays(tmp_path: Path) -> None:
    frames = _frames(3)
    for index, atoms in enumerate(frames):
        atoms.info |= {"molecule": f"m{index}", "e2": -1.0 * index}
        atoms.set_array("q2", np.arange(len(atoms)) * 1.5)
    ase.io.write(tmp_path / "y.xyz", frames)
    keys = ase_io.keys(tmp_path / "y.xyz")
    assert {"energy", "forces", "stress", "molecule", "e2", "q2"} <= set(keys)
    assert not {"numbers", "positions"} & set(keys)
    found = _read(
        ase_io,
        tmp_path / "y.xyz",
        "molecule",
        energy={"key": "e2", "unit": "kcal/mol"},
        charges={"key": "q2"},
    )
    assert list(found.group or []) == ["m0", "m1", "m2"]
    assert found.structures["energy"] == pytest.approx(np.arange(3) * -0.0433641, rel=1e-5)
    expected = np.concatenate([np.arange(len(atoms)) * 1.5 for atoms in frames])
    assert np.array_equal(found.atoms["charges"], expected)


def test_an_unknown_format_lists_the_known_ones(tmp_path: Path) -> None:
    path = tmp_path / "x.what"
    path.write_text("something else\n")
    message = _error(ase_io, path)
    assert "the file is of no format that is known here" in message
    for words in ("extended XYZ", "HDF5", "npz", "DeePMD", "aselmdb", "prepared", 'format = "ase"'):
        assert words in message


def test_what_is_not_read_through_ase_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "x.db", _frames(1))
    assert 'write format = "ase_db"' in _error(ase_io, path)
    script = tmp_path / "x.py"
    script.write_text("raise SystemExit('executed')\n")
    assert "a Python file is a program" in _error(ase_io, script)
    pickled = tmp_path / "x.pckl"
    pickled.write_bytes(b"\x80\x04cos\nsystem\n(S'false'\ntR.")
    assert "no format that is known here" in _error(ase_io, pickled)


def test_a_cut_off_trajectory_names_file_and_structure(tmp_path: Path) -> None:
    path = tmp_path / "x.traj"
    ase.io.write(path, _frames(5))
    path.write_bytes(path.read_bytes()[:3000])
    message = _error(ase_io, path)
    assert f"{path}, structure " in message
    assert "ASE cannot read the structure" in message


def test_ase_s_warnings_are_not_passed_on(tmp_path: Path) -> None:
    path = tmp_path / "x.cif"
    ase.io.write(path, Atoms("H", cell=[1, 1, 1], pbc=True))
    path.write_text(path.read_text().replace("'P 1'", "'P 9 9 9'"))
    with warnings.catch_warnings(record=True) as caught, contextlib.suppress(SourceError):
        warnings.simplefilter("always")
        _read(ase_io, path, total_charge={"value": 0})
    assert not caught


# --------------------------------------------------------------------------------------------------
# Damage
# --------------------------------------------------------------------------------------------------


def _mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """One to three bytes overwritten, deleted or put in, or the end cut off."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        kind, at = rng.integers(0, 8), int(rng.integers(0, max(len(data), 1)))
        if kind < 5:
            data[at : at + 1] = rng.bytes(1)
        elif kind == 5:
            del data[at : at + int(rng.integers(1, 5))]
        elif kind == 6:
            data[at:at] = rng.bytes(int(rng.integers(1, 5)))
        else:
            del data[at:]
    return bytes(data)


def _mutations(path: Path, first: int, count: int) -> Iterator[None]:
    """Puts damaged copies of a file in its place, one after another."""
    content = path.read_bytes()
    for seed in range(first, first + count):
        path.unlink()
        path.write_bytes(_mutated(content, np.random.default_rng(seed)))
        yield


def _from_ase(images: list[Atoms]) -> tuple[np.ndarray, ...]:
    """Positions, energies and forces of the images, NaN where they are missing."""
    forces = [
        np.reshape(results.get("forces", np.full((len(atoms), 3), np.nan)), (-1, 3))
        for atoms in images
        for results in [atoms.calc.results if atoms.calc else {}]
    ]
    energies = [(a.calc.results if a.calc else {}).get("energy", np.nan) for a in images]
    numbers = np.concatenate([atoms.numbers for atoms in images])
    positions = np.concatenate([atoms.positions for atoms in images])
    return numbers, positions, np.array(energies, float), np.concatenate(forces)


def _check(reader: ModuleType, path: Path, images: Any) -> bool:
    """Whether a file is read; if it is, then exactly as by ASE."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "Setting the shape on", DeprecationWarning)
            warnings.filterwarnings("ignore", "unclosed database", ResourceWarning)  # by ASE
            found = _read(reader, path)
    except InputError:
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        numbers, positions, energies, forces = _from_ase(images(path))
    assert np.array_equal(found.atoms["atomic_numbers"], numbers)
    assert np.array_equal(found.atoms["positions"], positions)
    assert np.array_equal(found.structures["energy"], energies, equal_nan=True)
    assert np.array_equal(found.atoms["forces"], forces, equal_nan=True)
    return True


def _rows_of(path: Path) -> list[Atoms]:
    """The rows of a database: LMDB by ASE's backend, SQLite without ASE."""
    if path.suffix == ".aselmdb":
        with connect(str(path), use_lock_file=False, readonly=True) as database:
            return [row.toatoms() for row in database.select()]
    images = []
    query = "SELECT numbers, positions, energy, forces FROM systems ORDER BY id"
    with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
        for numbers, positions, energy, forces in database.execute(query):
            atoms = Atoms(np.frombuffer(numbers, "<i4"), np.frombuffer(positions).reshape(-1, 3))
            found = {"energy": energy, "forces": None if forces is None else np.frombuffer(forces)}
            atoms.calc = SinglePointCalculator(atoms, **found)
            images.append(atoms)
    return images


def _images_of(path: Path) -> list[Atoms]:
    return list(ase.io.iread(str(path), ":"))


def _try_mutations(folder: Path, name: str, first: int, count: int) -> int:
    """Number of damaged files that were read."""
    path = folder / name
    reader, images = (
        (ase_db, _rows_of) if path.suffix in (".db", ".aselmdb") else (ase_io, _images_of)
    )
    frames = _frames(3)
    _write(path, frames) if reader is ase_db else ase.io.write(path, frames)
    assert _check(reader, path, images)
    return sum(_check(reader, path, images) for _ in _mutations(path, first, count))


NAMES = ["x.db", "x.aselmdb", "x.traj", "x.json"]


@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_give_an_error_or_what_ase_reads(tmp_path: Path, name: str) -> None:
    _try_mutations(tmp_path, name, 0, 200)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("part", range(10))
def test_many_damaged_files(tmp_path: Path, name: str, part: int) -> None:
    _try_mutations(tmp_path, name, 1000 + 1000 * part, 1000)
    shutil.rmtree(tmp_path)
