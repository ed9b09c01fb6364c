"""Pictures, as PNG files."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from runner.fields import LABELS

BLUE, ORANGE, GREY = "#3b6ea5", "#d9822b", "#8a8a8a"
TITLES = {"energy": "energy without self-energies"}
POINTS = 20_000  # of a scatter plot at most; a random sample of more looks the same


def self_energies(total: np.ndarray, corrected: np.ndarray, formulas: Sequence[str]) -> Figure:
    """Energies before and after the subtraction, and what is left of each composition.

    Args:
        total: total energies, eV.
        corrected: energies of the same structures, offset-corrected, eV.
        formulas: composition of each structure.
    """
    figure = Figure(figsize=(12, 7), layout="constrained")
    top = figure.subplot_mosaic("ab;cc", height_ratios=[1, 1.2])
    _histogram(top["a"], total, "total energy, eV", ORANGE, "before")
    _histogram(top["b"], corrected, "energy without self-energies, eV", BLUE, "after")
    _by_composition(top["c"], corrected, formulas)
    return figure


def standard_errors(errors: Mapping[str, float]) -> Figure:
    """How well each self-energy is determined.

    Args:
        errors: standard error of each element, eV.
    """
    figure = Figure(figsize=(12, 0.9 + 0.32 * len(errors)), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(errors)), list(errors.values()), color=BLUE, height=0.6)
    axes.set_yticks(range(len(errors)), list(errors))
    axes.invert_yaxis()
    axes.set(xlabel="standard error of the self-energy, eV")
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file."""
    figure.savefig(path, dpi=120, format="png")


def svg(figure: Figure) -> bytes:
    """A figure as SVG: the same bytes for the same figure."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "runner"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _histogram(axes: Axes, energies: np.ndarray, label: str, color: str, title: str) -> None:
    known = energies[np.isfinite(energies)]
    axes.hist(known, bins=60, color=color)
    axes.ticklabel_format(axis="x", useOffset=False)
    axes.set(xlabel=label, ylabel="structures", title=f"{title} the subtraction")


def _by_composition(axes: Axes, energies: np.ndarray, formulas: Sequence[str]) -> None:
    """Mean and range of every composition, the most frequent forty."""
    names, owner, counts = np.unique(np.asarray(formulas), return_inverse=True, return_counts=True)
    known = np.isfinite(energies)
    shown = [c for c in np.argsort(-counts, kind="stable")[:40] if known[owner == c].any()]
    groups = [energies[known & (owner == c)] for c in shown]
    shown = [shown[i] for i in np.argsort([group.mean() for group in groups], kind="stable")]
    groups = sorted(groups, key=lambda group: float(group.mean()))
    for x, group in enumerate(groups):
        axes.vlines(x, group.min(), group.max(), color=BLUE, linewidth=3, alpha=0.4)
        axes.plot(x, group.mean(), "o", color=BLUE, markersize=4)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_xticks(range(len(shown)), [str(names[c]) for c in shown], rotation=70, fontsize=8)
    more = f" (the most frequent 40 of {len(names)})" if len(names) > 40 else ""
    axes.set(
        ylabel="energy without self-energies, eV",
        title=f"what the self-energies leave, by composition: mean and range{more}",
    )


def parity(
    path: Path, pairs: Mapping[str, tuple[np.ndarray, np.ndarray]], errors: Mapping[str, str]
) -> None:
    """Predicted against reference values, a panel a quantity.

    Args:
        path: the PNG file.
        pairs: (reference, predicted) components by quantity.
        errors: what is written into each panel.
    """
    figure, panels = _panels(len(pairs))
    for axes, (name, (reference, predicted)) in zip(panels, pairs.items(), strict=True):
        x, y = reference.ravel(), predicted.ravel()
        if len(x) > POINTS:
            chosen = np.random.default_rng(0).choice(len(x), POINTS, replace=False)
            x, y = x[chosen], y[chosen]
        ends = [min(x.min(), y.min()), max(x.max(), y.max())]
        axes.plot(ends, ends, color=GREY, linewidth=0.8)
        axes.plot(x, y, ".", color=BLUE, markersize=3, alpha=0.5)
        axes.text(0.04, 0.96, errors.get(name, ""), transform=axes.transAxes, va="top")
        unit = LABELS[name].unit_text
        axes.set(
            xlabel=f"reference, {unit}", ylabel=f"predicted, {unit}", title=TITLES.get(name, name)
        )
    figure.savefig(path, dpi=120, format="png")


def learning_curves(
    path: Path, curves: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]
) -> None:
    """Curves over epochs on logarithmic axes, a panel a quantity.

    Args:
        path: the PNG file.
        curves: title of a panel → name of a curve → (epochs, values).
    """
    shown = {title: lines for title, lines in curves.items() if lines}
    figure, panels = _panels(len(shown))
    for axes, (title, lines) in zip(panels, shown.items(), strict=True):
        for (name, (epochs, values)), color in zip(
            lines.items(), (BLUE, ORANGE, GREY), strict=False
        ):
            dot = "o" if len(epochs) == 1 else ""
            axes.plot(epochs, values, color=color, label=name, linewidth=1.2, marker=dot)
        if any(value > 0 for _, values in lines.values() for value in values):
            axes.set_yscale("log")
        axes.set(xlabel="epoch", title=title)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120, format="png")


def _panels(number: int) -> tuple[Figure, list[Axes]]:
    """So many panels, three in a row."""
    columns = min(max(number, 1), 3)
    rows = -(-max(number, 1) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.8 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for unused in panels[number:]:
        unused.set_axis_off()
    return figure, panels[:number]
