"""The reference is true: what it lists is there, and its examples run."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ase.io
import h5py
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import chemical_symbols
from ase.db import connect
from molecules import springs, write_extxyz
from typer.testing import CliRunner

from runner.cli import app
from runner.config import Section, load_config
from runner.prepare import prepare
from runner.reference import TABLES, reference
from runner.store import PreparedDataset
from runner.structures import Structures
from runner.terminal import Terminal

README = Path(__file__).parents[1] / "experiments" / "README.md"
TEXT = README.read_text(encoding="utf-8")
EXAMPLES = [
    example
    for example in re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
    if example.startswith(("[[prepare", "[prepare"))
]
SIZES = springs(n=12)
SAME = springs(n=12).take(np.array([0, 3, 6, 9]))  # of three atoms each


def _blocks(structures: Structures) -> list[tuple[np.ndarray, ...]]:
    """(numbers, positions, forces, energy) of each structure."""
    found = []
    for i in range(len(structures)):
        rows = slice(structures.first_atom[i], structures.first_atom[i + 1])
        atoms = structures.atoms
        found.append(
            (
                atoms["atomic_numbers"][rows],
                atoms["positions"][rows],
                atoms["forces"][rows],
                structures.structures["energy"][i],
            )
        )
    return found


def _xyz(path: Path) -> None:
    write_extxyz(path, SIZES)


def _packed_xyz(path: Path) -> None:
    write_extxyz(path.with_suffix(""), springs(seed=1, n=9))
    path.write_bytes(gzip.compress(path.with_suffix("").read_bytes()))
    path.with_suffix("").unlink()


def _crystals(path: Path) -> None:
    _xyz(path)
    box = 'Lattice="9 0 0 0 9 0 0 0 9" virial="1 2 3 0.1 0.2 0.3" pbc="T T T"'
    path.write_text(path.read_text().replace('pbc="F F F"', box))


def _atoms() -> list[Atoms]:
    made = []
    for numbers, positions, forces, energy in _blocks(SIZES):
        atoms = Atoms(numbers, positions)
        atoms.calc = SinglePointCalculator(atoms, energy=float(energy), forces=forces)
        made.append(atoms)
    return made


def _db(path: Path) -> None:
    units = {"energy": "eV", "forces": "eV/Ang", "total_charge": 1.0, "dipole_moment": "eAng"}
    with connect(path) as db:
        db.metadata = {"_property_unit_dict": units, "_distance_unit": "Ang"}
        for numbers, positions, forces, energy in _blocks(SIZES):
            data = {
                "energy": np.array([energy]),
                "forces": forces,
                "total_charge": np.array([0.0]),
                "dipole_moment": positions[0],
            }
            db.write(Atoms(numbers, positions), data=data)


def _aselmdb(path: Path) -> None:
    with connect(path, type="aselmdb") as db:
        for atoms in _atoms():
            db.write(atoms)


def _traj(path: Path) -> None:
    ase.io.write(path, _atoms())


class _Group(NamedTuple):
    """Numbers of one molecule; positions, forces and energies of its two conformers."""

    z: np.ndarray
    r: np.ndarray
    f: np.ndarray
    e: np.ndarray


def _hdf5(path: Path, layout: dict[str, Callable[[_Group], Any]], attribute: str = "") -> None:
    units = {"conformations": "bohr", "positions": "nanometer"}
    with h5py.File(path, "w") as file:
        for number, (z, r, f, e) in enumerate(_blocks(SIZES)):
            molecule = _Group(z, np.stack([r, r + 0.01]), np.stack([f, f]), np.full(2, e))
            group = file.create_group(f"m{number}")
            for key, value in layout.items():
                group[key] = value(molecule)
                unit = units.get(key) or UNITS.get(key)
                if attribute and unit:
                    group[key].attrs[attribute] = unit


UNITS = {
    "dft_total_energy": "hartree",
    "dft_total_gradient": "hartree/bohr",
    "scf_dipole": "elementary_charge*bohr",
    "scf_quadrupole": "elementary_charge*bohr^2",
    "mbis_charges": "elementary_charge",
    "internal_energy_at_0K": "kilojoule_per_mole",
    "dipole_moment_per_system": "elementary_charge * nanometer",
    "partial_charges": "elementary_charge",
}


def _ani1x(path: Path) -> None:
    _hdf5(
        path,
        {
            "atomic_numbers": lambda m: m.z,
            "coordinates": lambda m: m.r,
            "wb97x_dz.energy": lambda m: m.e,
            "wb97x_dz.forces": lambda m: m.f * [[[1]], [[np.nan]]],
            "wb97x_dz.cm5_charges": lambda m: m.r[..., 0],
        },
    )


def _ani2x(path: Path) -> None:
    z, r, f, e = (np.stack(column) for column in zip(*_blocks(SAME), strict=True))
    with h5py.File(path, "w") as file:
        group = file.create_group("003")
        for key, value in (("species", z.astype(int)), ("coordinates", r), ("forces", f)):
            group[key] = value
        group["energies"] = e


def _spice(path: Path) -> None:
    _hdf5(
        path,
        {
            "atomic_numbers": lambda m: m.z.astype(np.int16),
            "conformations": lambda m: m.r,
            "dft_total_energy": lambda m: m.e,
            "dft_total_gradient": lambda m: -m.f,
            "scf_dipole": lambda m: m.r[:, 0],
            "scf_quadrupole": lambda m: m.r[:, :1] * m.r[:, :1].transpose(0, 2, 1),
            "mbis_charges": lambda m: m.r[..., :1],
        },
        "units",
    )


def _modelforge(path: Path) -> None:
    _hdf5(
        path,
        {
            "atomic_numbers": lambda m: m.z[:, None].astype(int),
            "positions": lambda m: m.r,
            "internal_energy_at_0K": lambda m: m.e[:, None],
            "dipole_moment_per_system": lambda m: m.r[:, 0],
            "partial_charges": lambda m: m.r[..., :1],
        },
        "u",
    )


def _physnet(path: Path) -> None:
    blocks = _blocks(SIZES)
    z, r, f = np.zeros((12, 5), int), np.zeros((12, 5, 3)), np.zeros((12, 5, 3))
    for i, (numbers, positions, forces, _) in enumerate(blocks):
        n = len(numbers)
        z[i, :n], r[i, :n], f[i, :n] = numbers, positions, forces
    e = np.array([block[3] for block in blocks])
    np.savez(path, N=(z > 0).sum(1), Z=z, R=r, F=f, E=e, Q=np.zeros(12), D=r[:, 0])


def _one_molecule() -> tuple[np.ndarray, ...]:
    z, r, f, e = _blocks(SIZES)[0]
    steps = 0.01 * np.arange(10)
    return z, r + steps[:, None, None] * f, np.repeat(f[None], 10, 0), e + steps


def _rmd17(path: Path) -> None:
    z, r, f, e = _one_molecule()
    np.savez(path, nuclear_charges=z, coords=r, forces=f, energies=e)


def _sgdml(path: Path) -> None:
    z, r, f, e = _one_molecule()
    np.savez(path, type="d", z=z, R=r + 9, F=f, E=e, r_unit="Ang", e_unit="kcal/mol")


def _deepmd(path: Path) -> None:
    _, r, f, e = _one_molecule()
    (path / "set.000").mkdir(parents=True)
    (path / "type.raw").write_text("0 1 1")
    (path / "type_map.raw").write_text("O H")
    box, virial = np.tile(9 * np.eye(3).ravel(), (10, 1)), np.tile(np.arange(9.0), (10, 1))
    arrays = {"coord": r.reshape(10, 9), "force": f.reshape(10, 9), "energy": e}
    for name, array in (arrays | {"box": box, "virial": virial}).items():
        np.save(path / "set.000" / f"{name}.npy", array)


def _prepared(path: Path) -> None:
    text = '[[prepare.source]]\npath = "a.xyz"\n'
    text += 'energy = { key = "energy", unit = "eV" }\n'
    text += 'forces = { key = "forces", unit = "eV/angstrom" }\n'
    _xyz(path.parent / "a.xyz")
    Path(_run(path.parent, text)["dataset"]).rename(path)


def _split_file(path: Path) -> None:
    path.write_text(json.dumps({"train": list(range(8)), "val": [8, 9], "test": [10, 11]}))


FILES: dict[str, Callable[[Path], None]] = {
    "dft.extxyz": _xyz,
    "test.extxyz": lambda path: write_extxyz(path, springs(seed=2, n=5)),
    "more-*.xyz.gz": lambda path: _packed_xyz(path.with_name("more-1.xyz.gz")),
    "crystals.xyz": _crystals,
    "molecules.db": _db,
    "molecules.aselmdb": _aselmdb,
    "relaxation.traj": _traj,
    "ani1x.h5": _ani1x,
    "ani2x.h5": _ani2x,
    "spice.hdf5": _spice,
    "qm9.hdf5": _modelforge,
    "physnet.npz": _physnet,
    "rmd17_ethanol.npz": _rmd17,
    "ethanol-sgdml.npz": _sgdml,
    "water": _deepmd,
    "earlier.zarr": _prepared,
    "split.json": _split_file,
}


def _run(folder: Path, example: str, *settings: str) -> dict[str, Any]:
    (folder / "config.toml").write_text('[prepare]\nname = "x"\n' + example)
    config = load_config(folder / "config.toml", settings)
    return prepare(config, folder / "prepared", Terminal())


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: re.findall(r'"(.*?)"', e)[0])
def test_an_example_runs_on_a_file_of_its_format(tmp_path: Path, example: str) -> None:
    files = [name for name in FILES if f'"{name}"' in example]
    assert files
    for name in files:
        FILES[name](tmp_path / name)
    everything = [] if "split" in example else ["prepare.split={train=1.0,val=0,test=0}"]
    result = _run(tmp_path, example, *everything)
    dataset = PreparedDataset(Path(result["dataset"]))
    asked = set(re.findall(r"^(\w+) = \{ key", example, re.MULTILINE))
    assert set(dataset.labels) == asked
    assert all(dataset.labels.values())
    if "max_atoms" in example:
        return
    numbers = [z for n in ("train", "val", "test") for z in dataset.read(n).atoms["atomic_numbers"]]
    assert {chemical_symbols[z] for z in numbers} == set(result["elements"])


def test_every_format_has_an_example() -> None:
    for name in FILES:
        assert any(f'"{name}"' in example for example in EXAMPLES), name


def test_the_reference_is_what_the_classes_say() -> None:
    written = re.search(r"<!-- reference.*?-->\n(.*)<!-- end", TEXT, re.DOTALL)
    assert written
    assert written[1].strip() == reference().strip(), (
        "experiments/README.md: put there what `runner schema --reference` prints"
    )


def test_every_key_stands_in_the_reference() -> None:
    text = reference()
    for section in TABLES.values():
        for key, field in section.model_fields.items():
            assert f"| `{key}` |" in text
            is_table = isinstance(field.annotation, type) and issubclass(field.annotation, Section)
            assert field.description or is_table or key == "name", key


def test_the_schema_is_valid_and_knows_every_section() -> None:
    result = CliRunner().invoke(app, ["schema"])
    assert result.exit_code == 0
    schema = json.loads(result.stdout)
    assert set(schema["properties"]) == {"prepare", "train", "extends"}
    for name in (
        "SourceConfig",
        "SplitConfig",
        "FilterConfig",
        "SelfEnergiesConfig",
        "LossConfig",
        "PaiNNConfig",
        "SchNetConfig",
    ):
        assert schema["$defs"][name]["additionalProperties"] is False
    assert CliRunner().invoke(app, ["schema", "--reference"]).stdout.strip() == (
        reference().strip()
    )
