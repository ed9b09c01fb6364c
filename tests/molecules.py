"""Small made-up data sets for the tests of the torch side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from ase.data import chemical_symbols

from runner.structures import Structures


def random_structures(
    sizes: list[int], seed: int = 0, elements: tuple[int, ...] = (1, 6, 7, 8)
) -> Structures:
    """Random atoms at least 0.8 Å apart, with random labels of every kind."""
    rng = np.random.default_rng(seed)
    n_atoms = sum(sizes)
    return Structures(
        first_atom=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        atoms={
            "atomic_numbers": rng.choice(elements, n_atoms).astype(np.uint8),
            "positions": np.concatenate([_spread_out(rng, n) for n in sizes]),
            "forces": rng.normal(size=(n_atoms, 3)),
            "charges": rng.normal(size=n_atoms),
        },
        structures={
            "energy": rng.normal(size=len(sizes)),
            "total_charge": rng.integers(-1, 2, len(sizes)).astype(np.float64),
            "dipole": rng.normal(size=(len(sizes), 3)),
            "source": np.zeros(len(sizes), np.int16),
            "source_index": np.arange(len(sizes), dtype=np.int64),
        },
    )


def _spread_out(rng: np.random.Generator, n: int) -> np.ndarray:
    positions: list[np.ndarray] = []
    while len(positions) < n:
        candidate = rng.uniform(-0.8 * n ** (1 / 3), 0.8 * n ** (1 / 3) + 0.5, size=3)
        if all(np.linalg.norm(candidate - other) > 0.8 for other in positions):
            positions.append(candidate)
    return np.array(positions)


def without(structures: Structures, name: str, missing: list[int]) -> Structures:
    """The same structures, some of them without one label."""
    atoms, per_structure = dict(structures.atoms), dict(structures.structures)
    for index in missing:
        if name in atoms:
            rows = slice(structures.first_atom[index], structures.first_atom[index + 1])
            atoms[name] = atoms[name].copy()
            atoms[name][rows] = np.nan
        else:
            per_structure[name] = per_structure[name].copy()
            per_structure[name][index] = np.nan
    return Structures(structures.first_atom, atoms, per_structure)


SELF_ENERGIES = {1: -13.6, 6: -1029.8, 7: -1485.3, 8: -2042.6}


def springs(seed: int = 0, n: int = 60) -> Structures:
    """Random molecules held together by springs, with exact forces and planted self-energies."""
    structures = random_structures([3 + (index % 3) for index in range(n)], seed)
    energies, forces = [], []
    for index in range(n):
        rows = slice(structures.first_atom[index], structures.first_atom[index + 1])
        r, z = structures.atoms["positions"][rows], structures.atoms["atomic_numbers"][rows]
        separation = r[:, None] - r[None]
        distance = np.linalg.norm(separation, axis=-1) + np.eye(len(r))
        stretch = (distance - 1.5) * (1 - np.eye(len(r)))
        energies.append(0.25 * (stretch**2).sum() + sum(SELF_ENERGIES[int(a)] for a in z))
        forces.append(-((stretch / distance)[:, :, None] * separation).sum(axis=1))
    return Structures(
        structures.first_atom,
        structures.atoms | {"forces": np.concatenate(forces)},
        structures.structures | {"energy": np.array(energies)},
    )


def write_extxyz(path: Path, structures: Structures) -> None:
    """All labels of some structures, in eV, Å and e."""
    lines = []
    for index in range(len(structures)):
        rows = slice(structures.first_atom[index], structures.first_atom[index + 1])
        atoms = {name: array[rows] for name, array in structures.atoms.items()}
        dipole = " ".join(repr(float(x)) for x in structures.structures["dipole"][index])
        lines += [
            str(len(atoms["positions"])),
            "Properties=species:S:1:pos:R:3:forces:R:3:charges:R:1 "
            f"energy={float(structures.structures['energy'][index])!r} "
            f"total_charge={float(structures.structures['total_charge'][index])!r} "
            f'dipole="{dipole}" molecule=m{index % 7} pbc="F F F"',
        ]
        for z, r, f, q in zip(
            atoms["atomic_numbers"],
            atoms["positions"],
            atoms["forces"],
            atoms["charges"],
            strict=True,
        ):
            numbers = " ".join(repr(float(x)) for x in (*r, *f, q))
            lines.append(f"{chemical_symbols[z]} {numbers}")
    path.write_text("\n".join(lines) + "\n")


CONFIG = """
[prepare]
name = "springs"
[[prepare.source]]
path = "data.extxyz"
energy = { key = "energy", unit = "eV" }
forces = { key = "forces", unit = "eV/angstrom" }
total_charge = { key = "total_charge" }
dipole = { key = "dipole", unit = "e*angstrom" }
[train]
epochs = 3
[train.batch]
structures = 8
[train.potential]
name = "painn"
cutoff = "4 angstrom"
features = 8
interactions = 2
radial_basis = 6
[train.loss.energy]
per_atom = true
[train.loss.forces]
weight = 10.0
[train.loss.dipole]
[train.optimizer]
lr = 5e-3
[train.trainer]
accelerator = "cpu"
"""


def write_experiment(folder: Path, structures: Structures | None = None) -> Path:
    """An experiment of a few seconds on made-up data; returns its config file."""
    folder.mkdir(parents=True, exist_ok=True)
    write_extxyz(folder / "data.extxyz", structures or springs())
    (folder / "config.toml").write_text(CONFIG)
    return folder / "config.toml"
