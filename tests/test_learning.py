"""Every architecture learns: real data, a minute, against a model that is linear in its parameters.

`RUNNER_SHARED_DATA` names the folder of the data, unless it lies beside the repository.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runner.config import load_config
from runner.neighbors import find_neighbors
from runner.potentials import POTENTIALS
from runner.prepare import prepare
from runner.store import PreparedDataset
from runner.structures import Structures
from runner.terminal import Terminal
from runner.train import train

DATA = Path(os.environ.get("RUNNER_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
CUTOFF, CENTRES = 5.0, 24
FEWER_TIMES = 5  # how often the linear model's error is ours, at least

CONFIG = """
[prepare]
name = "learning"
[[prepare.source]]
{source}
[train]
epochs = {epochs}
compile = false
[train.batch]
structures = {batch}
[train.potential]
name = "{potential}"
cutoff = "5 angstrom"
features = 64
interactions = {interactions}
radial_basis = 20
[train.loss.energy]
weight = 10.0
per_atom = true
[train.loss.forces]
weight = 10.0
[train.optimizer]
lr = 2e-3
[train.schedule]
name = "cosine"
[train.trainer]
accelerator = "cpu"
"""
SOURCES = {
    "ethanol_methanol": """path = "{data}/ethanol_methanol/train_eth_meth.xyz"
energy = {{ key = "energy", unit = "eV" }}
forces = {{ key = "forces", unit = "eV/angstrom" }}""",
    "formaldehyde": """path = "{data}/formaldehyde/{file}"
energy = {{ key = "E", unit = "eV" }}
forces = {{ key = "F", unit = "eV/angstrom" }}""",
}
EPOCHS = {"painn": 30, "schnet": 60, "tensornet": 14}  # about a minute on one or two cores


def linear_forces_error(dataset: PreparedDataset) -> float:
    """MAE of the test forces, eV/Å, of pair functions whose coefficients least squares finds.

    E = Σ_pairs Σ_k c_k(Z, Z') exp(−(r − r_k)²/2w²), fitted to energies and forces of the training
    split, each over its spread.
    """
    splits = {}
    for name in ("train", "test"):
        start, stop = dataset.attributes["splits"][name]
        splits[name] = dataset.read_rows(start, stop)
    kinds = sorted({int(z) for z in splits["train"].atoms["atomic_numbers"]})
    rows = {name: _design(structures, kinds) for name, structures in splits.items()}
    energies = splits["train"].structures["energy"]
    forces = {name: s.atoms["forces"].ravel() for name, s in splits.items()}
    by_energy, by_force = rows["train"]
    weights = 1 / energies.std(), 1 / forces["train"].std()
    design = np.concatenate([by_energy * weights[0], by_force * weights[1]])
    wanted = np.concatenate([energies * weights[0], forces["train"] * weights[1]])
    found, *_ = np.linalg.lstsq(design, wanted, rcond=1e-8)
    return float(np.abs(rows["test"][1] @ found - forces["test"]).mean())


def _design(structures: Structures, kinds: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """What energies (rows: structures) and forces (rows: components) are linear in."""
    positions, numbers = structures.atoms["positions"], structures.atoms["atomic_numbers"]
    lists = find_neighbors(positions, structures.first_atom, CUTOFF)
    center = np.repeat(np.arange(len(positions)), lists.counts)
    owner = np.repeat(np.arange(len(structures)), np.diff(structures.first_atom))
    other = lists.neighbors + structures.first_atom[owner[center]]
    separation = positions[other] - positions[center]
    r = np.linalg.norm(separation, axis=1)
    centres, width = np.linspace(0.7, CUTOFF, CENTRES), (CUTOFF - 0.7) / CENTRES
    values = np.exp(-((r[:, None] - centres) ** 2) / (2 * width**2))
    slopes = -(r[:, None] - centres) / width**2 * values
    a, b = (np.searchsorted(kinds, numbers[index]) for index in (center, other))
    pair = np.maximum(a, b) * len(kinds) + np.minimum(a, b)
    n = len(kinds) ** 2 * CENTRES
    columns = pair[:, None] * CENTRES + np.arange(CENTRES)
    energies = np.zeros((len(structures), n))
    np.add.at(energies, (owner[center][:, None], columns), values)
    forces = np.zeros((len(positions), 3, n))
    towards = (separation / r[:, None])[:, :, None] * slopes[:, None, :]
    for atoms, push in ((center, towards), (other, -towards)):
        rows = (atoms[:, None, None], np.arange(3)[:, None], columns[:, None, :])
        np.add.at(forces, rows, push)
    return energies, forces.reshape(-1, n)


@pytest.mark.slow
@pytest.mark.parametrize("data", SOURCES)
@pytest.mark.parametrize("potential", POTENTIALS)
def test_it_beats_a_linear_model_fivefold(tmp_path: Path, data: str, potential: str) -> None:
    if not (DATA / data).is_dir():
        pytest.skip(f"there is no {DATA / data}")
    result, dataset = _trained(tmp_path, data, potential)
    linear = linear_forces_error(dataset)
    ours = result["test"]["forces_mae"]
    print(f"{potential}, {data}: {1e3 * ours:.1f} meV/Å, linear {1e3 * linear:.1f}")
    assert FEWER_TIMES * ours < linear


EXPERIMENTS = sorted(
    path
    for path in (Path(__file__).parents[1] / "experiments").glob("*/config.toml")
    if "$NNP_DATA" in path.read_text()
)


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda path: path.parent.name)
def test_an_experiment_on_real_data_runs(
    tmp_path: Path, experiment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = ["train.epochs=1", "train.data.train_size=64", "train.potential.features=8"]
    result, dataset = _experiment(tmp_path, experiment, short, monkeypatch)
    assert len(dataset) > 1000
    assert result["test"]["forces_mae"] < 2.0


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda path: path.parent.name)
def test_an_experiment_on_real_data_beats_a_linear_model_tenfold(
    tmp_path: Path, experiment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, dataset = _experiment(tmp_path, experiment, ["train.epochs=20"], monkeypatch)
    linear = linear_forces_error(dataset)
    ours = result["test"]["forces_mae"]
    print(f"{experiment.parent.name}: {1e3 * ours:.1f} meV/Å, linear {1e3 * linear:.1f}")
    assert 2 * FEWER_TIMES * ours < linear


def _experiment(
    folder: Path, experiment: Path, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[Mapping[str, Any], PreparedDataset]:
    """Train one of the experiments with some keys changed, uncompiled."""
    if not DATA.is_dir():
        pytest.skip(f"there is no {DATA}")
    monkeypatch.setenv("NNP_DATA", str(DATA))
    file = folder / "config.toml"
    file.write_text(experiment.read_text())
    config = load_config(file, ["train.compile=false", *settings])
    prepared = prepare(config, folder / "prepared", Terminal())
    result = train(config, file, folder / "prepared", Terminal(), [])
    return result, PreparedDataset(Path(prepared["dataset"]))


def _trained(folder: Path, data: str, potential: str) -> tuple[Mapping[str, Any], PreparedDataset]:
    file = next(iter(sorted(path.name for path in (DATA / data).glob("*.npz"))), "")
    text = CONFIG.format(
        source=SOURCES[data].format(data=DATA, file=file),
        epochs=EPOCHS[potential] * (2 if data == "ethanol_methanol" else 1),
        batch=16,
        potential=potential,
        interactions=2 if potential == "tensornet" else 3,
    )
    (folder / "config.toml").write_text(text)
    config = load_config(folder / "config.toml")
    prepared = prepare(config, folder / "prepared", Terminal())
    result = train(config, folder / "config.toml", folder / "prepared", Terminal(), [])
    return result, PreparedDataset(Path(prepared["dataset"]))
