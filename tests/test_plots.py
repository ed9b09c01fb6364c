"""Pictures: PNG files, also of data that is thin, constant or missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from molecules import random_structures, springs, without

from runner import plots
from runner.self_energies import compositions, formulas
from runner.structures import Structures


def _size(path: Path) -> tuple[int, int]:
    """Width and height, from the header of a PNG."""
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")


@pytest.mark.parametrize(
    "structures",
    [
        springs(n=200),  # more than 40 compositions
        without(springs(), "energy", [0, 5]),
        without(random_structures([2, 3]), "energy", [0, 1]),
        random_structures([1]),
    ],
    ids=["many", "partly unlabelled", "unlabelled", "one atom"],
)
def test_energies_before_and_after(tmp_path: Path, structures: Structures) -> None:
    names = formulas(*compositions(structures.first_atom, structures.atoms["atomic_numbers"]))
    total = structures.structures["energy"] - 1000.0
    figure = plots.self_energies(total, structures.structures["energy"], names)
    plots.save_png(figure, tmp_path / "x.png")
    assert min(_size(tmp_path / "x.png")) > 500


def test_parity_of_many_points_and_of_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pairs = {
        "energy": (rng.normal(size=30_000), rng.normal(size=30_000)),
        "forces": (np.zeros((1, 3)), np.zeros((1, 3))),
    }
    plots.parity(tmp_path / "x.png", pairs, {"energy": "MAE 1 eV"})
    plots.parity(tmp_path / "y.png", {"energy": pairs["energy"]}, {})
    assert _size(tmp_path / "x.png")[0] > _size(tmp_path / "y.png")[0]


def test_learning_curves_with_zeros_and_without_some_curves(tmp_path: Path) -> None:
    curves = {
        "loss": {"train": ([0.0, 1.0, 2.0], [3.0, 2.0, 1.0]), "val": ([0.0, 2.0], [3.0, 1.5])},
        "flat": {"train": ([0.0, 1.0], [0.0, 0.0])},
        "nothing": {},
    }
    plots.learning_curves(tmp_path / "x.png", curves)
    plots.learning_curves(tmp_path / "y.png", {"loss": curves["loss"]})
    assert _size(tmp_path / "x.png")[0] > _size(tmp_path / "y.png")[0]
