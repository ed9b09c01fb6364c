"""`runner prepare`: data files → self-energies → offset-corrected float64 arrays in Zarr."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import chemical_symbols
from rich.console import RenderableType

from runner import sources
from runner.config import Config, PrepareConfig
from runner.errors import DatasetError
from runner.fields import FIELDS, LABELS
from runner.filters import blocks_of, dropped_structures, first_of_duplicates
from runner.self_energies import (
    SelfEnergyFit,
    check_covered,
    columns_by_level,
    compositions,
    determine_self_energies,
    distinct_compositions,
    formulas,
    formulas_of_columns,
    isolated_atoms,
    sum_of_self_energies,
    values_by_column,
    values_of_level,
)
from runner.splits import SPLITS, Origin, hash_split_files, split_structures, write_split
from runner.store import (
    SCHEMA_VERSION,
    PreparedDataset,
    dataset_path,
    fingerprint,
    scratch,
    why_not_reused,
    write_dataset,
)
from runner.structures import Structures, ragged_rows
from runner.terminal import Terminal, table

EXAMPLES = 5  # structures that are named of those that were dropped, or are duplicates


def prepare(
    config: Config, data_dir: Path, terminal: Terminal, split_file: Path | None = None
) -> dict[str, Any]:
    """Build the prepared dataset of an experiment, or find it in the cache.

    Args:
        config: the experiment.
        data_dir: folder of the prepared datasets.
        terminal: where it is accounted for.
        split_file: where to write which structure is in which split, if anywhere.

    Returns:
        What `runner prepare --json` prints.
    """
    started = time.perf_counter()
    files = sources.locate(config.prepare.source, data_dir)
    request = Request(config.prepare, files, data_dir)
    reused = request.path.exists()
    if not reused:
        _say_why(request, terminal)
        _build(request, terminal)
    dataset = PreparedDataset(request.path)
    terminal.say(*account(dataset, reused))
    if split_file is not None:
        names = [source["name"] for source in dataset.attributes["sources"]]
        write_split(split_file, names, {name: dataset.origins(name) for name in SPLITS})
        terminal.say(f"split: {split_file}")
    for warning in dataset.attributes["warnings"]:
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
        """SHA-256 of the files of each source, and of those that say the split."""
        of_sources = [
            [file.sha256 for file in self.files if file.section == section]
            for section in range(len(self.config.source))
        ]
        of_split = hash_split_files(self.config.split)
        return [*of_sources, of_split] if of_split else of_sources

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
    request = Request(config.prepare, sources.locate(config.prepare.source, data_dir), data_dir)
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


def _build(request: Request, terminal: Terminal) -> None:
    """Read, filter, split, fit, subtract, write."""
    config = request.config
    with scratch(request.folder) as folder:
        with terminal.counting("structures read") as count:
            structures = sources.read(
                request.files, config.source, _group_key(config), folder, count
            )
        pool = Pool.of(structures, config, request.files)
        dropped = _dropped(pool, config)
        splits = _split(pool, request, dropped)
        fit = _fit(pool, config, splits["train"])
        for name, indices in splits.items():
            check_covered(
                fit, pool.columns, pool.wide[indices], _namer(pool, request, name, indices)
            )
        order = np.concatenate([splits[name] for name in SPLITS])
        offsets = np.full(len(structures), np.nan)
        offsets[order] = sum_of_self_energies(fit.values, pool.columns, pool.wide[order])
        corrected = pool.with_energies(pool.energies - offsets, len(config.levels))
        if config.split.group_by is not None:
            group_names, number = np.unique(_groups(pool, config) or [], return_inverse=True)
            corrected.structures["group"] = number.astype(np.int32)
        distinct, owner, _ = distinct_compositions(pool.wide[order])
        named = formulas_of_columns(pool.columns, distinct)
        names = [named[number] for number in owner.tolist()]
        before, after = pool.energies[order], (pool.energies - offsets)[order]
        duplicates = _duplicates(pool, splits)
        attributes = {
            "schema_version": SCHEMA_VERSION,
            "fingerprint": request.fingerprint,
            "prepare": request.table,
            "files": request.hashes,
            "sources": [file.attributes() for file in request.files],
            "elements": [
                s for s, n in zip(pool.elements, pool.composition[order].sum(0), strict=True) if n
            ],
            "units": {f.name: f.unit for f in FIELDS.values()},
            "splits": _ranges(splits),
            "dropped": {reason: _with_examples(pool, rows) for reason, rows in dropped.items()},
            "unused": len(structures) - len(order) - sum(map(len, dropped.values())),
            "levels": config.levels,
            **_self_energy_attributes(fit, pool, config.levels, splits["train"]),
            "statistics": statistics(corrected, order, n_train=len(splits["train"]))
            | {"coverage_by_source": _coverage_by_section(pool, request, order)},
            "energy_range": energy_range(before, after, pool.wide[order]),
            "duplicates": duplicates,
        }
        if "group" in corrected.structures:
            attributes["groups"] = group_names.tolist()
        attributes["warnings"] = _warnings(pool, request, fit, duplicates)
        write_dataset(
            request.path,
            corrected,
            attributes,
            lambda path: _draw(path, before, after, names),
            order=order,
            pages={"self_energies.html": _certificate(attributes, before, after, names)},
        )


@dataclass(frozen=True)
class Pool:
    """All structures that were read, with what is asked of them again and again.

    Attributes:
        structures: in the order of the sources.
        elements: symbols of all elements.
        composition: (n_structures, n_elements), atoms of each.
        energies: (n_structures,), eV, total; NaN where a structure has none.
        level: (n_structures,), number of each structure's level of theory.
        columns: what has a self-energy: the elements, or the elements at each level.
        wide: (n_structures, n_columns), the composition over `columns`.
    """

    structures: Structures
    elements: list[str]
    composition: np.ndarray
    energies: np.ndarray
    level: np.ndarray
    columns: list[str]
    wide: np.ndarray

    @classmethod
    def of(cls, structures: Structures, config: PrepareConfig, files: Sequence[Any]) -> Pool:
        """What a reading of the sources gave."""
        elements, composition = compositions(
            structures.first_atom, structures.atoms["atomic_numbers"]
        )
        number = {name: index for index, name in enumerate(config.levels)}
        of_file = [number.get(config.source[f.section].level_of_theory or "", 0) for f in files]
        level = np.array(of_file, np.int64)[structures.structures["source"]]
        columns, wide = columns_by_level(elements, composition, level, config.levels)
        energies = structures.structures.get("energy", np.full(len(structures), np.nan))
        return cls(structures, elements, composition, np.asarray(energies), level, columns, wide)

    def with_energies(self, energies: np.ndarray, n_levels: int) -> Structures:
        """The structures with other energies, where they have any."""
        arrays = dict(self.structures.structures)
        if "energy" in arrays:
            arrays["energy"] = energies
        if n_levels > 1:
            arrays["level"] = self.level.astype(np.int16)
        return replace(self.structures, structures=arrays)

    def origin(self, index: int) -> list[int]:
        """[file, structure in it] of one structure."""
        arrays = self.structures.structures
        return [int(arrays["source"][index]), int(arrays["source_index"][index])]


def _group_key(config: PrepareConfig) -> str | None:
    """The key of the files that names groups, if they are to be read from there."""
    by = config.split.group_by
    return None if by in ("formula", "source") else by


def _dropped(pool: Pool, config: PrepareConfig) -> dict[str, np.ndarray]:
    """Structures that filters, or their use as isolated atoms, keep out of the splits."""
    dropped = dropped_structures(pool.structures, config.filter, pool.elements, pool.composition)
    if config.self_energies.method == "isolated_atoms":
        gone = np.concatenate([*dropped.values(), np.zeros(0, np.int64)])
        single = np.setdiff1d(np.flatnonzero(pool.composition.sum(axis=1) == 1), gone)
        if len(single):
            dropped["isolated atoms, used for the self-energies"] = single
    return dropped


def _split(pool: Pool, request: Request, dropped: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Numbers of the structures of each split, none of them dropped."""
    config, arrays = request.config, pool.structures.structures
    kept = np.ones(len(pool.structures), bool)
    for rows in dropped.values():
        kept[rows] = False
    rows = np.flatnonzero(kept)
    if not len(rows):
        raise DatasetError(
            "the filters drop every structure: "
            + "; ".join(f"{len(gone)} with {reason}" for reason, gone in dropped.items()),
            where="prepare.filter",
            remedy="loosen them",
        )
    of_file = [config.source[file.section].split for file in request.files]
    pinned = [of_file[number] for number in arrays["source"][rows]] if any(of_file) else None
    lengths = np.bincount(arrays["source"], minlength=len(request.files))
    origin = Origin(
        np.asarray(arrays["source"][rows], np.int64),
        np.asarray(arrays["source_index"][rows]),
        lengths.tolist(),
    )
    groups = _groups(pool, config)
    chosen = None if groups is None else [groups[row] for row in rows.tolist()]
    splits = split_structures(len(rows), config.split, chosen, pinned, origin)
    return {name: rows[indices] for name, indices in splits.items()}


def _fit(pool: Pool, config: PrepareConfig, train: np.ndarray) -> SelfEnergyFit:
    """The self-energies, from the training split or from isolated atoms."""
    seen = pool.wide[train].any(axis=0)
    atoms = None
    if config.self_energies.method == "isolated_atoms":
        charge = pool.structures.structures.get("total_charge", np.zeros(len(pool.energies)))
        neutral = ~(np.abs(charge) > 1e-6)
        atoms = isolated_atoms(pool.wide[neutral], pool.energies[neutral], pool.columns)
        seen = pool.wide.any(axis=0)
    return determine_self_energies(
        config.self_energies,
        pool.wide[train][:, seen],
        pool.energies[train],
        [name for name, here in zip(pool.columns, seen, strict=True) if here],
        config.levels,
        atoms,
    )


def _self_energy_attributes(
    fit: SelfEnergyFit, pool: Pool, levels: Sequence[str], train: np.ndarray
) -> dict[str, Any]:
    """Self-energies and certificate; with several levels those of the first are the potential's."""
    certificate = fit.certificate()
    outliers = []
    for outlier in certificate["outliers"]:
        source, index = pool.origin(int(train[outlier["index"]]))
        outliers.append({"source": source, "source_index": index, "residual": outlier["residual"]})
    found: dict[str, Any] = {
        "self_energies": values_of_level(fit.values, levels[0], levels),
        "fit": certificate | {"outliers": outliers},
    }
    if len(levels) > 1:
        found["self_energies_by_level"] = {
            level: values_of_level(fit.values, level, levels) for level in levels
        }
    return found


def _groups(pool: Pool, config: PrepareConfig) -> Sequence[str] | None:
    if config.split.group_by == "formula":
        return formulas(pool.elements, pool.composition)
    if config.split.group_by == "source":
        return [str(number) for number in pool.structures.structures["source"]]
    return pool.structures.group


def _ranges(splits: dict[str, np.ndarray]) -> dict[str, list[int]]:
    bounds = np.cumsum([0, *(len(splits[name]) for name in SPLITS)]).tolist()
    return {name: [bounds[i], bounds[i + 1]] for i, name in enumerate(SPLITS)}


def _namer(pool: Pool, request: Request, split: str, indices: np.ndarray) -> Callable[[int], str]:
    """Says of a structure of a split where it came from."""

    def name(number: int) -> str:
        source, index = pool.origin(int(indices[number]))
        path = request.files[source].path
        return f"{path}, structure {index} (counted from 0), in the {split} split"

    return name


def _with_examples(pool: Pool, rows: np.ndarray) -> dict[str, Any]:
    """How many structures, and where the first of them came from."""
    return {"count": len(rows), "examples": [pool.origin(int(row)) for row in rows[:EXAMPLES]]}


def _duplicates(pool: Pool, splits: dict[str, np.ndarray]) -> dict[str, Any]:
    """Structures that are there more than once, and those that are in two splits."""
    order = np.concatenate([splits[name] for name in SPLITS])
    split_of = np.repeat(np.arange(len(SPLITS)), [len(splits[name]) for name in SPLITS])
    first = first_of_duplicates(pool.structures, order, pool.composition)
    again = np.flatnonzero(first != np.arange(len(order)))
    across: dict[str, Any] = {}
    for one, other in itertools.combinations(range(len(SPLITS)), 2):
        held_out = again[(split_of[again] == other) & (split_of[first[again]] == one)]
        if len(held_out):
            across[f"{SPLITS[one]}/{SPLITS[other]}"] = {
                "count": len(held_out),
                "examples": [
                    [pool.origin(int(order[first[row]])), pool.origin(int(order[row]))]
                    for row in held_out[:EXAMPLES]
                ],
            }
    return {"structures": len(again), "across_splits": across}


def _coverage_by_section(pool: Pool, request: Request, order: np.ndarray) -> list[dict[str, int]]:
    """How many of the stored structures of each source have each label."""
    of_file = np.array([file.section for file in request.files])
    section = of_file[pool.structures.structures["source"]][order]
    result = []
    for number in range(len(request.config.source)):
        here = order[section == number]
        has = {
            name: _labelled(pool.structures, name) for name in request.config.source[number].labels
        }
        result.append(
            {"structures": len(here)} | {name: int(rows[here].sum()) for name, rows in has.items()}
        )
    return result


def _warnings(
    pool: Pool, request: Request, fit: SelfEnergyFit, duplicates: dict[str, Any]
) -> list[str]:
    """What a person should look at before trusting the dataset."""
    found = [fit.warning()]
    found += [_of_zeros(pool, request, number) for number in range(len(request.config.source))]
    found.append(_of_spins(pool, request))
    for pair, entry in duplicates["across_splits"].items():
        (source, index), (other_source, other) = entry["examples"][0]
        one, two = pair.split("/")
        names = [request.files[number].path.name for number in (source, other_source)]
        found.append(
            f"structures of the {two} split that are duplicates of structures of the {one} split: "
            f"{entry['count']} (same composition, distances and energy), such as {names[1]} "
            f"structure {other} of {names[0]} structure {index}: errors on that split will look "
            "too small. "
            'Write [prepare.filter] duplicates = "drop", or split by groups.'
        )
    if len(request.config.levels) > 1:
        found.append(
            f"the sources are of {len(request.config.levels)} levels of theory, each with "
            f"self-energies of its own; the potential predicts energies at the first, "
            f"{request.config.levels[0]}."
        )
    return list(filter(None, found))


def _of_zeros(pool: Pool, request: Request, section: int) -> str:
    """Asks about labels of one source that are zero throughout, as programs write what they do not
    compute; of charges of neutral molecules that is what they are."""
    files = [number for number, file in enumerate(request.files) if file.section == section]
    here = np.isin(pool.structures.structures["source"], files)
    zero = []
    for name, label in request.config.source[section].labels.items():
        if label.key is None or name == "total_charge":
            continue
        field, arrays = LABELS[name], pool.structures.structures
        mask = np.repeat(here, np.diff(pool.structures.first_atom)) if field.per == "atom" else here
        values = (pool.structures.atoms if field.per == "atom" else arrays)[name][mask]
        if not np.any(np.nan_to_num(values)):
            zero.append(f'{name} (key "{label.key}")')
    if not zero:
        return ""
    return (
        f"{', '.join(zero)} of {request.files[files[0]].path.name} is zero in every structure. Is "
        "it a label? If it was never computed, take it out of the source: it would be learnt as "
        "zero."
    )


def _of_spins(pool: Pool, request: Request) -> str:
    """Asks about spin multiplicities that cannot be: 2S + 1 is 1, 2, 3, …"""
    spins = pool.structures.structures.get("spin_multiplicity", np.zeros(0))
    strange = np.flatnonzero(np.isfinite(spins) & ((spins < 1) | (spins % 1 != 0)))
    if not len(strange):
        return ""
    values = ", ".join(f"{value:g}" for value in np.unique(spins[np.isfinite(spins)])[:6])
    source, index = pool.origin(int(strange[0]))
    return (
        f"spin_multiplicity has the values {values} (such as {request.files[source].path.name} "
        f"structure {index}), and 2S + 1 is a whole number from 1 up. Does the file hold 2S, or S?"
    )


def _labelled(structures: Structures, name: str) -> np.ndarray:
    """Which structures have a label, all of its components."""
    if LABELS[name].per == "structure":
        values = structures.structures[name]
        known: np.ndarray = np.isfinite(values.reshape(len(structures), -1)).all(axis=1)
        return known
    labelled = np.empty(len(structures), bool)
    for start, stop in blocks_of(np.diff(structures.first_atom)):
        first = structures.first_atom[start:stop]
        rows = structures.atoms[name][first[0] : structures.first_atom[stop]]
        finite = np.isfinite(rows.reshape(len(rows), -1)).all(axis=1)
        labelled[start:stop] = np.logical_and.reduceat(finite, first - first[0])
    return labelled


def statistics(structures: Structures, order: np.ndarray, n_train: int) -> dict[str, Any]:
    """Label coverage of all structures, and scales of the labels in the training split.

    Args:
        structures: with offset-corrected energies.
        order: those that are stored, the training split first.
        n_train: structures of the training split.
    """
    coverage = {
        name: int(_labelled(structures, name)[order].sum())
        for name in LABELS
        if name in (structures.structures | structures.atoms)
    }
    counts, chosen = np.diff(structures.first_atom), order[:n_train]
    train: dict[str, Any] = {"n_structures": n_train, "n_atoms": int(counts[chosen].sum())}
    energies = structures.structures.get("energy", np.full(len(structures), np.nan))
    per_atom = energies[chosen] / counts[chosen]
    per_atom = per_atom[np.isfinite(per_atom)]
    train["energy_per_atom_mean"] = float(per_atom.mean()) if len(per_atom) else None
    train["energy_per_atom_std"] = float(per_atom.std()) if len(per_atom) else None
    train["energy_by_element"] = _energy_by_element(structures, energies, chosen)
    return {"coverage": coverage, "train": train | _forces_rms(structures, chosen)}


def _energy_by_element(
    structures: Structures, energies: np.ndarray, chosen: np.ndarray
) -> dict[str, float] | None:
    """Least squares of energies on compositions, eV by element; None where there are none."""
    elements, composition = compositions(structures.first_atom, structures.atoms["atomic_numbers"])
    chosen = chosen[np.isfinite(energies[chosen])]
    if not len(chosen):
        return None
    distinct, owner, counts = distinct_compositions(composition[chosen])
    means = np.bincount(owner, energies[chosen]) / counts
    present = np.flatnonzero(distinct.any(axis=0))
    root = np.sqrt(counts)[:, None]
    found, *_ = np.linalg.lstsq(distinct[:, present] * root, means * root[:, 0], rcond=None)
    symbols = [elements[column] for column in present.tolist()]
    return dict(zip(symbols, found.tolist(), strict=True))


def _forces_rms(structures: Structures, chosen: np.ndarray) -> dict[str, Any]:
    """Root mean square component of the forces, eV/Å, of all and by element; None of nothing."""
    totals, counts = np.zeros(len(chemical_symbols)), np.zeros(len(chemical_symbols))
    if "forces" in structures.atoms:
        for start, stop in blocks_of(np.diff(structures.first_atom)[chosen]):
            rows = ragged_rows(structures.first_atom, chosen[start:stop])
            forces, numbers = structures.atoms["forces"][rows], structures.atoms["atomic_numbers"]
            whole = np.isfinite(forces).all(axis=1)
            numbers, squares = numbers[rows][whole], np.square(forces[whole]).sum(axis=1)
            totals += np.bincount(numbers, squares, len(totals))
            counts += 3 * np.bincount(numbers, minlength=len(counts))
    there = np.flatnonzero(counts)
    by_element = {chemical_symbols[z]: float(np.sqrt(totals[z] / counts[z])) for z in there}
    return {
        "forces_rms": float(np.sqrt(totals.sum() / counts.sum())) if len(there) else None,
        "forces_rms_by_element": by_element or None,
    }


def energy_range(
    total: np.ndarray, corrected: np.ndarray, composition: np.ndarray
) -> dict[str, Any] | None:
    """Energies before and after the subtraction, eV, and what float32 would make of both.

    Args:
        total: (n_structures,) total energies.
        corrected: (n_structures,) the same, offset-corrected.
        composition: (n_structures, n_elements).

    Returns:
        `before` and `after`: `min`, `max`, `float32_spacing` (at the largest magnitude) and
        `width` (the largest E_max − E_min over structures of one composition, which the
        subtraction must not change). None where there are no energies.
    """
    if not np.isfinite(total).any():
        return None
    owner = distinct_compositions(composition)[1]

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

    return {"before": of(total), "after": of(corrected)}


def _draw(path: Path, before: np.ndarray, after: np.ndarray, names: Sequence[str]) -> None:
    """The energies before and after the subtraction, as a picture."""
    from runner import plots  # late: matplotlib is slow to import, and seldom needed

    plots.save_png(plots.self_energies(before, after, names), path)


def _certificate(
    attributes: dict[str, Any], before: np.ndarray, after: np.ndarray, names: Sequence[str]
) -> str:
    from runner.certificate import self_energies_html  # late: the same

    return self_energies_html(attributes, before, after, names)


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
    for reason, entry in attributes["dropped"].items():
        lines.append(f"dropped {entry['count']}: {reason} ({_examples(attributes, entry)})")
    if attributes["unused"]:
        lines.append(f"{attributes['unused']} structures are in no split")
    lines.append("labels: " + _coverage(attributes["statistics"]["coverage"], total))
    by_source = attributes["statistics"]["coverage_by_source"]
    for number, coverage in enumerate(by_source if len(by_source) > 1 else []):
        files = [s["name"] for s in attributes["sources"] if s["section"] == number]
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        labels = {name: n for name, n in coverage.items() if name != "structures"}
        lines.append(
            f"  {files[0]}{more}, {coverage['structures']} structures: "
            + _coverage(labels, coverage["structures"])
        )
    again = attributes["duplicates"]["structures"]
    if again:
        lines.append(f"{again} structures are duplicates of others")
    return [
        *lines,
        "",
        *_self_energy_account(attributes),
        "",
        f"picture: {dataset.path.with_suffix('.png')}",
        f"certificate: {dataset.path / 'self_energies.html'}",
    ]


def _examples(attributes: dict[str, Any], entry: dict[str, Any]) -> str:
    """`such as water.xyz 17, 23`."""
    names = [source["name"] for source in attributes["sources"]]
    return "such as " + ", ".join(f"{names[s]} structure {i}" for s, i in entry["examples"][:3])


def _coverage(counts: dict[str, int], total: int) -> str:
    return ", ".join(
        f"{name} {n}" + ("" if n == total else f" ({100 * n / max(total, 1):.1f} %)")
        for name, n in counts.items()
    )


def _self_energy_account(attributes: dict[str, Any]) -> list[RenderableType]:
    fit, levels = attributes["fit"], attributes["levels"]
    by_level = attributes.get("self_energies_by_level", {levels[0]: attributes["self_energies"]})
    values = values_by_column(by_level, levels)
    errors, counts = fit["standard_errors"], fit["counts"]

    def error(symbol: str) -> str:
        if symbol not in errors:
            without = {"fit": "given", "isolated_atoms": "isolated atom"}
            return without.get(fit["method"], str(fit["method"]))
        return "undetermined" if errors[symbol] is None else f"± {errors[symbol]:.4f}"

    rows = [
        (symbol, f"{value:.6f}", error(symbol), f"{counts[symbol]}" if symbol in counts else "")
        for symbol, value in values.items()
    ]
    columns = ("element", "self-energy, eV", "standard error", "atoms seen")
    where = ", from the training split" if fit["method"] == "fit" else ""
    lines: list[RenderableType] = [table(f"Self-energies{where}", columns, rows)]
    if fit["method"] == "fit":
        lines += ["", *_fit_account(fit, attributes)]
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


def _fit_account(fit: dict[str, Any], attributes: dict[str, Any]) -> list[str]:
    """What the certificate says, in some lines."""
    condition = fit["condition_number"]
    lines = [
        f"spread of the energy: {fit['rmse_before']:.4f} eV before, {fit['rmse_after']:.4f} eV "
        f"after; {fit['n_compositions']} compositions, rank {fit['rank']} of "
        f"{fit['n_elements']} elements"
        + (f", condition number {condition:.3g}" if condition is not None else "")
    ]
    left_out = fit["leave_one_composition_out"]
    if left_out["rmse"] is not None:
        lines.append(
            f"a composition that the fit has not seen is off by {left_out['rmse']:.4f} eV (rmse of "
            f"leaving out each of {left_out['n_compositions']} in turn)"
        )
    worst = ", ".join(
        f"{w['formula']} {w['mean_residual']:+.3f} eV" for w in fit["worst_compositions"][:3]
    )
    lines.append(f"furthest from their composition's sum: {worst}")
    if fit["n_outliers"]:
        names = [source["name"] for source in attributes["sources"]]
        listed = ", ".join(
            f"{names[o['source']]} structure {o['source_index']} ({o['residual']:+.3f} eV)"
            for o in fit["outliers"][:5]
        )
        lines.append(f"outliers of the Huber fit: {fit['n_outliers']}, the worst {listed}")
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
