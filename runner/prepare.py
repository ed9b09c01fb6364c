"""`runner prepare`: data files → self-energies → offset-corrected float64 arrays in Zarr."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import RenderableType

from runner import sources
from runner.config import Config, PrepareConfig
from runner.errors import DatasetError
from runner.fields import ATOMIC_NUMBERS, LABELS, POSITIONS
from runner.self_energies import (
    SelfEnergyFit,
    check_covered,
    compositions,
    determine_self_energies,
    formulas,
    sum_of_self_energies,
)
from runner.splits import SPLITS, split_structures
from runner.store import (
    SCHEMA_VERSION,
    PreparedDataset,
    dataset_path,
    fingerprint,
    why_not_reused,
    write_dataset,
)
from runner.structures import Structures
from runner.terminal import Terminal, table


def prepare(config: Config, data_dir: Path, terminal: Terminal) -> dict[str, Any]:
    """Build the prepared dataset of an experiment, or find it in the cache.

    Returns:
        What `runner prepare --json` prints.
    """
    started = time.perf_counter()
    files = sources.locate(config.prepare.source)
    request = Request(config.prepare, files, data_dir)
    reused = request.path.exists()
    if not reused:
        _say_why(request, terminal)
        _build(request)
    dataset = PreparedDataset(request.path)
    terminal.say(*account(dataset, reused))
    warning = SelfEnergyFit(values={}, **dataset.attributes["fit"]).warning()
    if warning:
        terminal.warn(warning)
    return summary(dataset, reused, time.perf_counter() - started)


@dataclass(frozen=True)
class Request:
    """What an experiment asks for, and where it is kept."""

    config: PrepareConfig
    files: Sequence[sources.SourceFile]
    folder: Path

    @property
    def table(self) -> dict[str, Any]:
        """The resolved `[prepare]` table."""
        return self.config.model_dump(mode="json", exclude_none=True)

    @property
    def hashes(self) -> list[list[str]]:
        """SHA-256 of the files of each source."""
        return [
            [file.sha256 for file in self.files if file.section == section]
            for section in range(len(self.config.source))
        ]

    @property
    def fingerprint(self) -> str:
        """Name of the dataset by its content."""
        return fingerprint(self.table, self.hashes)

    @property
    def path(self) -> Path:
        """Where the dataset is, or would be."""
        return dataset_path(self.folder, self.config.name, self.fingerprint)


def find_prepared(config: Config, data_dir: Path, command: str) -> PreparedDataset:
    """The prepared dataset of an experiment.

    Raises:
        DatasetError: it is not there yet; names the command that makes it.
    """
    request = Request(config.prepare, sources.locate(config.prepare.source), data_dir)
    if not request.path.exists():
        raise DatasetError(
            "the dataset of this experiment is not prepared yet",
            where=str(request.path),
            remedy=f"run `{command}` first",
        )
    return PreparedDataset(request.path)


def default_data_dir(config_file: Path) -> Path:
    """`RUNNER_DATA_DIR`, or `data/prepared` at the root of the project that the config is in."""
    if os.environ.get("RUNNER_DATA_DIR"):
        return Path(os.environ["RUNNER_DATA_DIR"]).resolve()
    folder = config_file.resolve().parent
    for root in (folder, *folder.parents):
        if (root / "experiments").is_dir() or (root / "pyproject.toml").is_file():
            return root / "data" / "prepared"
    return folder / "data" / "prepared"


def _build(request: Request) -> None:
    """Read, split, fit, subtract, write."""
    config = request.config
    group_key = None if config.split.group_by in ("formula", "source") else config.split.group_by
    structures = sources.read(request.files, config.source, group_key)
    splits = split_structures(len(structures), config.split, _groups(structures, config))
    fit = _fit(config, structures.take(splits["train"]))
    for name, indices in splits.items():
        part = structures.take(indices)
        check_covered(fit, *_composition(part), _namer(part, request, name))
    chosen = structures.take(np.concatenate([splits[name] for name in SPLITS]))
    corrected = subtract_self_energies(chosen, fit)
    attributes = {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": request.fingerprint,
        "prepare": request.table,
        "files": request.hashes,
        "sources": [file.attributes() for file in request.files],
        "elements": _composition(chosen)[0],
        "units": {f.name: f.unit for f in (ATOMIC_NUMBERS, POSITIONS, *LABELS.values())},
        "splits": _ranges(splits),
        "unused": len(structures) - len(chosen),
        "self_energies": fit.values,
        "fit": fit.certificate(),
        "statistics": statistics(corrected, n_train=len(splits["train"])),
        "energy_range": energy_range(chosen, corrected),
    }
    write_dataset(request.path, corrected, attributes, _picture(chosen, corrected))


def _composition(structures: Structures) -> tuple[list[str], np.ndarray]:
    return compositions(structures.first_atom, structures.atoms["atomic_numbers"])


def _energies(structures: Structures) -> np.ndarray:
    """Energies; all NaN where no source has any."""
    return structures.structures.get("energy", np.full(len(structures), np.nan))


def _fit(config: PrepareConfig, train: Structures) -> SelfEnergyFit:
    elements, composition = _composition(train)
    return determine_self_energies(config.self_energies, composition, _energies(train), elements)


def subtract_self_energies(structures: Structures, fit: SelfEnergyFit) -> Structures:
    """The same structures with offset-corrected energies, in float64."""
    if "energy" not in structures.structures:
        return structures
    offsets = sum_of_self_energies(fit.values, *_composition(structures))
    corrected = structures.structures | {"energy": _energies(structures) - offsets}
    return replace(structures, structures=corrected)


def _picture(total: Structures, corrected: Structures) -> Callable[[Path], None]:
    """Draws the energies before and after the subtraction."""

    def draw(path: Path) -> None:
        from runner import plots  # late: matplotlib is slow to import, and seldom needed

        names = formulas(*_composition(total))
        plots.self_energies(path, _energies(total), corrected, names)

    return draw


def _groups(structures: Structures, config: PrepareConfig) -> Sequence[str] | None:
    if config.split.group_by == "formula":
        return formulas(*_composition(structures))
    if config.split.group_by == "source":
        return [str(number) for number in structures.structures["source"]]
    return structures.group


def _ranges(splits: dict[str, np.ndarray]) -> dict[str, list[int]]:
    bounds = np.cumsum([0, *(len(splits[name]) for name in SPLITS)]).tolist()
    return {name: [bounds[i], bounds[i + 1]] for i, name in enumerate(SPLITS)}


def _namer(structures: Structures, request: Request, split: str) -> Callable[[int], str]:
    """Says of a structure of a split where it came from."""

    def name(number: int) -> str:
        file = request.files[structures.structures["source"][number]].path
        index = structures.structures["source_index"][number]
        return f"{file}, structure {index} (counted from 0), in the {split} split"

    return name


def statistics(structures: Structures, n_train: int) -> dict[str, Any]:
    """Label coverage of all structures, and scales of the labels in the training split.

    Args:
        structures: prepared, the training split first.
        n_train: structures of the training split.
    """
    coverage = {}
    for name, field in LABELS.items():
        if field.per == "structure" and name in structures.structures:
            labelled = np.isfinite(structures.structures[name].reshape(len(structures), -1))
            coverage[name] = int(labelled.all(axis=1).sum())
        elif field.per == "atom" and name in structures.atoms:
            labelled = np.isfinite(structures.atoms[name].reshape(structures.n_atoms, -1))
            per_structure = np.logical_and.reduceat(
                labelled.all(axis=1), structures.first_atom[:-1]
            )
            coverage[name] = int(per_structure.sum())
    n_atoms = int(structures.first_atom[n_train])
    train: dict[str, Any] = {"n_structures": n_train, "n_atoms": n_atoms}
    per_atom = _energies(structures)[:n_train] / np.diff(structures.first_atom)[:n_train]
    per_atom = per_atom[np.isfinite(per_atom)]
    forces = structures.atoms.get("forces", np.zeros((0, 3)))[:n_atoms]
    forces = forces[np.isfinite(forces)]
    train["energy_per_atom_mean"] = float(per_atom.mean()) if len(per_atom) else None
    train["energy_per_atom_std"] = float(per_atom.std()) if len(per_atom) else None
    train["forces_rms"] = float(np.sqrt((forces**2).mean())) if len(forces) else None
    return {"coverage": coverage, "train": train}


def energy_range(total: Structures, corrected: Structures) -> dict[str, Any] | None:
    """Energies before and after the subtraction, eV, and what float32 would make of both.

    Args:
        total: structures with their total energies.
        corrected: the same structures, offset-corrected.

    Returns:
        `before` and `after`: `min`, `max`, `float32_spacing` (at the largest magnitude) and
        `width` (the largest E_max − E_min over structures of one composition, which the
        subtraction must not change). None where there are no energies.
    """
    if not np.isfinite(_energies(total)).any():
        return None
    _, composition = _composition(total)
    owner = np.unique(composition, axis=0, return_inverse=True)[1].ravel()

    def of(energies: np.ndarray) -> dict[str, float]:
        known = np.isfinite(energies)
        lowest = np.full(owner.max() + 1, np.inf)
        highest = np.full(owner.max() + 1, -np.inf)
        np.minimum.at(lowest, owner[known], energies[known])
        np.maximum.at(highest, owner[known], energies[known])
        largest = np.abs(energies[known]).max()
        return {
            "min": float(energies[known].min()),
            "max": float(energies[known].max()),
            "width": float((highest - lowest).max()),
            "float32_spacing": float(np.spacing(np.float32(largest))),
        }

    return {"before": of(_energies(total)), "after": of(_energies(corrected))}


def _say_why(request: Request, terminal: Terminal) -> None:
    """If there is a dataset of this name already, say why it does not serve."""
    differences = why_not_reused(request.folder, request.config.name, request.table, request.hashes)
    if differences:
        terminal.say(
            f"A dataset named {request.config.name} is there, but what is asked for differs in:",
            *(f"  {line}" for line in differences),
        )


def account(dataset: PreparedDataset, reused: bool) -> list[RenderableType]:
    """What a person wants to know of a prepared dataset."""
    attributes = dataset.attributes
    splits = {name: stop - start for name, (start, stop) in attributes["splits"].items()}
    total = sum(splits.values())
    lines: list[RenderableType] = [
        f"{'reused' if reused else 'prepared'} {dataset.path}",
        f"{total} structures: " + ", ".join(f"{name} {n}" for name, n in splits.items()),
    ]
    if attributes["unused"]:
        lines.append(f"{attributes['unused']} structures are in no split")
    coverage = attributes["statistics"]["coverage"]
    lines.append(
        "labels: "
        + ", ".join(
            f"{name} {n}" + ("" if n == total else f" ({100 * n / total:.1f} %)")
            for name, n in coverage.items()
        )
    )
    return [
        *lines,
        "",
        *_self_energy_account(attributes),
        "",
        f"picture: {dataset.path.with_suffix('.png')}",
    ]


def _self_energy_account(attributes: dict[str, Any]) -> list[RenderableType]:
    fit, values = attributes["fit"], attributes["self_energies"]
    errors, counts = fit["standard_errors"], fit["counts"]

    def error(symbol: str) -> str:
        if symbol not in errors:
            return "given" if fit["method"] != "none" else "none"
        return "undetermined" if errors[symbol] is None else f"± {errors[symbol]:.4f}"

    rows = [
        (symbol, f"{value:.6f}", error(symbol), f"{counts.get(symbol, 0)}")
        for symbol, value in values.items()
    ]
    columns = ("element", "self-energy, eV", "standard error", "atoms seen")
    lines: list[RenderableType] = [table("Self-energies, from the training split", columns, rows)]
    if fit["method"] == "fit":
        lines += [
            "",
            f"spread of the energy: {fit['rmse_before']:.4f} eV before, {fit['rmse_after']:.4f} eV "
            f"after; {fit['n_compositions']} compositions, rank {fit['rank']} of "
            f"{fit['n_elements']} elements, condition number {fit['condition_number']:.3g}",
        ]
    if attributes["energy_range"]:
        spans = attributes["energy_range"]
        span_rows = [
            (
                name,
                f"{span['min']:.4f}",
                f"{span['max']:.4f}",
                f"{span['width']:.9f}",
                f"{1000 * span['float32_spacing']:.6f}",
            )
            for name, span in spans.items()
        ]
        span_columns = (
            "energy, eV",
            "lowest",
            "highest",
            "width in a composition",
            "float32 step, meV",
        )
        lines += ["", table("Energies before and after the subtraction", span_columns, span_rows)]
    return lines


def summary(dataset: PreparedDataset, reused: bool, seconds: float) -> dict[str, Any]:
    """What `runner prepare --json` prints."""
    attributes = dataset.attributes
    splits = {name: stop - start for name, (start, stop) in attributes["splits"].items()}
    return {
        "dataset": str(dataset.path),
        "fingerprint": attributes["fingerprint"],
        "reused": reused,
        "structures": sum(splits.values()),
        "atoms": dataset.n_atoms,
        "elements": attributes["elements"],
        "splits": splits,
        "self_energies": attributes["self_energies"],
        "fit": attributes["fit"],
        "seconds": round(seconds, 3),
    }
