"""The certificate of the self-energies as a page: self-contained, for a person to read."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np

from runner import plots
from runner.self_energies import SelfEnergyFit, in_words, values_by_column

SHOWN = 50  # rows of a table at most


def self_energies_html(
    attributes: Mapping[str, Any],
    total: np.ndarray,
    corrected: np.ndarray,
    formulas: Sequence[str],
) -> str:
    """The page.

    Args:
        attributes: of the prepared dataset.
        total: (n_structures,) energies before the subtraction, eV, NaN where there is none.
        corrected: (n_structures,) those after it.
        formulas: composition of each structure.
    """
    fit = SelfEnergyFit(values={}, **attributes["fit"])
    levels = attributes.get("levels") or list(attributes.get("self_energies_by_level", [""]))
    by_level = attributes.get("self_energies_by_level", {levels[0]: attributes["self_energies"]})
    values = values_by_column(by_level, levels)
    names = [source["name"] for source in attributes["sources"]]
    page = jinja2.Environment(
        loader=jinja2.PackageLoader("runner", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page.filters |= {"fixed": _fixed, "signed": lambda value: f"{value:+.4f}"}
    return page.get_template("certificate.html").render(
        attributes=attributes,
        fit=fit,
        levels=levels,
        total=sum(stop - start for start, stop in attributes["splits"].values()),
        verdict=_verdict(fit, levels),
        elements=_elements(values, fit),
        undetermined=[in_words(combination) for combination in fit.undetermined],
        determined=[in_words(combination) for combination in fit.determined],
        worst=fit.worst_compositions[:SHOWN],
        outliers=[o | {"name": names[o["source"]]} for o in fit.outliers[:SHOWN]],
        dropped=attributes.get("dropped", {}),
        warnings=[w for w in attributes.get("warnings", []) if w != fit.warning()],
        width_stays=_width_stays(attributes.get("energy_range")),
        settings=_settings(attributes["prepare"].get("self_energies", {})),
        shown=SHOWN,
        names=names,
        figures=_figures(fit, total, corrected, formulas),
    )


def _fixed(value: float | None, digits: int = 6) -> str:
    """A number with so many decimals, or a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def _settings(table: Mapping[str, Any]) -> dict[str, str]:
    """The resolved `[prepare.self_energies]`, as text."""
    return {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in table.items()
    }


def _width_stays(energy_range: Mapping[str, Any] | None) -> bool:
    """Whether the subtraction leaves the width of the compositions as it is."""
    widths = [span["width"] for span in (energy_range or {}).values()]
    known = [width for width in widths if width is not None]
    return bool(np.ptp(known) < 1e-6) if known else True


def _verdict(fit: SelfEnergyFit, levels: Sequence[str]) -> tuple[str, str]:
    """(how good, in words)."""
    if fit.method == "given" or (fit.method == "fit" and not fit.n_elements):
        return "plain", "The self-energies were given in the config; nothing was fitted."
    if fit.method == "isolated_atoms":
        return "plain", "The self-energies are energies of isolated atoms; nothing was fitted."
    if fit.method == "none":
        return "plain", "No self-energies were subtracted."
    of = f" of the {len(levels)} levels of theory" if len(levels) > 1 else ""
    if not fit.undetermined:
        return "good", (
            f"The training data determines all {fit.n_elements} self-energies{of}: the rank is "
            f"{fit.rank} of {fit.n_elements}."
        )
    text = fit.warning()
    return "warn", text[:1].upper() + text[1:]


def _elements(values: Mapping[str, float], fit: SelfEnergyFit) -> list[dict[str, str]]:
    """The rows of the table of self-energies."""

    def error(column: str) -> str:
        if column not in fit.standard_errors:
            return "given"
        found = fit.standard_errors[column]
        return "undetermined" if found is None else f"± {found:.6f}"

    return [
        {
            "name": column,
            "value": f"{value:.6f}",
            "error": error(column),
            "count": str(fit.counts.get(column, "")),
        }
        for column, value in values.items()
    ]


def _figures(
    fit: SelfEnergyFit, total: np.ndarray, corrected: np.ndarray, formulas: Sequence[str]
) -> list[dict[str, str]]:
    """Pictures as data, with what they show."""
    if not np.isfinite(total).any():
        return []
    figures = [
        (
            plots.self_energies(total, corrected, formulas),
            "Histograms of the energy before and after the subtraction, and the energy that is "
            "left by composition",
        )
    ]
    known = {s: e for s, e in fit.standard_errors.items() if e is not None}
    if known:
        figures.append((plots.standard_errors(known), "Standard errors of the self-energies"))
    return [
        {"data": base64.b64encode(plots.svg(figure)).decode(), "shows": shows}
        for figure, shows in figures
    ]
