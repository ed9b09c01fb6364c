"""HDF5 files: right numbers in the program's units, or an error that names file and group."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from ase import units as ase_units
from ase.data import atomic_numbers

from runner.config import SourceConfig
from runner.errors import InputError, SourceError
from runner.sources import hdf5, raw
from runner.sources.labels import factors, to_structures
from runner.units import conversion_factor

SHARED = Path(__file__).parents[2] / "shared" / "data"
CURATED = SHARED / "curated_hdf5"
HARTREE, BOHR = ase_units.Hartree, ase_units.Bohr
KJ_MOL = ase_units.kJ / ase_units.mol
ENERGY = {"key": "energies", "unit": "eV"}
FORCES = {"key": "forces", "unit": "eV/angstrom"}


def _read(path: Path, group_key: str | None = None, **sections: Any) -> dict[str, Any]:
    """Everything of a file by name, flat; `group` and `count` are those of the structures."""
    config = SourceConfig.model_validate({"path": str(path), "format": "hdf5", **sections})
    units = factors(path, config, hdf5.units(path), {})
    parts = [to_structures(part, config, units) for part in hdf5.read(path, config, group_key)]
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


def _write(path: Path, groups: dict[str, dict[str, Any]], **attributes: str) -> Path:
    """A file of groups of datasets; `attributes` are the `units` of the datasets."""
    with h5py.File(path, "w") as file:
        for name, arrays in groups.items():
            for key, values in arrays.items():
                dataset = file.create_dataset(f"{name}/{key}", data=values)
                if key in attributes:
                    dataset.attrs["units"] = attributes[key]
    return path


def _water(n: int = 3, seed: int = 0) -> dict[str, Any]:
    """Conformers of water in the layout of ANI-1."""
    rng = np.random.default_rng(seed)
    return {
        "coordinates": rng.normal(size=(n, 3, 3)),
        "species": np.array([b"O", b"H", b"H"]),
        "energies": rng.normal(size=n),
        "forces": rng.normal(size=(n, 3, 3)),
    }


def _same(found: np.ndarray, raw_values: np.ndarray, factor: float) -> None:
    """The factor to the accuracy of ASE's constants, each number to 1e-9."""
    wanted = np.asarray(raw_values, np.float64).reshape(found.shape)
    np.testing.assert_allclose(found, wanted * factor, rtol=1e-7, atol=1e-300)
    number = np.isfinite(wanted) & (wanted != 0)
    ratio = found[number] / wanted[number]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-9)


def _real(name: str) -> Path:
    if not (CURATED / name).is_file():
        pytest.skip("the shared data is not there")
    return CURATED / name


# --------------------------------------------------------------------------------------------------
# Real files
# --------------------------------------------------------------------------------------------------


def _all(path: Path, key: str) -> np.ndarray:
    """One key of all groups that have it, flat."""
    with h5py.File(path) as file:
        return np.concatenate([np.ravel(g[key][()]) for g in file.values() if key in g])


def test_spice() -> None:
    path = _real("SPICE-1.1.4_n2.hdf5")
    found = _read(
        path,
        "molecule",
        energy={"key": "dft_total_energy"},
        forces={"key": "dft_total_gradient", "scale": -1},
        dipole={"key": "scf_dipole"},
        charges={"key": "mbis_charges"},
        quadrupole={"key": "scf_quadrupole", "convention": "traced"},
    )
    assert found["count"].tolist() == [27] * 50 + [5] * 5
    _same(found["positions"], _all(path, "conformations"), BOHR)
    _same(found["energy"], _all(path, "dft_total_energy"), HARTREE)
    _same(found["forces"], _all(path, "dft_total_gradient"), -HARTREE / BOHR)
    _same(found["dipole"], _all(path, "scf_dipole"), BOHR)
    _same(found["quadrupole"], _all(path, "scf_quadrupole"), BOHR**2)
    _same(found["charges"][: 27 * 50], _all(path, "mbis_charges"), 1.0)
    assert np.isnan(found["charges"][27 * 50 :]).all()
    with h5py.File(path) as file:
        species = [np.tile(g["atomic_numbers"][()], len(g["conformations"])) for g in file.values()]
    assert np.array_equal(found["atomic_numbers"], np.concatenate(species))
    assert found["group"] == ["103147721"] * 50 + ["C#C.[Na+]"] * 5


def test_ani2x() -> None:
    path = _real("ani2x_minimal.hdf5")
    found = _read(
        path,
        "molecule",
        energy={"key": "energies", "unit": "hartree"},
        forces={"key": "forces", "unit": "hartree/angstrom"},
    )
    _same(found["positions"], _all(path, "coordinates"), 1.0)
    _same(found["energy"], _all(path, "energies"), HARTREE)
    _same(found["forces"], _all(path, "forces"), HARTREE)
    assert np.array_equal(found["atomic_numbers"], _all(path, "species"))
    pairs = np.sort(found["atomic_numbers"].reshape(-1, 2), axis=1)
    distinct = {tuple(pair) for pair in pairs.tolist()}
    assert len(set(found["group"])) == len(distinct) > 1
    assert len(set(zip(found["group"], map(tuple, pairs.tolist()), strict=True))) == len(distinct)
    assert all(name.startswith("002 ") for name in found["group"])


def test_ani1x() -> None:
    path = _real("ani1_n5.hdf5")
    found = _read(
        path,
        energy={"key": "wb97x_dz.energy", "unit": "hartree"},
        forces={"key": "wb97x_dz.forces", "unit": "hartree/angstrom"},
        charges={"key": "wb97x_dz.hirshfeld_charges"},
        dipole={"key": "wb97x_dz.dipole", "unit": "e*angstrom", "missing": "nan"},
    )
    _same(found["positions"], _all(path, "coordinates"), 1.0)
    _same(found["energy"], _all(path, "wb97x_dz.energy"), HARTREE)
    _same(found["forces"], _all(path, "wb97x_dz.forces"), HARTREE)
    _same(found["charges"], _all(path, "wb97x_dz.hirshfeld_charges"), 1.0)
    _same(found["dipole"], _all(path, "wb97x_dz.dipole"), 1.0)


def test_ani1x_where_a_method_was_not_run() -> None:
    path = _real("ani1_n5.hdf5")
    label = {"key": "mp2_qz.corr_energy", "unit": "hartree"}
    expected = _all(path, label["key"])
    missing = np.isnan(expected)
    assert missing.any()
    found = _read(path, energy={**label, "missing": "nan"})["energy"]
    assert np.array_equal(np.isnan(found), missing)
    np.testing.assert_allclose(found[~missing], expected[~missing] * HARTREE, rtol=1e-7)
    text = _error(path, energy=label)
    assert "energy is NaN" in text
    assert 'missing = "nan"' in text
    assert f"conformer {_first_missing(path, label['key'])} (counted from 0)" in text


def _first_missing(path: Path, key: str) -> str:
    with h5py.File(path) as file:
        arrays = [np.isnan(group[key][()]) for group in file.values()]
    return str(next(int(array.argmax()) for array in arrays if array.any()))


def test_modelforge() -> None:
    path = _real("qm9_dataset_v1.1_ntc_10.hdf5")
    found = _read(
        path,
        "molecule",
        energy={"key": "internal_energy_at_0K"},
        dipole={"key": "dipole_moment_per_system"},
        charges={"key": "partial_charges"},
    )
    _same(found["positions"], _all(path, "positions"), 10.0)
    _same(found["energy"], _all(path, "internal_energy_at_0K"), KJ_MOL)
    _same(found["dipole"], _all(path, "dipole_moment_per_system"), 10.0)
    _same(found["charges"], _all(path, "partial_charges"), 1.0)
    assert np.array_equal(found["atomic_numbers"], _all(path, "atomic_numbers"))
    assert found["group"] == [f"dsgdb9nsd_{number:06d}" for number in range(1, 11)]
    tags = _read(path, "smiles_b3lyp", energy={"key": "internal_energy_at_0K"})["group"]
    with h5py.File(path) as file:
        assert tags == [group["smiles_b3lyp"].asstr()[()] for group in file.values()]


# --------------------------------------------------------------------------------------------------
# Layouts, in made files
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 100])
def test_ani1_nested_and_in_slices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(raw, "CHUNK", chunk)
    one, other = _water(4, 1), _water(3, 2)
    other["species"] = np.array(["Cl", "H", "C"], h5py.string_dtype())
    path = _write(tmp_path / "x.h5", {"s01/s01-0": one, "s01/s01-1": other, "s02/a": _water(0)})
    found = _read(path, "molecule", energy=ENERGY, forces=FORCES)
    for name, key in (("energy", "energies"), ("positions", "coordinates"), ("forces", "forces")):
        both = np.concatenate([one[key], other[key]])
        assert np.array_equal(found[name], both.reshape(found[name].shape))
    assert found["atomic_numbers"].tolist() == [8, 1, 1] * 4 + [17, 1, 6] * 3
    assert found["group"] == ["s01/s01-0"] * 4 + ["s01/s01-1"] * 3


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_ani2x_species_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(raw, "CHUNK", chunk)
    species = np.array([[8, 1, 1], [6, 1, 1], [1, 8, 1]])
    path = _write(tmp_path / "x.h5", {"003": _water() | {"species": species}})
    found = _read(path, "molecule", energy=ENERGY)
    assert found["atomic_numbers"].tolist() == species.ravel().tolist()
    assert found["group"] == ["003 H2O1", "003 C1H2", "003 H2O1"]


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_units_of_the_file_and_a_key_that_some_groups_lack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(raw, "CHUNK", chunk)
    groups = {}
    for number, name in enumerate("abc"):
        made = _water(2, number)
        groups[name] = {
            "conformations": made["coordinates"],
            "atomic_numbers": np.array([8, 1, 1], np.int16),
            "gradient": made["forces"].astype(np.float32),
            "total_energy": made["energies"],
        }
    groups["b"]["mbis"] = np.arange(6.0).reshape(2, 3, 1)
    stated = {"conformations": "bohr", "gradient": "hartree/bohr", "total_energy": "hartree"}
    path = _write(tmp_path / "x.h5", groups, **stated)
    assert hdf5.units(path) == stated | {"positions": "bohr"}
    assert hdf5.keys(path) == ["gradient", "total_energy"]
    found = _read(
        path,
        energy={"key": "total_energy"},
        forces={"key": "gradient", "scale": -1},
        charges={"key": "mbis"},
    )
    for name, key, factor in (
        ("positions", "conformations", BOHR),
        ("energy", "total_energy", HARTREE),
        ("forces", "gradient", -HARTREE / BOHR),
    ):
        _same(found[name], np.concatenate([group[key] for group in groups.values()]), factor)
    assert np.isnan(found["charges"][[*range(6), *range(12, 18)]]).all()
    assert found["charges"][6:12].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("chunk", [1, 2, 100])
@pytest.mark.parametrize("n", [1, 3, 4])
def test_modelforge_shapes_and_values_for_all_conformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, n: int
) -> None:
    monkeypatch.setattr(raw, "CHUNK", chunk)
    path = tmp_path / "x.hdf5"
    made = _water(n)
    with h5py.File(path, "w") as file:
        group = file.create_group("m")
        group.create_dataset("positions", data=made["coordinates"]).attrs["u"] = "nanometer"
        group["atomic_numbers"] = np.array([[8], [1], [1]])
        group.create_dataset("e", data=made["energies"][:, None]).attrs["u"] = "kilojoule_per_mole"
        group["charge"] = np.int64(-1)
        group["multiplicity"] = np.array([[2]])
        group["dipole"] = np.array([1.0, 2.0, 3.0])
        group["charges"] = np.array([[0.5], [0.25], [-0.75]])
    found = _read(
        path,
        energy={"key": "e"},
        total_charge={"key": "charge"},
        spin_multiplicity={"key": "multiplicity"},
        dipole={"key": "dipole", "unit": "e*angstrom"},
        charges={"key": "charges"},
    )
    _same(found["positions"], made["coordinates"], 10.0)
    _same(found["energy"], made["energies"], KJ_MOL)
    assert found["total_charge"].tolist() == [-1] * n
    assert found["spin_multiplicity"].tolist() == [2] * n
    assert found["dipole"].tolist() == [[1, 2, 3]] * n
    assert found["charges"].tolist() == [0.5, 0.25, -0.75] * n


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_only_what_is_wanted_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(raw, "CHUNK", chunk)
    sizes: list[int] = []
    names: set[str] = set()
    original = h5py.Dataset.__getitem__

    def spy(self: Any, args: Any, **more: Any) -> Any:
        value = original(self, args, **more)
        names.add(self.name.rsplit("/", 1)[1])
        if self.name.endswith(("coordinates", "energies")):
            sizes.append(len(value))
        return value

    monkeypatch.setattr(h5py.Dataset, "__getitem__", spy)
    path = _write(tmp_path / "x.h5", {"a": _water(5)})
    assert len(_read(path, energy=ENERGY)["energy"]) == 5
    assert names == {"coordinates", "species", "energies"}
    assert max(sizes) == min(chunk, 5)


def test_groups_by_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw, "CHUNK", 2)
    text = h5py.string_dtype()
    arrays = _water() | {
        "subset": np.array(["dipeptides é"], text),
        "number": np.array([7, 8, 9]),
        "fixed": np.array([b"a", b"b", b"a"]),
    }
    path = _write(tmp_path / "x.h5", {"m": arrays})
    for key, expected in (
        ("subset", ["dipeptides é"] * 3),
        ("number", ["7", "8", "9"]),
        ("fixed", ["a", "b", "a"]),
        ("molecule", ["m"] * 3),
    ):
        assert _read(path, key, energy=ENERGY)["group"] == expected
    assert 'did you mean "subset"' in _error(path, "subsets", energy=ENERGY)
    text_of_error = _error(path, "forces", energy=ENERGY)
    assert "cannot group 3 conformers" in text_of_error


def test_a_compressed_file_and_an_alias(tmp_path: Path) -> None:
    made = _water(50)
    with h5py.File(tmp_path / "x.h5", "w", libver="latest") as file:
        group = file.create_group("a")
        for key, values in made.items():
            kind = {} if key == "species" else {"chunks": True, "compression": "gzip"}
            group.create_dataset(key, data=values, **kind)
        group["E"] = h5py.SoftLink("/a/energies")
    found = _read(tmp_path / "x.h5", energy={"key": "E", "unit": "eV"})
    assert np.array_equal(found["energy"], made["energies"])


# --------------------------------------------------------------------------------------------------
# Errors
# --------------------------------------------------------------------------------------------------


def test_what_is_no_whole_hdf5_file(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    path.write_text("no HDF5")
    assert "this is not an HDF5 file" in _error(path)
    whole = _write(tmp_path / "y.h5", {"a": _water()}).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "the file is damaged or cut off: " in _error(path)


def test_no_known_layout(tmp_path: Path) -> None:
    path = _write(tmp_path / "x.h5", {"a": {"x": np.zeros((1, 2, 3))}})
    text = _error(path)
    assert "no group of the file has a known layout" in text
    for words in ("conformations and atomic_numbers (SPICE)", "positions", "ANI-2x"):
        assert words in text
    h5py.File(tmp_path / "y.h5", "w").close()
    assert "no group of the file has a known layout" in _error(tmp_path / "y.h5")


def test_a_group_without_its_species_is_not_passed_over(tmp_path: Path) -> None:
    for left_out in ("species", "coordinates"):
        other = _water()
        del other[left_out]
        text = _error(_write(tmp_path / "x.h5", {"a": _water(), "b": other}))
        assert "but not both positions and species" in text
        assert "group b" in text


@pytest.mark.parametrize(
    ("key", "values", "expected"),
    [
        ("coordinates", np.zeros((3, 9)), '"coordinates" is an array of shape (3, 9)'),
        ("coordinates", np.full((3, 3, 3), b"x"), '"coordinates" is of the type |S1'),
        ("species", np.array([8, 1]), '"species" is an array of shape (2,), but there are 3 atoms'),
        ("species", np.array([8.0, 1, 1]), '"species" is of the type float64'),
        ("species", np.array([8, 1, 0]), '"species" has a place without an element'),
        ("species", np.array([b"O", b"", b"H"]), '"" is not an element'),
        ("species", np.array([8, 1, 300]), '"300" is not an element'),
        ("species", np.array([b"O", b"Hh", b"H"]), '"Hh" is not an element'),
        ("energies", np.array([b"1", b"2", b"3"]), '"energies" is of the type |S1'),
        ("energies", np.zeros(3, complex), '"energies" is of the type complex128'),
        ("energies", np.zeros(2), '"energies" is an array of shape (2,), but there are 3'),
        ("energies", np.zeros((3, 2)), 'key "energies" holds an array of shape (3, 2)'),
        ("energies", np.array([0, np.nan, 0]), "conformer 1 (counted from 0)"),
        ("energies", h5py.Empty("f8"), '"energies" is not a dataset with values'),
    ],
)
def test_arrays_that_cannot_be(tmp_path: Path, key: str, values: Any, expected: str) -> None:
    path = _write(tmp_path / "x.h5", {"n/good": _water(2, 1), "n/m": _water() | {key: values}})
    text = _error(path)
    assert expected in text
    assert f"{path}, group n/m" in text


@pytest.mark.parametrize("length", [1, 2])
def test_a_length_that_happens_to_be_that_of_a_slice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    monkeypatch.setattr(raw, "CHUNK", 2)
    path = _write(tmp_path / "x.h5", {"a": _water(4) | {"forces": np.zeros((length + 1, 3, 3))}})
    assert '"forces" is an array of shape' in _error(path, forces=FORCES)


def test_units_that_differ_between_groups(tmp_path: Path) -> None:
    path = _write(tmp_path / "x.h5", {"a": _water(), "b": _water()}, energies="hartree")
    assert len(_read(path, energy={"key": "energies"})["energy"]) == 6
    with h5py.File(path, "a") as file:
        file["b/energies"].attrs["units"] = "eV"
    text = _error(path, energy={"key": "energies"})
    assert '"energies" is in "eV" here, but in "hartree" in the groups before' in text
    assert "group b" in text
    with h5py.File(path, "a") as file:
        del file["b/energies"].attrs["units"]
    assert 'in no stated unit here, but in "hartree"' in _error(path, energy={"key": "energies"})


def test_links_that_lead_elsewhere(tmp_path: Path) -> None:
    path = _write(tmp_path / "x.h5", {"a": _water()})
    with h5py.File(path, "a") as file:
        file["top"] = file["/"]
    assert "two names lead to the same group" in _error(path)
    _write(tmp_path / "y.h5", {"a": _water()})
    with h5py.File(path, "w") as file:
        file["b"] = h5py.ExternalLink(str(tmp_path / "y.h5"), "/a")
    assert '"b" is a link into another file' in _error(path)


@pytest.mark.parametrize("chunks", [None, (2,)])
def test_a_dataset_that_was_never_written_is_not_zero(tmp_path: Path, chunks: Any) -> None:
    path = _write(tmp_path / "x.h5", {"a": _water()})
    with h5py.File(path, "a") as file:
        del file["a/energies"]
        file.create_dataset("a/energies", (3,), "f8", chunks=chunks)
    assert '"energies" is damaged, or was never written whole' in _error(path)


def test_a_type_that_the_library_does_not_survive(tmp_path: Path) -> None:
    lists = np.array([np.zeros(1, np.uint8)] * 3 + [None], object)[:3]
    path = _write(tmp_path / "x.h5", {"a": _water()})
    with h5py.File(path, "a") as file:
        file["a"].create_dataset("list", data=lists, dtype=h5py.vlen_dtype(np.uint8))
    assert '"list" is of the type object' in _error(path, "list", energy=ENERGY)


def test_a_heap_of_strings_in_which_the_library_would_run_in_circles(tmp_path: Path) -> None:
    path = _write(tmp_path / "x.h5", {"a": _water()}, energies="hartree")
    content = path.read_bytes()
    free = content.index(b"GCOL") + 16 + 16 + 8  # behind the head and one string of 8 bytes
    path.write_bytes(content[:free] + bytes(16) + content[free + 16 :])
    assert "the file is damaged: its strings cannot be read" in _error(path)


# --------------------------------------------------------------------------------------------------
# Damaged bytes
# --------------------------------------------------------------------------------------------------


def mutated(content: bytes, seed: int) -> bytes:
    """A file of which one to three places are overwritten, deleted, inserted or cut off."""
    rng = np.random.default_rng(seed)
    for _ in range(rng.integers(1, 4)):
        kind, place = rng.integers(16), int(rng.integers(max(len(content), 1)))
        length = int(rng.integers(1, 9))
        new = rng.bytes(length)
        if kind == 0:
            content = content[: max(place, 1)]
        elif kind <= 2:
            content = content[:place] + content[place + length :]
        elif kind <= 4:
            content = content[:place] + new + content[place:]
        else:
            content = content[:place] + new + content[place + length :]
    return content


PATIENCE = 30  # seconds in which one file is surely read

Content = dict[str, Any]
"""Atomic numbers, positions (Å), energies (eV) and groups, flat."""


def check_mutations(
    folder: Path, compare: Callable[[Path, int, int, Path], None], seeds: range
) -> None:
    """Mutate and read in another process; whatever seeds break it are named.

    Args:
        folder: for the files.
        compare: (folder, first seed, last seed + 1, log) → runs there, writing what it does.
        seeds: of the mutations.
    """
    log = folder / "log.txt"
    failures, first = [], seeds.start
    while first < seeds.stop:
        log.write_text("")
        process = multiprocessing.get_context("spawn").Process(
            target=compare, args=(folder, first, seeds.stop, log)
        )
        process.start()
        while process.exitcode is None and (before := log.read_text()) is not None:
            process.join(PATIENCE)
            if process.exitcode is None and log.read_text() == before:
                process.kill()
                process.join()
        lines = log.read_text().splitlines()
        failures += [line for line in lines if line.startswith("wrong")]
        if process.exitcode == 0:
            break
        running = [line for line in lines if line.startswith("seed")]
        assert running, f"the process ended with {process.exitcode} at its start"
        failures.append(f"exit code {process.exitcode}: {running[-1]}")
        first = int(running[-1].split()[1]) + 1
    assert not failures, "\n".join(failures)
    print(log.read_text().splitlines()[-1])


def run_mutations(
    path: Path,
    contents: list[bytes],
    reader: Callable[[Path], Content],
    independent: Callable[[Path], Content],
    seeds: range,
    log: Path,
) -> None:
    """Read mutated files in both ways; an error of the user's kind, or the same numbers."""
    refused = same = 0
    with log.open("w", buffering=1) as file, warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in seeds:
            path.write_bytes(mutated(contents[seed % len(contents)], seed))
            file.write(f"seed {seed} reader\n")
            try:
                found = reader(path)
            except InputError:
                refused += 1
                continue
            except BaseException as error:
                file.write(f"wrong: seed {seed} raises {type(error).__name__}: {error}\n")
                continue
            file.write(f"seed {seed} independent\n")
            try:
                wrong = _difference(found, independent(path))
            except Exception as error:
                wrong = f"the independent reading raises {type(error).__name__}: {error}"
            same += not wrong
            if wrong:
                file.write(f"wrong: seed {seed}: {wrong}\n")
        file.write(f"sum: {refused} refused, {same} the same\n")


def _difference(found: Content, expected: Content) -> str:
    for key, values in expected.items():
        if isinstance(values, list):
            if found[key] != values:
                return f"{key} differ"
        elif found[key].shape != values.shape or not np.array_equal(
            found[key], values, equal_nan=True
        ):
            return f"{key} differ"
    return ""


def _contents(folder: Path) -> list[bytes]:
    """Two files: plain, and with checksums, compression and integers."""
    made = []
    for number, libver in enumerate(("earliest", "latest")):
        path = folder / f"whole{number}.h5"
        with h5py.File(path, "w", libver=libver) as file:
            for name in ("s/a", "s/b"):
                arrays = _water(6) | {"subset": np.array(["one"], h5py.string_dtype())}
                arrays["species"] = np.array([[8, 1, 1]] * 6) if number else arrays["species"]
                for key, values in arrays.items():
                    packed = {"chunks": (4, *values.shape[1:]), "compression": "gzip"}
                    packed = packed if number and key in ("coordinates", "energies") else {}
                    dataset = file.create_dataset(f"{name}/{key}", data=values, **packed)
                    if key == "energies":
                        dataset.attrs["units"] = "hartree"
        made.append(path.read_bytes())
    return made


def _with_the_reader(path: Path) -> Content:
    found = _read(path, "subset", energy={"key": "energies"})
    if np.isnan(found["energy"]).all():
        raise SourceError("what prepares a dataset refuses a label that no structure has")
    return found


def _with_h5py(path: Path) -> Content:
    """The same by h5py alone, of all groups two levels down."""
    parts: list[tuple[np.ndarray, ...]] = []
    names: list[str] = []
    with h5py.File(path) as file:
        for group in (inner for outer in file.values() for inner in outer.values()):
            n, places, _ = group["coordinates"].shape
            species = group["species"][()]
            if species.dtype.kind == "S":
                species = np.array([atomic_numbers[s.decode()] for s in species.ravel()])
            energy = np.full(n, np.nan)
            if "energies" in group:  # a group may lack a label
                unit = str(np.ravel(group["energies"].attrs["units"])[0])
                energy = group["energies"][()].astype(np.float64) * conversion_factor(unit, "eV")
            parts.append(
                (
                    np.broadcast_to(species.reshape(-1, places), (n, places)).ravel(),
                    group["coordinates"][()].reshape(-1, 3).astype(np.float64),
                    np.broadcast_to(energy, n),
                )
            )
            subset = [text.decode("utf-8", "backslashreplace") for text in group["subset"][()]]
            names += subset * n if len(subset) == 1 else subset
    columns = (np.concatenate(column) for column in zip(*parts, strict=True))
    return dict(zip(("atomic_numbers", "positions", "energy"), columns, strict=True)) | {
        "group": names
    }


def _compare(folder: Path, first: int, last: int, log: Path) -> None:
    path, contents = folder / "x.h5", _contents(folder)
    run_mutations(path, contents, _with_the_reader, _with_h5py, range(first, last), log)


def test_both_ways_of_reading_agree_on_whole_files(tmp_path: Path) -> None:
    for content in _contents(tmp_path):
        (tmp_path / "x.h5").write_bytes(content)
        both = (_with_the_reader(tmp_path / "x.h5"), _with_h5py(tmp_path / "x.h5"))
        assert _difference(*both) == ""


def test_damaged_bytes(tmp_path: Path) -> None:
    check_mutations(tmp_path, _compare, range(200))


@pytest.mark.slow
def test_damaged_bytes_at_length(tmp_path: Path) -> None:
    check_mutations(tmp_path, _compare, range(200, 10_200))
