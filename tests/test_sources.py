"""Extended XYZ: right numbers in the program's units, or an error that names file and structure."""

from __future__ import annotations

import contextlib
import hashlib
import re
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from ase import units as ase_units
from molecules import random_structures, write_extxyz

from runner import sources
from runner.config import SourceConfig
from runner.errors import SourceError
from runner.sources import extxyz
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
    monkeypatch.setattr(extxyz, "CHUNK", 3)
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


def test_a_molecule_in_a_box_is_not_periodic_but_a_crystal_is(tmp_path: Path) -> None:
    box = 'Lattice="9 0 0 0 9 0 0 0 9"'
    assert len(_text(tmp_path, ONE.replace("energy", f'{box} pbc="F F F" energy'))) == 1
    for pbc in ("", 'pbc="T T F"'):
        text = _error(tmp_path, ONE + ONE.replace("energy", f"{box} {pbc} energy"))
        assert "the structure is periodic" in text
        assert "structure 1 (counted from 0), line 5" in text


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
        ("x.dat", b"1", r"not clear from its suffix(.|\n)*\.extxyz, \.xyz(.|\n)*format: extxyz"),
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
    n = extxyz.CHUNK + 3
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
