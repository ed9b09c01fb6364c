"""A trained potential as an ASE calculator."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.stress import full_3x3_to_voigt_6_stress

from runner.fields import FROM_CHARGES
from runner.predictor import Predictor
from runner.structures import Structures

ALWAYS = ("energy", "free_energy", "forces", "stress")


class NNPCalculator(Calculator):  # type: ignore[misc]
    """Energy (absolute, eV), forces (eV/Å), of a periodic structure stress (eV/Å³, ASE's sign).

    If trained for, also dipole (e·Å) and charges (e). A total charge (e) or a spin multiplicity
    that the potential needs is looked for in `atoms.info`, by that name.

    Example:
        >>> atoms.calc = NNPCalculator("experiments/quickstart/runs/latest")
        >>> atoms.get_potential_energy()
    """

    implemented_properties: ClassVar[list[str]] = [*ALWAYS, "dipole", "charges"]

    def __init__(self, run: str | Path, device: str = "cpu", **kwargs: Any) -> None:
        """Load the best checkpoint of a run.

        Args:
            run: a run directory, or a checkpoint.
            device: of torch, such as "cuda".
            kwargs: of `ase.calculators.calculator.Calculator`.

        Raises:
            RunError: there is no such run.
        """
        super().__init__(**kwargs)
        self.predictor = Predictor.load(Path(run), device)
        if not FROM_CHARGES & set(self.predictor.quantities):
            self.implemented_properties = list(ALWAYS)  # type: ignore[misc]

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """What has changed since the last calculation, also of what the potential is told."""
        changes: list[str] = super().check_state(atoms, tol=tol)
        if self.atoms is not None and self._inputs(atoms) != self._inputs(self.atoms):
            changes.append("info")
        return changes

    def _inputs(self, atoms: Atoms) -> dict[str, float]:
        """Total charge and spin multiplicity, where the potential needs them and they are there."""
        needed = self.predictor.potential.inputs
        return {name: float(atoms.info[name]) for name in sorted(needed) if name in atoms.info}

    def _of_structure(self, atoms: Atoms) -> dict[str, np.ndarray]:
        """Arrays with one row: the cell of a periodic structure, and the inputs."""
        arrays = {name: np.array([value]) for name, value in self._inputs(atoms).items()}
        if atoms.pbc.any():
            arrays["cell"] = np.asarray(atoms.cell.array, np.float64)[None]
            arrays["pbc"] = np.asarray(atoms.pbc, bool)[None]
        return arrays

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        """Compute everything for `atoms`; ASE calls this.

        Raises:
            SelfEnergyError: an element that the potential was not trained on.
        """
        super().calculate(atoms, properties, system_changes)
        assert self.atoms is not None  # a copy of what was asked about
        structures = Structures(
            first_atom=np.array([0, len(self.atoms)], np.int64),
            atoms={
                "atomic_numbers": self.atoms.numbers.astype(np.uint8),
                "positions": np.asarray(self.atoms.positions, np.float64),
            },
            structures=self._of_structure(self.atoms),
        )
        prediction = self.predictor.predict(structures, where=str(self.atoms.symbols))
        self.results = {
            "energy": float(prediction["energy"][0]),
            "free_energy": float(prediction["energy"][0]),  # the one that the forces belong to
            "forces": prediction["forces"],
        }
        if "stress" in prediction and np.isfinite(prediction["stress"]).all():
            self.results["stress"] = full_3x3_to_voigt_6_stress(prediction["stress"][0])
        if "charges" in self.implemented_properties:
            self.results |= {"charges": prediction["charges"], "dipole": prediction["dipole"][0]}
