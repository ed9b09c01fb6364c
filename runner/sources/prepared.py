"""Another prepared dataset: its self-energies are added back, so that energies are absolute."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from runner.config import LabelConfig, SourceConfig
from runner.errors import DatasetError, SourceError
from runner.fields import LABELS, Field
from runner.self_energies import compositions, sum_of_self_energies
from runner.sources.raw import Raw, as_numbers, refusal
from runner.store import PreparedDataset
from runner.structures import Structures

PART = 1 << 16  # structures read at once: about a shard of atoms
USUAL: dict[str, str] = {}
"""Nothing: a dataset states its units."""


def read(path: Path, config: SourceConfig, group_key: str | None) -> Iterator[Raw]:
    """The structures of a dataset, split by split, in their stored order.

    Args:
        path: its folder.
        config: keys of the labels, which are their names.
        group_key: `split` makes groups of its splits; there are no others.

    Raises:
        SourceError: another group; a key that cannot be the label it is said to be.
        DatasetError: it is damaged, or lacks a self-energy.
    """
    if group_key not in (None, "split"):
        raise SourceError(
            f'a prepared dataset has no key "{group_key}" to group by',
            where=str(path),
            allowed='"split", "formula", "source"',
        )
    dataset = PreparedDataset(path)
    _check_level(dataset, config)
    for split, (start, stop) in dataset.attributes["splits"].items():
        for first in range(start, stop, PART):
            part = dataset.read_rows(first, min(first + PART, stop))
            yield _raw(dataset, split, first - start, part, config, group_key is not None)


def keys(path: Path) -> list[str]:
    """The labels that a dataset has."""
    return [name for name in LABELS if name in PreparedDataset(path).labels]


def units(path: Path) -> dict[str, str]:
    """The units that a dataset states of its arrays."""
    found = PreparedDataset(path).attributes.get("units", {})
    return {str(name): str(unit) for name, unit in found.items() if unit}


def _check_level(dataset: PreparedDataset, config: SourceConfig) -> None:
    """Refuse energies of another level of theory than the source says, or of several."""
    levels = dataset.attributes.get("levels", [""])
    if config.energy is None or levels in ([""], [config.level_of_theory]):
        return
    if len(levels) > 1:
        raise SourceError(
            f"the dataset has energies of several levels of theory, {', '.join(levels)}, which "
            "cannot share self-energies",
            where=str(dataset.path),
            remedy="prepare from the files that it was made from",
        )
    raise SourceError(
        f'the dataset has energies of the level "{levels[0]}", and the source says '
        + (f'"{config.level_of_theory}"' if config.level_of_theory else "none"),
        where=str(dataset.path),
        remedy=f'write level_of_theory = "{levels[0]}" in the source',
    )


def _raw(
    dataset: PreparedDataset,
    split: str,
    first: int,
    part: Structures,
    config: SourceConfig,
    grouped: bool,
) -> Raw:
    """Some structures of a split, from its `first` on, their energies absolute."""
    if "energy" in part.structures:
        part.structures["energy"] += self_energies(dataset, part)

    def where(index: int) -> str:
        return f"{dataset.path}, split {split}, structure {first + index} (counted from 0)"

    labels = {
        name: _label(part, LABELS[name], label, where(0)) for name, label in config.labels.items()
    }
    return Raw(
        counts=np.diff(part.first_atom),
        species=part.atoms["atomic_numbers"],
        positions=part.atoms["positions"],
        labels=labels,
        present={
            name: _present(values, part if LABELS[name].per == "atom" else None)
            for name, values in labels.items()
        },
        where=where,
        cell=part.structures.get("cell"),
        pbc=part.structures.get("pbc"),
        group=[split] * len(part) if grouped else None,
    )


def _label(part: Structures, quantity: Field, label: LabelConfig, where: str) -> np.ndarray:
    """(n_atoms or n_structures, …), NaN where there is none."""
    tables = {"atom": part.atoms, "structure": part.structures}
    inner = label.stored_shape(quantity)
    shape = (part.n_atoms if quantity.per == "atom" else len(part), *inner)
    if label.value is not None:
        return np.full(shape, label.value)
    key = str(label.key)
    if key not in part.atoms and key not in part.structures:
        return np.full(shape, np.nan)
    values = as_numbers(tables[quantity.per].get(key))
    if values is None or values.shape != shape:
        found = part.atoms[key] if key in part.atoms else part.structures[key]
        raise refusal(quantity, key, f"an array of {found.dtype}, shape {found.shape}", where)
    return values


def _present(values: np.ndarray, part: Structures | None) -> np.ndarray:
    """Which structures have a label: NaN in the store means that there is none."""
    known: np.ndarray = ~np.isnan(values.reshape(len(values), -1)).any(axis=1)
    if part is not None:
        known = np.logical_and.reduceat(known, part.first_atom[:-1])
    return known


def self_energies(
    dataset: PreparedDataset, part: Structures
) -> Float64[np.ndarray, " n_structures"]:
    """What was subtracted from the energies of some structures of a dataset, eV.

    Raises:
        DatasetError: an element without a self-energy.
    """
    elements, composition = compositions(part.first_atom, part.atoms["atomic_numbers"])
    values: dict[str, float] = dataset.attributes.get("self_energies", {})
    missing = [symbol for symbol in elements if symbol not in values]
    if missing:
        raise DatasetError(
            f"the prepared dataset has no self-energy for {', '.join(missing)}",
            where=str(dataset.path),
            remedy="delete this folder and run `runner prepare` again",
        )
    return sum_of_self_energies(values, elements, composition)
