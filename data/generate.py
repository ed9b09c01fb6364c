"""Make `small-molecules.extxyz`: DFT energies, forces, dipoles and charges of small molecules.

    pip install -e '.[data]'
    python data/generate.py --workers 2      # goes on where it stopped
    python data/generate.py --check          # forces against finite differences of the energy

Each molecule is embedded from its SMILES string, relaxed, and displaced at random at several
amplitudes. A geometry is a function of (seed, molecule, index) alone: the file depends neither on
the order of the work nor on how often it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread a worker process: small molecules

import numpy as np
from ase.io import read
from numpy.typing import NDArray
from pyscf import dft, gto, lo
from pyscf.data.elements import MASSES
from pyscf.data.elements import charge as atomic_number
from pyscf.dft.numint import NumInt
from rdkit import Chem
from rdkit.Chem import AllChem
from scipy.optimize import minimize

HERE = Path(__file__).parent
BOHR = 0.529177210544  # Å, CODATA 2022
HARTREE = 27.211386245981  # eV, CODATA 2022
SEED = 20240
AMPLITUDES = (0.02, 0.05, 0.08, 0.11)  # Å, of a hydrogen atom along each axis
LARGEST_FORCE = 20.0  # eV/Å; structures with a larger force on an atom are left out

# name: (SMILES, number of structures)
MOLECULES: dict[str, tuple[str, int]] = {
    "hydrogen": ("[H][H]", 16),
    "nitrogen": ("N#N", 16),
    "carbon_monoxide": ("[C-]#[O+]", 16),
    "carbon_dioxide": ("O=C=O", 32),
    "nitrous_oxide": ("[N-]=[N+]=O", 32),
    "water": ("O", 40),
    "hydrogen_peroxide": ("OO", 40),
    "ammonia": ("N", 40),
    "hydrazine": ("NN", 36),
    "diazene": ("N=N", 36),
    "hydroxylamine": ("NO", 40),
    "methane": ("C", 40),
    "formaldehyde": ("C=O", 40),
    "methanol": ("CO", 40),
    "formic_acid": ("OC=O", 40),
    "hydrogen_cyanide": ("C#N", 32),
    "acetonitrile": ("CC#N", 36),
    "isocyanic_acid": ("N=C=O", 36),
    "methylamine": ("CN", 36),
    "methanimine": ("C=N", 40),
    "acetylene": ("C#C", 36),
    "ethylene": ("C=C", 40),
    "ethane": ("CC", 32),
    "ethanol": ("CCO", 24),
    "dimethyl_ether": ("COC", 20),
    "acetaldehyde": ("CC=O", 28),
    "ketene": ("C=C=O", 36),
    "formamide": ("NC=O", 36),
    "propyne": ("CC#C", 28),
    "allene": ("C=C=C", 28),
    "oxirane": ("C1CO1", 28),
    "cyclopropene": ("C1C=C1", 24),
    "cyanamide": ("NC#N", 36),
    "nitroxyl": ("N=O", 36),
    "nitrous_acid": ("ON=O", 36),
    "glyoxal": ("O=CC=O", 28),
    "urea": ("NC(=O)N", 20),
    "water_dimer": ("O.O", 32),
    "diazomethane": ("C=[N+]=[N-]", 36),
    "formaldoxime": ("C=NO", 36),
    # cations
    "ammonium": ("[NH4+]", 40),
    "hydronium": ("[OH3+]", 40),
    "methylammonium": ("C[NH3+]", 32),
    "formyl_cation": ("C#[O+]", 32),
    "nitronium": ("O=[N+]=O", 32),
    "iminium": ("C=[NH2+]", 36),
    "hydroxymethylium": ("C=[OH+]", 36),
    # anions
    "hydroxide": ("[OH-]", 16),
    "cyanide": ("[C-]#N", 16),
    "formate": ("[O-]C=O", 36),
    "methoxide": ("C[O-]", 36),
    "nitrite": ("[O-]N=O", 32),
    "nitrate": ("[O-][N+](=O)[O-]", 32),
    "azide": ("[N-]=[N+]=[N-]", 32),
    "cyanate": ("[O-]C#N", 32),
    "acetylide": ("C#[C-]", 32),
}

# Starting geometries in Å where RDKit finds none, in its order of atoms
STARTS: dict[str, list[list[float]]] = {
    "O.O": [
        [0.0, 0.0, 0.0],
        [2.9, 0.0, 0.0],
        [0.96, 0.0, 0.0],
        [-0.24, 0.93, 0.0],
        [3.2, -0.45, 0.77],
        [3.2, -0.45, -0.77],
    ]
}

Array = NDArray[np.float64]
Record = dict[str, Any]


# Electronic structure


def embed(smiles: str) -> tuple[list[str], Array, int]:
    """Symbols, a starting geometry in Å and the formal charge of a SMILES string."""
    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    symbols = [atom.GetSymbol() for atom in molecule.GetAtoms()]
    if smiles in STARTS:
        return symbols, np.array(STARTS[smiles]), Chem.GetFormalCharge(molecule)
    if AllChem.EmbedMolecule(molecule, randomSeed=7) != 0:
        raise RuntimeError(f"RDKit finds no geometry for {smiles}")
    AllChem.UFFOptimizeMolecule(molecule)
    return symbols, molecule.GetConformer().GetPositions(), Chem.GetFormalCharge(molecule)


class KeptOrbitals(NumInt):
    """PySCF's numerical integration, keeping the orbitals on the grid between SCF cycles."""

    kept: tuple[Any, int] = (None, 0)

    def block_loop(
        self, mol: Any, grids: Any, nao: int | None = None, deriv: int = 0, **options: Any
    ) -> Iterator[Any]:
        if self.kept[0] is not grids.coords or self.kept[1] != deriv:
            blocks = super().block_loop(mol, grids, nao, deriv, **options)
            self.blocks = [(values.copy(order="K"), *rest) for values, *rest in blocks]
            self.kept = (grids.coords, deriv)
        return iter(self.blocks)


def kohn_sham(symbols: list[str], positions: Array, charge: int) -> Any:
    """Converged ωB97X/def2-SVP with density fitting; None if the SCF does not converge."""
    atoms = list(zip(symbols, (positions / BOHR).tolist(), strict=True))
    molecule = gto.M(atom=atoms, unit="Bohr", basis="def2-svp", charge=charge, verbose=0)
    method = dft.RKS(molecule, xc="wb97x").density_fit(auxbasis="def2-universal-jkfit")
    method._numint, method.max_cycle = KeptOrbitals(), 100
    guess = None
    for level, energy, slope in ((0, 1e-6, 1e-4), (4, 1e-10, 1e-6)):  # a small grid first: a guess
        method.grids.level = level
        method.grids.reset()
        method.conv_tol, method.conv_tol_grad = energy, slope
        method.kernel(guess)
        guess = method.make_rdm1()
    return method if method.converged else None


def gradient(method: Any) -> Array:
    """∂E/∂R in hartree/bohr, the motion of the integration grid included."""
    calculation = method.nuc_grad_method()
    calculation.grid_response = True
    return np.asarray(calculation.kernel())


def dipole(method: Any) -> Array:
    """The dipole moment about the origin of the coordinates, in e·bohr."""
    return np.asarray(method.dip_moment(unit="AU", origin=np.zeros(3), verbose=0))


def iao_charges(method: Any) -> Array:
    """Partial charges in e: populations of Löwdin-orthogonalised intrinsic atomic orbitals.

    Source:
        Knizia, J. Chem. Theory Comput. 9, 4834 (2013), doi:10.1021/ct400687b.
    """
    molecule = method.mol
    occupied = method.mo_coeff[:, method.mo_occ > 0]
    overlap = method.get_ovlp()
    orbitals = lo.vec_lowdin(lo.iao.iao(molecule, occupied), overlap)
    coefficients = orbitals.T @ overlap @ occupied
    populations = 2.0 * np.einsum("ij,ij->i", coefficients, coefficients)
    atom_of = [label[0] for label in lo.iao.reference_mol(molecule).ao_labels(fmt=None)]
    return molecule.atom_charges() - np.bincount(atom_of, populations, molecule.natm)


# Geometries


def relax(name: str) -> Record:
    """A stationary point of a molecule, centred on its centre of mass, in Å."""
    symbols, start, total_charge = embed(MOLECULES[name][0])
    objective = partial(energy_and_gradient, symbols, total_charge)
    found = minimize(objective, start.ravel() / BOHR, jac=True, options={"gtol": 1e-3})
    masses = np.array([MASSES[atomic_number(symbol)] for symbol in symbols])
    positions = found.x.reshape(-1, 3) * BOHR
    positions -= masses @ positions / masses.sum()
    return {
        "molecule": name,
        "symbols": symbols,
        "positions": positions.tolist(),
        "masses": masses.tolist(),
        "total_charge": total_charge,
        "largest_force": float(np.abs(found.jac).max() * HARTREE / BOHR),
    }


def energy_and_gradient(symbols: list[str], charge: int, flat: Array) -> tuple[float, Array]:
    """E and ∂E/∂R in atomic units at the flattened positions `flat`, in bohr."""
    method = kohn_sham(symbols, flat.reshape(-1, 3) * BOHR, charge)
    if method is None:
        raise RuntimeError(f"the SCF of {''.join(symbols)} does not converge while relaxing")
    return method.e_tot, gradient(method).ravel()


def random_rotation(rng: np.random.Generator) -> Array:
    """A rotation matrix, uniform over SO(3)."""
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    q *= np.sign(np.diag(r))
    return q * np.linalg.det(q)


def amplitude(index: int) -> float:
    """The amplitude of structure `index`, in Å; structure 0 is the relaxed one."""
    return AMPLITUDES[index % len(AMPLITUDES)] if index > 0 else 0.0


def displace(name: str, index: int, relaxed: Record) -> Array:
    """Geometry number `index`, in Å, as it will be written.

    Displacements are Gaussian; their width falls with the mass as that of a zero-point motion
    does, m^(-1/4), so that heavy, stiff bonds are not torn.
    """
    rng = np.random.default_rng([SEED, zlib.crc32(name.encode()), index])
    positions = np.array(relaxed["positions"])
    if index > 0:
        width = amplitude(index) * (1.008 / np.array(relaxed["masses"])) ** 0.25
        positions = positions + width[:, None] * rng.normal(size=positions.shape)
    return np.round(positions @ random_rotation(rng).T, 8)


def label(name: str, index: int, relaxed: Record) -> Record:
    """One structure with its labels in eV, Å and e; `energy` is None if the SCF failed."""
    positions = displace(name, index, relaxed)
    method = kohn_sham(relaxed["symbols"], positions, relaxed["total_charge"])
    if method is None:
        return {"molecule": name, "index": index, "energy": None}
    return {
        "molecule": name,
        "index": index,
        "symbols": relaxed["symbols"],
        "positions": positions.tolist(),
        "total_charge": relaxed["total_charge"],
        "energy": float(method.e_tot) * HARTREE,
        "forces": (-gradient(method) * HARTREE / BOHR).tolist(),
        "dipole": (dipole(method) * BOHR).tolist(),
        "charges": iao_charges(method).tolist(),
    }


# The work folder: one finished result a line


@contextmanager
def processes(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Worker processes that give up the tasks still waiting if one of them fails."""
    pool = ProcessPoolExecutor(workers)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def read_lines(path: Path) -> Iterator[Record]:
    """Records of an append-only file; a last line that was cut off is left out."""
    if path.exists():
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                yield json.loads(line)


def mend(path: Path) -> None:
    """Remove a last line that was cut off, so that the next record starts a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        whole = path.read_bytes().rpartition(b"\n")
        if whole[2]:
            path.write_bytes(whole[0] + whole[1])


def append(path: Path, record: Record) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def relax_all(work: Path, pool: ProcessPoolExecutor) -> dict[str, Record]:
    """Every molecule's minimum; those not in the work folder are computed and added to it."""
    path = work / "relaxed.jsonl"
    mend(path)
    relaxed = {record["molecule"]: record for record in read_lines(path)}
    tasks = [pool.submit(relax, name) for name in MOLECULES if name not in relaxed]
    for number, task in enumerate(as_completed(tasks), start=1):
        record = task.result()
        relaxed[record["molecule"]] = record
        append(path, record)
        force = record["largest_force"]
        print(f"relaxed {number}/{len(tasks)} {record['molecule']}: {force:.4f} eV/Å", flush=True)
    return relaxed


def label_all(work: Path, pool: ProcessPoolExecutor, relaxed: dict[str, Record]) -> None:
    """Label every structure that is not in the work folder yet."""
    path = work / "labels.jsonl"
    mend(path)
    done = {key_of(record) for record in read_lines(path)}
    missing = [key for key in structures() if key not in done]
    missing.sort(key=lambda key: key[1])  # the molecules take turns: a part is of use early
    tasks = [pool.submit(label, name, index, relaxed[name]) for name, index in missing]
    for number, task in enumerate(as_completed(tasks), start=1):
        record = task.result()
        append(path, record)
        print(f"{number}/{len(tasks)} {record['molecule']} {record['index']}", flush=True)


def structures() -> list[tuple[str, int]]:
    """(molecule, index) of every structure, in the order of the file."""
    return [(name, index) for name, (_, count) in MOLECULES.items() for index in range(count)]


def key_of(record: Record) -> tuple[str, int]:
    return record["molecule"], record["index"]


# The dataset


def frame(record: Record) -> str:
    """One structure in extended XYZ."""
    moment = " ".join(f"{component:.8f}" for component in record["dipole"])
    comment = (
        "Properties=species:S:1:pos:R:3:forces:R:3:charges:R:1 "
        f'energy={record["energy"]:.10f} dipole="{moment}" '
        f"total_charge={record['total_charge']} molecule={record['molecule']} "
        f"index={record['index']} amplitude={amplitude(record['index']):.2f} "
        'pbc="F F F"'
    )
    rows = np.column_stack([record["positions"], record["forces"], record["charges"]])
    lines = [str(len(rows)), comment]
    for symbol, row in zip(record["symbols"], rows, strict=True):
        lines.append(f"{symbol:2s}" + "".join(f" {number:13.8f}" for number in row))
    return "\n".join(lines) + "\n"


def assemble(work: Path, output: Path) -> None:
    """Write the dataset, molecule by molecule, and say what was left out."""
    order = {key: number for number, key in enumerate(structures())}
    records = sorted(read_lines(work / "labels.jsonl"), key=lambda record: order[key_of(record)])
    converged = [record for record in records if record["energy"] is not None]
    kept = [record for record in converged if largest_force(record) <= LARGEST_FORCE]
    output.write_text("".join(frame(record) for record in kept))
    print(f"{output}: {len(kept)} structures")
    print(f"left out: {len(records) - len(converged)} without a converged SCF")
    print(f"left out: {len(converged) - len(kept)} with a force above {LARGEST_FORCE} eV/Å")


def largest_force(record: Record) -> float:
    """The largest norm of a force on an atom, in eV/Å."""
    return float(np.linalg.norm(record["forces"], axis=1).max())


# Checks


def check(dataset: Path, workers: int) -> None:
    """Print what the file holds, and how far its labels are from what they have to obey."""
    frames = read(dataset, ":")
    describe(frames)
    with processes(workers) as pool:
        for name in ("water", "formaldehyde", "hydronium", "nitrite"):
            last = [atoms for atoms in frames if atoms.info["molecule"] == name][-1]
            check_forces(last, pool)


def describe(frames: list[Any]) -> None:
    """Print counts, ranges and sums over the whole file."""
    forces = np.concatenate([atoms.get_forces() for atoms in frames])
    net = max(np.abs(atoms.get_forces().sum(axis=0)).max() for atoms in frames)
    excess = max(abs(atoms.get_charges().sum() - atoms.info["total_charge"]) for atoms in frames)
    compositions = [[a.get_chemical_symbols().count(s) for s in "HCNO"] for a in frames]
    norms = np.linalg.norm(forces, axis=1)
    molecules = {atoms.info["molecule"]: atoms.info["total_charge"] for atoms in frames}
    ions = sum(charge != 0 for charge in molecules.values())
    print(f"{len(frames)} structures of {len(molecules)} molecules, {ions} of them ions")
    print(f"{len(forces)} atoms, of H, C, N, O: {np.sum(compositions, axis=0).tolist()}")
    print(f"structures of 0, 1, 2, ... atoms: {np.bincount([len(a) for a in frames]).tolist()}")
    print(f"rank of the compositions: {np.linalg.matrix_rank(np.array(compositions))}")
    print(f"|F|: 50, 90, 99, 100 %: {np.percentile(norms, [50, 90, 99, 100]).round(2)} eV/Å")
    print(f"largest net force {net:.1e} eV/Å; largest |Σq − Q| {excess:.1e} e")


def check_forces(atoms: Any, pool: ProcessPoolExecutor) -> None:
    """Print one structure's labels against finite differences and against its translated self."""
    symbols, charge = atoms.get_chemical_symbols(), int(atoms.info["total_charge"])
    slopes = pool.map(partial(slope, symbols, charge, atoms.positions), range(3 * len(atoms)))
    worst = np.abs(np.array(list(slopes)) + atoms.get_forces().ravel()).max()
    method = kohn_sham(symbols, atoms.positions + 1.0, charge)
    energy = abs(method.e_tot * HARTREE - atoms.get_potential_energy())
    moved = np.abs(dipole(method) * BOHR - charge - atoms.get_dipole_moment()).max()
    print(
        f"{atoms.info['molecule']} {atoms.info['index']}: |F + dE/dR| {worst:.1e} eV/Å; "
        f"moved by 1 Å, |ΔE| {energy:.1e} eV, |Δμ − Q·1 Å| {moved:.1e} e·Å",
        flush=True,
    )


def slope(symbols: list[str], charge: int, positions: Array, coordinate: int) -> float:
    """dE/dR of one coordinate in eV/Å, by the five-point rule."""
    step, total = 4e-3, 0.0  # Å
    for shift, weight in ((-2, 1 / 12), (-1, -2 / 3), (1, 2 / 3), (2, -1 / 12)):
        moved = positions.copy()
        moved.flat[coordinate] += shift * step
        total += weight * kohn_sham(symbols, moved, charge).e_tot
    return total * HARTREE / step


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="finished results")
    parser.add_argument("--output", type=Path, default=HERE / "small-molecules.extxyz")
    parser.add_argument("--check", action="store_true", help="check the labels in --output")
    parser.add_argument("--assemble", action="store_true", help="only write what is finished")
    chosen = parser.parse_args(arguments)
    if chosen.check:
        check(chosen.output, chosen.workers)
        return
    if not chosen.assemble:
        with processes(chosen.workers) as pool:
            label_all(chosen.work, pool, relax_all(chosen.work, pool))
    assemble(chosen.work, chosen.output)


if __name__ == "__main__":
    main()
