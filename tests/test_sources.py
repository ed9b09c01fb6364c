"""Extended XYZ: right numbers in the program's units, or an error that names file and structure."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import lzma
import os
import re
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from ase import units as ase_units
from ase.build import bulk
from ase.calculators.lj import LennardJones
from ase.data import chemical_symbols
from molecules import random_structures, write_extxyz

from runner import sources
from runner.config import SourceConfig
from runner.errors import InputError, SourceError
from runner.sources import raw
from runner.structures import Structures

SHARED = Path(__file__).parents[2] / "shared" / "data"
ENERGY = {"key": "energy", "unit": "eV"}
FORCES = {"key": "forces", "unit": "eV/angstrom"}
ATOM = "Properties=species:S:1:pos:R:3:forces:R:3"
ONE = f"2\n{ATOM} energy=-1.5\nH 0 0 0 0 0 1\nH 0 0 0.7 0 0 -1\n"


def _read(path: Path | list[Path], **labels: Any) -> Structures:
    paths = [str(p) for p in path] if isinstance(path, list) else str(path)
    config = [SourceConfig.model_validate({"path": paths, **(labels or {"energy": ENERGY})})]
    return sources.read(sources.locate(config), config, None)


def _text(folder: Path, text: str, **labels: Any) -> Structures:
    path = folder / "x.extxyz"
    path.write_bytes(text.encode())
    return _read(path, **labels)


def _error(folder: Path, text: str, **labels: Any) -> str:
    with pytest.raises(SourceError) as error:
        _text(folder, text, **labels)
    assert str(folder / "x.extxyz") in str(error.value)
    return str(error.value)


def test_equal_to_what_was_written(tmp_path: Path) -> None:
    written = random_structures([3, 1, 5, 2])
    write_extxyz(tmp_path / "x.xyz", written)
    found = _read(
        tmp_path / "x.xyz",
        energy=ENERGY,
        forces=FORCES,
        charges={"key": "charges"},
        total_charge={"key": "total_charge"},
        dipole={"key": "dipole", "unit": "e*angstrom"},
    )
    assert np.array_equal(found.first_atom, written.first_atom)
    for name in ("atomic_numbers", "positions", "forces", "charges"):
        assert np.array_equal(found.atoms[name], written.atoms[name])
        assert found.atoms[name].dtype == written.atoms[name].dtype
    for name in ("energy", "total_charge", "dipole", "source", "source_index"):
        assert np.array_equal(found.structures[name], written.structures[name])
        assert found.structures[name].dtype == written.structures[name].dtype


@pytest.mark.parametrize(
    "name",
    ["g2_xtb/g2.extxyz", "ethanol_methanol/train.xyz", "acetylacetone/train_300K.xyz"],
)
def test_equal_to_ase_on_real_files(name: str) -> None:
    if not (SHARED / name).is_file():
        pytest.skip("the shared data is not there")
    found = _read(SHARED / name, energy=ENERGY, forces=FORCES)
    frames = ase.io.read(SHARED / name, ":")
    assert len(found) == len(frames)
    assert np.array_equal(found.atoms["positions"], np.concatenate([a.positions for a in frames]))
    assert np.array_equal(
        found.atoms["atomic_numbers"], np.concatenate([a.numbers for a in frames])
    )
    forces = np.concatenate([a.get_forces() for a in frames])
    assert np.array_equal(found.atoms["forces"], forces)
    energies = [a.get_potential_energy() for a in frames]
    assert found.structures["energy"] == pytest.approx(energies, abs=1e-9)


def test_units_are_converted_once_and_a_gradient_becomes_forces(tmp_path: Path) -> None:
    found = _text(
        tmp_path,
        ONE,
        energy={"key": "energy", "unit": "hartree"},
        forces={"key": "forces", "unit": "hartree/bohr", "scale": -1},
        positions={"unit": "bohr"},
    )
    assert found.structures["energy"] == pytest.approx([-1.5 * ase_units.Hartree], rel=1e-7)
    force = ase_units.Hartree / ase_units.Bohr
    assert found.atoms["forces"][:, 2] == pytest.approx([-force, force], rel=1e-7)
    assert found.atoms["positions"][1, 2] == pytest.approx(0.7 * ase_units.Bohr, rel=1e-7)


def test_a_constant_for_all(tmp_path: Path) -> None:
    found = _text(tmp_path, ONE + ONE, total_charge={"value": 1}, energy=ENERGY)
    assert found.structures["total_charge"].tolist() == [1, 1]


def test_many_chunks_files_and_globs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw, "CHUNK", 3)
    for name, n in (("b.xyz", 7), ("a.xyz", 4)):
        (tmp_path / name).write_text(
            "".join(ONE.replace("-1.5", f"{index}.5") for index in range(n))
        )
    found = _read(tmp_path / "*.xyz")
    assert found.structures["source"].tolist() == [0] * 4 + [1] * 7  # in the order of their names
    assert found.structures["source_index"].tolist() == [*range(4), *range(7)]
    assert found.structures["energy"].tolist() == [i + 0.5 for i in (*range(4), *range(7))]
    assert len(_read([tmp_path / "b.xyz", tmp_path / "a.xyz"])) == 11


@pytest.mark.parametrize("end", ["\n", "\n\n \n", "\r\n"])
def test_blank_lines_at_the_end_are_accepted(tmp_path: Path, end: str) -> None:
    assert len(_text(tmp_path, ONE + ONE + end)) == 2
    assert len(_text(tmp_path, (ONE + ONE).rstrip("\n"))) == 2


def test_windows_line_ends_are_accepted(tmp_path: Path) -> None:
    found = _text(tmp_path, (ONE + ONE).replace("\n", "\r\n"), energy=ENERGY, forces=FORCES)
    assert found.atoms["forces"][:, 2].tolist() == [1, -1, 1, -1]


@pytest.mark.parametrize(
    ("pbc", "expected"),
    [
        ("", [True, True, True]),
        ('pbc="T T F"', [True, True, False]),
        ("pbc=FTF", [False, True, False]),
        ('pbc="F F F"', None),
        ("pbc=FFF", None),
    ],
)
def test_a_molecule_in_a_box_is_not_periodic_but_a_crystal_is(
    tmp_path: Path, pbc: str, expected: list[bool] | None
) -> None:
    crystal = ONE.replace("energy", f'Lattice="9 1 2 0 8 3 0 0 7" {pbc} energy')
    found = _text(tmp_path, ONE + crystal, energy=ENERGY, positions={"unit": "nm"})
    if expected is None:
        assert "pbc" not in found.structures
        assert "cell" not in found.structures
        return
    assert found.structures["pbc"].tolist() == [[False] * 3, expected]
    cells = [np.zeros((3, 3)), 10 * np.array([[9, 1, 2], [0, 8, 3], [0, 0, 7]])]
    assert found.structures["cell"] == pytest.approx(np.array(cells))


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ('Lattice="9 0 0 9 0 0 0 0 9"', "zero or linearly dependent"),
        ('Lattice="9 0 0 0 9 0 0 0 0"', "zero or linearly dependent"),
        ('Lattice="9 0 0 0 9 0 0 0 nan"', "the cell is not of finite numbers below"),
        ('Lattice="9 0 0 0 9 0 0 0 1e200"', "the cell is not of finite numbers below"),
        ('Lattice="9 0 0"', "the Lattice is not nine numbers"),
        ('Lattice="9 0 0 0 9 0 0 0 9" pbc="T T"', "pbc is"),
    ],
)
def test_a_cell_that_cannot_be_is_refused(tmp_path: Path, box: str, message: str) -> None:
    text = _error(tmp_path, ONE + ONE.replace("energy", f"{box} energy"))
    assert message in text
    assert "structure 1 (counted from 0), line 5" in text
    if box.startswith('Lattice="9 0 0 0 9 0 0 0 0"'):  # along z nothing repeats
        slab = ONE.replace("energy", f'{box} pbc="T T F" energy')
        assert len(_text(tmp_path, slab)) == 1


TENSOR = [[1.0, 0.1, 0.2], [0.1, 2.0, 0.3], [0.2, 0.3, 3.0]]
NINE = '"1 0.1 0.2 0.1 2 0.3 0.2 0.3 3"'


@pytest.mark.parametrize(
    ("written", "order"),
    [
        (NINE, {}),
        ('"1 2 3 0.3 0.2 0.1"', {"order": "xx yy zz yz xz xy"}),
        ('"1 0.1 0.2 2 0.3 3"', {"order": "xx xy xz yy yz zz"}),
        ('"1 2 3 0.1 0.3 0.2"', {"order": "xx yy zz yx zy zx"}),
    ],
)
def test_tensors_are_read_in_the_order_that_is_declared(
    tmp_path: Path, written: str, order: dict[str, str]
) -> None:
    text = ONE.replace("energy", f"s={written} energy")
    stress = {"key": "s", "unit": "GPa", **order}
    quadrupole = {"key": "s", "unit": "e*angstrom**2", "convention": "traced", **order}
    found = _text(tmp_path, text, stress=stress, quadrupole=quadrupole)
    assert found.structures["quadrupole"][0] == pytest.approx(np.array(TENSOR))
    assert found.structures["stress"][0] == pytest.approx(
        np.array(TENSOR) * ase_units.GPa, rel=1e-7
    )


def test_six_numbers_without_an_order_are_refused(tmp_path: Path) -> None:
    text = _error(
        tmp_path,
        ONE.replace("energy", 's="1 2 3 4 5 6" energy'),
        stress={"key": "s", "unit": "GPa"},
    )
    assert "holds an array of shape (6,), which cannot be the label stress" in text
    assert 'order = "xx yy zz yz xz xy"' in text


def test_a_virial_becomes_a_stress_by_the_volume(tmp_path: Path) -> None:
    crystal = ONE.replace("energy", f'Lattice="4 0 0 1 5 0 0 0 6" v={NINE} energy')
    stress = {"key": "v", "unit": "eV", "virial": True}
    found = _text(tmp_path, crystal + ONE, energy=ENERGY, stress=stress)
    assert found.structures["stress"][0] == pytest.approx(-np.array(TENSOR) / 120)
    assert np.isnan(found.structures["stress"][1]).all()
    text = _error(tmp_path, crystal.replace("energy", 'pbc="T T F" energy'), stress=stress)
    assert "a virial makes a stress only in a cell that is periodic along three" in text


def test_stress_of_a_strained_crystal_is_the_derivative_of_its_energy(tmp_path: Path) -> None:
    crystal = bulk("Ar", "fcc", 5.1, cubic=True)
    crystal.rattle(0.1, seed=0)
    crystal.set_cell(crystal.cell @ np.array([[1, 0.02, 0], [0, 1.03, 0.01], [0, 0, 0.98]]), True)
    crystal.calc = LennardJones(sigma=3.4, epsilon=0.0104, rc=8.0, smooth=True)
    crystal.get_stress()
    ase.io.write(tmp_path / "x.extxyz", crystal)
    found = _read(tmp_path / "x.extxyz", stress={"key": "stress", "unit": "eV/angstrom**3"})
    step = 1e-5
    for i, j in ((0, 0), (1, 2), (0, 1)):
        energies = []
        for sign in (1, -1):
            strain = np.eye(3)
            strain[i, j] += sign * step / 2
            strain[j, i] += sign * step / 2
            moved = crystal.copy()
            moved.set_cell(crystal.cell @ strain, scale_atoms=True)
            moved.calc = crystal.calc
            energies.append(moved.get_potential_energy())
        slope = (energies[0] - energies[1]) / (2 * step) / crystal.get_volume()
        assert found.structures["stress"][0, i, j] == pytest.approx(slope, rel=1e-4, abs=1e-8)
    assert found.structures["cell"][0] == pytest.approx(crystal.cell.array)


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_compressed_files(tmp_path: Path, suffix: str) -> None:
    pack = {".gz": gzip.compress, ".xz": lzma.compress}[suffix]
    packed = pack((ONE * 50).encode())
    path = tmp_path / f"x.extxyz{suffix}"
    path.write_bytes(packed)
    assert len(_read(path)) == 50
    for damaged in (packed[:-20], packed[:20], b"2" + packed[1:]):
        path.write_bytes(damaged)
        with pytest.raises(SourceError, match=r"compressed file is damaged or cut off(.|\n)*where"):
            _read(path)


def test_a_label_of_the_atoms_is_not_taken_for_one_of_the_structure(tmp_path: Path) -> None:
    label = {"key": "forces", "unit": "e*angstrom"}
    assert 'the key "forces" holds a value a' in _error(tmp_path, ONE, dipole=label)
    text = _error(tmp_path, ONE, forces={"key": "energy", "unit": "eV/angstrom"})
    assert 'the key "energy" holds a value a structure, which cannot be the label forces' in text


REAL: list[tuple[str, dict[str, Any]]] = [
    ("solvent_clusters/solvent_xtb_test.xyz", {"energy": "energy_xtb", "forces": "forces_xtb"}),
    ("silicon_germanium/training.extxyz", {"energy": "energy", "forces": "forces"}),
    ("small_mixed/carbon_reduced_100.xyz", {"energy": "energy", "forces": "force"}),
    ("small_mixed/qm9_reduced_100.xyz", {"energy": "U0"}),
    ("many_elements/small.xyz", {"energy": "energy", "forces": "forces"}),
    ("small_mixed/ethanol_reduced_100.xyz", {"energy": "energy", "forces": "forces"}),
    ("ethanol_methanol/train_eth_meth.xyz", {"energy": "energy", "forces": "forces"}),
    ("ethanol_methanol/test_MD.xyz", {"energy": "energy", "forces": "forces"}),
    ("ethanol_methanol/test_eth_meth.xyz", {"energy": "energy", "forces": "forces"}),
    ("ethanol_methanol/isolated_atoms.xyz", {"energy": "energy"}),
    ("acetylacetone/train_600K.xyz", {"energy": "energy", "forces": "forces"}),
    ("acetylacetone/test_MD_300K.xyz", {"energy": "energy", "forces": "forces"}),
    ("acetylacetone/test_MD_600K.xyz", {"energy": "energy", "forces": "forces"}),
    ("acetylacetone/isolated_atoms.xyz", {"energy": "energy"}),
    ("solvent_clusters/solvent_xtb_train_200.xyz", {"energy": "energy_xtb"}),
    ("solvent_clusters/solvent_liquid.xyz", {"energy": "energy", "forces": "forces"}),
    ("silicon_germanium/test.extxyz", {"energy": "energy", "forces": "forces"}),
]


@pytest.mark.parametrize(("name", "names"), REAL)
def test_equal_to_ase_on_real_files_with_keys_of_their_own(
    name: str, names: dict[str, str]
) -> None:
    if not (SHARED / name).is_file():
        pytest.skip("the shared data is not there")
    units = {"energy": "eV", "forces": "eV/angstrom", "stress": "eV/angstrom**3"}
    labels: dict[str, Any] = {q: {"key": key, "unit": units[q]} for q, key in names.items()}
    frames = ase.io.read(SHARED / name, ":")
    stress = None
    if "virial" in frames[0].info:
        labels["stress"] = {"key": "virial", "unit": "eV", "virial": True}
        stress = [-a.info["virial"].reshape(3, 3) / a.get_volume() for a in frames]
    elif any(frame.pbc.any() for frame in frames):
        labels["stress"] = {"key": "stress", "unit": "eV/angstrom**3"}
        stress = [a.get_stress(voigt=False) for a in frames]
    found = _read(SHARED / name, **labels)
    assert len(found) == len(frames)
    rows = np.concatenate([a.positions for a in frames])
    assert found.atoms["positions"] == pytest.approx(rows, abs=1e-9)
    assert found.atoms["atomic_numbers"].tolist() == [z for a in frames for z in a.numbers]
    energies = [
        a.info[names["energy"]] if names["energy"] in a.info else a.get_potential_energy()
        for a in frames
    ]
    assert found.structures["energy"] == pytest.approx(np.array(energies, float), abs=1e-9)
    if "forces" in names:
        key = names["forces"]
        arrays = [a.arrays[key] if key in a.arrays else a.get_forces() for a in frames]
        assert found.atoms["forces"] == pytest.approx(np.concatenate(arrays), abs=1e-9)
    if stress is not None:
        assert found.structures["stress"] == pytest.approx(np.array(stress), abs=1e-9)
        assert found.structures["pbc"].tolist() == [a.pbc.tolist() for a in frames]
        cells = [a.cell.array * a.pbc.any() for a in frames]
        assert found.structures["cell"] == pytest.approx(np.array(cells), abs=1e-9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ONE + "\n" + ONE, "a blank line stands between structures"),
        ("\n" + ONE, "a blank line stands between structures"),
        ("garbage\n" + ONE, 'found "garbage" where a number of atoms should stand'),
        (ONE + "0\n\n" + ONE, 'found "0" where a number of atoms should stand'),
        (ONE + "-2\n" + ONE, 'found "-2" where'),
        (ONE + ONE.replace("2\n", "3\n", 1), "announces 3 atoms, and 2 lines of atoms follow"),
        (ONE + ONE.replace("2\n", "1\n", 1), "where a number of atoms should stand"),
        (ONE + ONE.replace("2\n", "3\n", 1) + ONE, "cannot be read"),
        (ONE + "2\n", "announces 2 atoms, and 0 lines of atoms follow"),
        (ONE + ONE[:-12], "cannot be read: expected 7 fields"),
        (ONE + ONE.replace("0.7", "o.7"), "invalid field 'o.7'"),
        (ONE + ONE.replace("0.7", "0x.7"), "a line has a hexadecimal number"),
        (ONE + ONE.replace("R:3 energy", "R:3energy"), "the columns .* cannot be understood"),
        (ONE + ONE.replace("H 0 0 0.7", "Hx 0 0 0.7"), '"Hx" is not an element'),
        (ONE + ONE.replace("H 0 0 0.7", "X 0 0 0.7"), '"X" is not an element'),
        (ONE + ONE.replace("0.7", "nan"), "a position is not a finite number"),
        (ONE + ONE.replace("0.7", "inf"), "a position is not a finite number"),
        (ONE + ONE.replace("0.7", "0.0"), "two atoms are at the same place"),
        (ONE + ONE.replace("-1.5", "nan"), 'energy is NaN(.|\n)*add missing = "nan"'),
        (ONE + ONE.replace("-1.5", "inf"), "energy is infinite(.|\n)*remedy"),
        (ONE + ONE.replace("-1.5", "1e999"), "energy is infinite"),
        (ONE + ONE.replace("0.7 0 0 -1", "0.7 0 nan -1"), "forces is NaN"),
        (ONE + ONE.replace("0.7 0 0 -1", "0.7 0 -inf -1"), "forces is infinite"),
        (ONE + ONE.replace("-1.5", "low"), "holds 'low', which cannot be the label energy"),
        (ONE + ONE.replace("-1.5", '"1 2"'), "shape(.|\n)*one number a structure"),
        (ONE + ONE.replace("-1.5", "99999999999999999999"), "cannot be the label energy"),
        (ONE + ONE.replace("-1.5", "T"), "cannot be the label energy"),
        (ONE + ONE.replace("-1.5", "-1_500"), "holds '-1_500', which cannot be the label energy"),
        (ONE + ONE.replace("forces:R:3", "other:R:2:x:R:1"), ""),
        (ONE + ONE.replace("forces:R:3", "forces:R:2:x:R:1"), "which cannot be the label forces"),
        (ONE + ONE.replace("species", "spezies"), 'there is no column "species"'),
        (ONE + ONE.replace("energy=", "energy="[:-1] + " ="), ""),
        (ONE + ONE.replace("energy=-1.5", 'energy=-1.5 note="open'), "cannot be read"),
    ],
)
def test_a_damaged_file_is_refused_by_structure(tmp_path: Path, text: str, message: str) -> None:
    if not message:  # not damaged: the key is absent from this structure, or just spaced
        assert len(_text(tmp_path, text, energy=ENERGY, forces=FORCES)) == 2
        return
    found = _error(tmp_path, text, energy=ENERGY, forces=FORCES)
    assert "(counted from 0), line" in found

    assert re.search(message, found), found


def test_nan_means_missing_where_it_is_declared_to(tmp_path: Path) -> None:
    text = ONE.replace("-1.5", "nan") + ONE + ONE.replace("0.7 0 0 -1", "0.7 0 nan -1")
    missing = {"missing": "nan"}
    found = _text(tmp_path, text, energy=ENERGY | missing, forces=FORCES | missing)
    assert np.isnan(found.structures["energy"]).tolist() == [True, False, False]
    assert np.isnan(found.atoms["forces"]).sum() == 1
    text = _error(tmp_path, text.replace("nan", "inf"), energy=ENERGY | missing)
    assert "energy is infinite" in text


def test_a_key_in_some_structures_only_is_nan_for_the_others(tmp_path: Path) -> None:
    bare = ONE.replace(" energy=-1.5", "").replace(":forces:R:3", ":velo:R:3")
    found = _text(tmp_path, bare + ONE, energy=ENERGY, forces=FORCES)
    assert np.isnan(found.structures["energy"]).tolist() == [True, False]
    assert np.isnan(found.atoms["forces"][:2]).all()
    assert np.isfinite(found.atoms["forces"][2:]).all()


def test_a_key_that_no_structure_has_is_refused_with_those_there_are(tmp_path: Path) -> None:
    text = _error(tmp_path, ONE, energy={"key": "enrgy", "unit": "eV"})
    assert 'no structure has the label energy under the key "enrgy"' in text
    assert 'did you mean "energy"?' in text
    assert "the keys in the file: energy, forces" in text


def test_an_array_with_another_shape_is_refused(tmp_path: Path) -> None:
    text = ONE.replace("energy", 'mu="1 2" energy')
    found = _error(tmp_path, text, dipole={"key": "mu", "unit": "debye"})
    assert 'the key "mu" holds an array of shape (2,), which cannot be the label dipole' in found
    assert "an array of shape (3,) a structure" in found


def test_groups_are_read_by_their_key(tmp_path: Path) -> None:
    path = tmp_path / "x.extxyz"
    path.write_text(ONE.replace("energy", "molecule=H2 energy") + ONE)
    config = [SourceConfig.model_validate({"path": str(path), "energy": ENERGY})]
    with pytest.raises(SourceError, match=r'has no key "molecule" to group by(.|\n)*structure 1'):
        sources.read(sources.locate(config), config, "molecule")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.extxyz", b"", "the file is empty"),
        ("nowhere/x.extxyz", None, "no data file at"),
        ("*.extxyz", None, "no data file at"),
        ("x.dat", b"1", r"ASE cannot read(.|\n)*x\.dat"),
    ],
)
def test_files_that_cannot_be_a_source(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=message):
        _read(tmp_path / name)


def test_a_file_named_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.xyz").write_text(ONE)
    with pytest.raises(SourceError, match=r"named twice(.|\n)*a.xyz(.|\n)*a glob may match it"):
        _read([tmp_path / "a.xyz", tmp_path / "*.xyz"])


def test_more_files_than_can_be_numbered_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MOST_FILES", 2)
    for name in "abc":
        (tmp_path / f"{name}.xyz").write_text(ONE)
    assert len(_read([tmp_path / "a.xyz", tmp_path / "b.xyz"])) == 2
    with pytest.raises(SourceError, match=r"the sources have 3 files(.|\n)*several files into one"):
        _read(tmp_path / "*.xyz")


def test_a_file_of_blank_lines_has_no_structures(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="there are no structures"):
        _text(tmp_path, "\n\n")


def test_a_file_cut_anywhere_gives_an_error_or_the_structures_before(tmp_path: Path) -> None:
    text = ONE + ONE.replace("-1.5", "-2.5")
    labels = {"energy": ENERGY, "forces": FORCES}
    for cut in range(1, len(text) - 1):  # without its last line end and digit it is whole
        if len(ONE) - 1 <= cut <= len(ONE):
            assert len(_text(tmp_path, text[:cut], **labels)) == 1
            continue
        assert re.search(r"structure [01] \(counted", _error(tmp_path, text[:cut], **labels)), cut


def test_a_file_longer_than_a_chunk(tmp_path: Path) -> None:
    n = raw.CHUNK + 3
    found = _text(tmp_path, "".join(ONE.replace("-1.5", f"-{s}.5") for s in range(n)))
    assert found.structures["energy"].tolist() == [-(s + 0.5) for s in range(n)]
    assert found.structures["source_index"].tolist() == list(range(n))
    assert found.n_atoms == 2 * n
    bad = ONE * (n - 1) + ONE.replace("-1.5", "nan")
    assert f"structure {n - 1} (counted from 0), line {4 * (n - 1) + 1}" in _error(tmp_path, bad)


@pytest.mark.parametrize("number", ["4294967297", "-4294967295", "2147483648", "9" * 20])
@pytest.mark.parametrize(
    ("name", "old", "new", "label"),
    [
        ("energy", "-1.5", "{}", ENERGY),
        ("dipole", "energy", 'mu="0 {} 1" energy', {"key": "mu", "unit": "e*angstrom"}),
        ("charges", "forces:R:3 energy=-1.5\nH 0 0 0 0", "q:I:1:w:R:2\nH 0 0 0 {}", {"key": "q"}),
    ],
)
def test_an_integer_of_more_than_32_bits_is_never_another_number(
    tmp_path: Path, number: str, name: str, old: str, new: str, label: dict[str, str]
) -> None:
    assert old in ONE
    text = ONE.replace(old, new.format(number))
    with contextlib.suppress(SourceError):  # refused, or read as it is
        found = _text(tmp_path, text, **{name: label})
        assert float(number) in (found.structures | found.atoms)[name]


@pytest.mark.parametrize("number", ["5", "-3", "+5", "007"])
def test_an_integer_is_a_number_too(tmp_path: Path, number: str) -> None:
    assert _text(tmp_path, ONE.replace("-1.5", number)).structures["energy"] == [float(number)]


def test_a_number_of_atoms_beyond_all_bounds_is_refused(tmp_path: Path) -> None:
    text = _error(tmp_path, ONE + "9" * 30 + ONE[1:])
    assert "structure 1 (counted from 0), line 5" in text


def test_a_value_that_its_unit_makes_infinite_is_refused(tmp_path: Path) -> None:
    energy = {"key": "energy", "unit": "hartree"}
    assert "infinite" in _error(tmp_path, ONE.replace("-1.5", "1e308"), energy=energy)


def test_a_label_that_is_nan_in_every_structure_is_not_called_a_misspelt_key(
    tmp_path: Path,
) -> None:
    text = _error(tmp_path, ONE.replace("-1.5", "nan"), energy=ENERGY | {"missing": "nan"})
    assert "energy" in text
    assert "did you mean" not in text


@pytest.mark.parametrize("form", ['"nan 0 0"', "[nan, 0, 0]"])
def test_nan_in_a_vector_of_a_structure(tmp_path: Path, form: str) -> None:
    text = ONE.replace("energy", f"mu={form} energy") + ONE.replace("energy", 'mu="1 2 3" energy')
    label = {"key": "mu", "unit": "e*angstrom"}
    assert "dipole is NaN" in _error(tmp_path, text, dipole=label)
    found = _text(tmp_path, text, dipole=label | {"missing": "nan"}).structures["dipole"]
    assert np.array_equal(found, [[np.nan, 0, 0], [1, 2, 3]], equal_nan=True)


def test_sources_keep_their_own_keys_and_units(tmp_path: Path) -> None:
    (tmp_path / "a.xyz").write_text(ONE)
    (tmp_path / "b.xyz").write_text(ONE.replace("energy", "E").replace("forces", "velo"))
    config = [
        SourceConfig.model_validate({"path": str(tmp_path / name), **labels})
        for name, labels in (
            ("a.xyz", {"energy": ENERGY, "forces": FORCES}),
            ("b.xyz", {"energy": {"key": "E", "unit": "kcal/mol"}, "total_charge": {"value": 1}}),
        )
    ]
    found = sources.read(sources.locate(config), config, None)
    kcal = ase_units.kcal / ase_units.mol
    assert found.structures["energy"] == pytest.approx([-1.5, -1.5 * kcal], rel=1e-7)
    assert found.structures["total_charge"].tolist()[1] == 1
    assert np.isnan(found.structures["total_charge"][0])
    assert np.isfinite(found.atoms["forces"]).all(axis=1).tolist() == [True, True, False, False]
    assert found.structures["source"].tolist() == [0, 1]
    assert found.structures["source_index"].tolist() == [0, 0]


def test_files_are_named_by_their_content(tmp_path: Path) -> None:
    (tmp_path / "x.xyz").write_text(ONE)
    config = [SourceConfig.model_validate({"path": str(tmp_path / "x.xyz"), "energy": ENERGY})]
    (file,) = sources.locate(config)
    assert file.sha256 == hashlib.sha256(ONE.encode()).hexdigest()
    assert file.bytes == len(ONE.encode())
    assert file.attributes()["name"] == "x.xyz"


SMALL = (
    '3\nProperties=species:S:1:pos:R:3:forces:R:3 energy=-76.25 pbc="F F F"\n'
    "O 0.00 0.00 0.11 0.10 0.20 0.30\nH 0.00 0.76 -0.47 -0.1 -0.2 -0.3\nH 0.0 -0.76 -0.47 0 0 0\n"
    "1\nProperties=species:S:1:pos:R:3:forces:R:3 energy=-13.5 note=x\nH 1 2 3 0 0 1e-3\n"
    "2\nProperties=species:S:1:pos:R:3:forces:R:3 energy=-1.5\nH 0 0 0 0 0 1\nCl 0 0 1.3 0 0 -1\n"
)


def _mutated(rng: np.random.Generator, data: bytes) -> bytes:
    """A few bytes overwritten, deleted or inserted, or the end cut off."""
    found = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(0, len(found) + 1))
        alphabet = b'0123456789.-+eEnaif \t\n\r"=:_HOCTFxX\x00\xff{}[],'
        byte = alphabet[int(rng.integers(0, len(alphabet)))]
        match int(rng.integers(0, 8)):
            case 0 | 1 | 2:
                found[at : at + 1] = bytes([byte])
            case 3 | 4:
                del found[at : at + int(rng.integers(1, 4))]
            case 5:
                found[at:at] = bytes([byte])
            case 6:
                found[at:at] = found[at : at + int(rng.integers(1, 90))]
            case _:
                del found[at:]
    return bytes(found)


def _naive(data: bytes) -> list[tuple[list[str], list[list[float]], float]]:
    """(symbols, columns, energy) of every structure, word by word."""
    lines = data.decode("utf-8", "replace").replace("\r\n", "\n").split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    found = []
    while lines:
        n, comment = int(lines[0]), lines[1]
        rows = [line.split() for line in lines[2 : 2 + n]]
        energy = re.findall(r"(?:^|\s)\"?energy\"?\s*=\s*[\"\[{]?\s*([^\s\"\]}]+)", comment)
        at, words = {}, 0
        for name, _, width in re.findall(
            r"(\w+):(\w):(\d+)", re.findall(r'(?i)Properties\s*=\s*"?([^\s"]+)', comment)[-1]
        ):
            at[name] = slice(words, words + int(width))
            words += int(width)
        missing = ["nan"] * 3
        numbers = [
            [
                float(w)
                for w in (*row[at["pos"]], *(row[at["forces"]] if "forces" in at else missing))
            ]
            for row in rows
        ]
        symbols = [row[at["species"]][0] for row in rows]
        found.append((symbols, numbers, float(energy[-1]) if energy else np.nan))
        lines = lines[2 + n :]
    return found


@pytest.mark.parametrize(
    "seeds", [range(400), pytest.param(range(400, 10_400), marks=pytest.mark.slow)]
)
def test_mutations_give_an_error_or_the_right_numbers(tmp_path: Path, seeds: range) -> None:
    path, refused, read = tmp_path / "x.xyz", 0, 0
    for seed in seeds:
        data = _mutated(np.random.default_rng(seed), SMALL.encode())
        path.write_bytes(data)
        try:
            found = _read(path, energy=ENERGY, forces=FORCES)
        except InputError:
            refused += 1
            continue
        read += 1
        expected = _naive(data)
        symbols = [chemical_symbols[z] for z in found.atoms["atomic_numbers"]]
        assert symbols == [symbol for names, _, _ in expected for symbol in names], seed
        rows = np.array([row for _, numbers, _ in expected for row in numbers])
        both = np.concatenate([found.atoms["positions"], found.atoms["forces"]], axis=1)
        assert np.allclose(both, rows, rtol=1e-12, atol=0, equal_nan=True), seed
        energies = [energy for _, _, energy in expected]
        assert np.allclose(found.structures["energy"], energies, rtol=1e-12, equal_nan=True), seed
    assert refused > len(seeds) / 4
    assert read > len(seeds) / 20


def test_hashes_of_large_files_are_remembered_until_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "REMEMBERED_FROM", 1)
    monkeypatch.setattr(sources, "SETTLED", -1)
    read: list[str] = []
    digest = hashlib.file_digest

    def counted(file: Any, name: str) -> Any:
        read.append(file.name)
        return digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    path = tmp_path / "a.xyz"
    path.write_text("one")
    config = [SourceConfig.model_validate({"path": str(path)})]
    first, again = (sources.locate(config, tmp_path / "new")[0].sha256 for _ in range(2))
    assert first == again == hashlib.sha256(b"one").hexdigest()
    assert len(read) == 1
    path.write_text("two")
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert sources.locate(config, tmp_path / "new")[0].sha256 == hashlib.sha256(b"two").hexdigest()
    (tmp_path / "new" / ".hashes.json").write_text("[nonsense")
    assert sources.locate(config, tmp_path / "new")[0].sha256 == hashlib.sha256(b"two").hexdigest()
    monkeypatch.setattr(sources, "SETTLED", 10**18)  # it was written just now
    path.write_text("six")
    for _ in range(2):
        found = sources.locate(config, tmp_path / "new")[0].sha256
    assert found == hashlib.sha256(b"six").hexdigest()
    assert len(read) == 5
