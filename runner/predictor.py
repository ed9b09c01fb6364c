"""A trained potential at work: absolute energies and forces from a run or a checkpoint."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from runner.batches import make_batch
from runner.config import TrainConfig, potential_config
from runner.errors import InputError, RunError
from runner.fields import LABELS
from runner.potentials import Potential, build_potential
from runner.self_energies import (
    SelfEnergyFit,
    check_covered,
    compositions,
    sum_of_self_energies,
    values_by_column,
)
from runner.store import PreparedDataset
from runner.structures import Structures

CHECKPOINT_VERSION = 2


def _upgrade_from_1(checkpoint: dict[str, Any]) -> None:
    """Version 2 has heads and a scale by names of their own, and an embedding of its own."""
    renamed = (
        (r"^potential\.scale$", "potential.energy.scale"),
        (r"^potential\.architecture\.(energies|charges)\.", r"potential.architecture.readouts.\1."),
        (r"^(potential\.architecture\.embedding)\.weight$", r"\1.elements.weight"),
        (r"^(potential\.architecture\.embedding\.elements)\.weight$", r"\1.elements.weight"),
    )
    weights = checkpoint["state_dict"]
    tensornet = checkpoint["runner"]["potential"]["name"] == "tensornet"
    for old in list(weights):
        for pattern, new in (*renamed[:2], renamed[3] if tensornet else renamed[2]):
            if re.match(pattern, old):
                weights[re.sub(pattern, new, old)] = weights.pop(old)
    scale = weights["potential.energy.scale"]
    weights["potential.energy.shift"] = torch.zeros_like(scale)
    checkpoint["runner"] |= {"checkpoint_version": 2, "quadrupole": "traced"}


UPGRADES: dict[int, Callable[[dict[str, Any]], None]] = {1: _upgrade_from_1}


def passport(
    config: TrainConfig, quantities: Collection[str], dataset: PreparedDataset
) -> dict[str, Any]:
    """What has to travel with the weights for them to be of use: plain data only.

    Args:
        config: the `[train]` table.
        quantities: that the potential predicts.
        dataset: that it is trained on.
    """
    attributes = dataset.attributes
    levels = attributes["levels"]
    by_level = attributes.get("self_energies_by_level", {levels[0]: attributes["self_energies"]})
    values = values_by_column(by_level, levels)
    fit = SelfEnergyFit(values=values, **attributes["fit"]).of_level(levels[0], levels)
    return {
        "checkpoint_version": CHECKPOINT_VERSION,
        "potential": config.potential.model_dump(mode="json"),
        "quantities": sorted(quantities),
        "self_energies": fit.values,
        "fit": fit.certificate(),
        "statistics": attributes["statistics"],
        "quadrupole": dataset.quadrupole,
        "units": attributes["units"],
        "elements": attributes["elements"],
        "fingerprint": attributes["fingerprint"],
    }


def read_checkpoint(file: Path, device: str = "cpu") -> dict[str, Any]:
    """What a checkpoint holds, once its checksums are known to be right, which torch ignores.

    Raises:
        RunError: it is damaged.
    """
    try:
        with file.open("rb") as stream, zipfile.ZipFile(stream) as archive:
            damaged = archive.testzip()
        if damaged is None:
            content: dict[str, Any] = torch.load(file, map_location=device, weights_only=True)
            return content
        how = f"the checksum of {damaged} is wrong"
    except (OSError, MemoryError):
        raise
    except Exception as error:  # files are damaged in many ways
        how = (str(error).strip() or type(error).__name__).splitlines()[0]
    others = [name for name in ("best.ckpt", "last.ckpt") if (file.parent / name).is_file()]
    (other,) = [name for name in others if name != file.name] or ("",)
    last = f"remove it: --resume then goes on from {other}"
    raise RunError(
        f"the checkpoint is damaged: {how}",
        where=str(file),
        remedy="" if not other else last if file.name == "last.ckpt" else f"take {other} instead",
    )


class Predictor:
    """Predicts absolute energies, forces and whatever else the potential was trained for."""

    def __init__(self, potential: Potential, passport: Mapping[str, Any]) -> None:
        """Use a trained potential.

        Args:
            potential: with its weights.
            passport: of its checkpoint.
        """
        self.potential = potential.eval()
        self.quantities: list[str] = list(passport["quantities"])
        self.fit = SelfEnergyFit(values=passport["self_energies"], **passport["fit"])

    @classmethod
    def load(cls, path: Path, device: str = "cpu") -> Predictor:
        """Load a checkpoint, or the best one of a run directory.

        Raises:
            RunError: there is none, it is damaged, or of another version.
        """
        file = path / "checkpoints" / "best.ckpt" if path.is_dir() else path
        if not file.is_file():
            raise RunError(
                f"there is no checkpoint at {file}",
                allowed="a run directory, such as experiments/quickstart/runs/latest, or a .ckpt "
                "file",
            )
        checkpoint = read_checkpoint(file, device)
        passport = checkpoint.get("runner", {})
        while (version := passport.get("checkpoint_version")) in UPGRADES:
            UPGRADES[version](checkpoint)
        if version != CHECKPOINT_VERSION:
            raise RunError(
                "the checkpoint was not written by this version of runner",
                where=str(file),
                allowed=f"checkpoint versions up to {CHECKPOINT_VERSION}",
            )
        config = potential_config(passport["potential"])
        weights = checkpoint["state_dict"]
        potential = build_potential(
            config,
            passport["quantities"],
            passport["statistics"]["train"],
            passport["elements"],
            passport["quadrupole"],
            weights["potential.energy.scale"].dtype,
        )
        prefix = "potential."
        potential.load_state_dict(
            {
                name.removeprefix(prefix): tensor
                for name, tensor in weights.items()
                if name.startswith(prefix)
            }
        )
        return cls(potential.to(device), passport)

    def predict(self, structures: Structures, where: str = "") -> dict[str, np.ndarray]:
        """Predict all quantities of some structures, as one batch.

        Args:
            structures: positions in Å.
            where: a name for them in errors.

        Returns:
            float64 arrays by name, as `runner.fields` shapes them; `energy` is absolute, eV.

        Raises:
            InputError: there are no atoms, or some of them are nowhere; a total charge or a spin
                multiplicity that the potential needs is not there.
            SelfEnergyError: an element, or a composition, that the training data says nothing
                about.
        """
        where_finite = [
            structures.atoms["positions"],
            structures.structures.get("cell", np.zeros(1)),
        ]
        if not structures.n_atoms or not all(np.isfinite(array).all() for array in where_finite):
            raise InputError(
                "there are no atoms" if not structures.n_atoms else "positions are not finite",
                where=where,
                remedy="look at what moved them: a dynamics that has exploded, for example",
            )
        elements, composition = compositions(
            structures.first_atom, structures.atoms["atomic_numbers"]
        )
        check_covered(self.fit, elements, composition, lambda index: where or f"structure {index}")
        for name in sorted(self.potential.inputs):
            if not np.isfinite(structures.structures.get(name, np.array(np.nan))).all():
                raise InputError(
                    f"the potential needs the {name} of every structure, and one has none",
                    where=where,
                    remedy=f'give it; with the ASE calculator as atoms.info["{name}"]',
                )
        potential = self.potential
        batch = make_batch(structures, potential.cutoff, potential.dtype, potential.near)
        batch = batch.to(potential.device)
        prediction = {
            name: value.detach().cpu().double().numpy()
            for name, value in potential(batch, stress=True).items()
            if name in LABELS
        }
        offsets = sum_of_self_energies(self.fit.values, elements, composition)
        return prediction | {"energy": prediction["energy"] + offsets}
