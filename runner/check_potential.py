"""`runner check-potential`: whether a potential obeys physics, before anybody trains it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from runner.config import potential_of_settings
from runner.conformance import Finding, examine
from runner.errors import RunError
from runner.fields import FROM_CHARGES
from runner.potentials import build_potential
from runner.terminal import Terminal

ENERGIES = {"energy", "forces", "stress"}
WORDS = {True: "passed", False: "FAILED", None: "–"}
# what a dataset would tell: of the order of real data, and other for each element
SPREAD, MEAN = 0.7, -0.1


def check_potential(
    name: str, settings: Sequence[str], elements: Sequence[str], terminal: Terminal
) -> dict[str, Any]:
    """Build a potential with random weights, and examine it.

    Returns:
        What `runner check-potential --json` prints.

    Raises:
        ConfigError: there is no such potential, or it does not take the settings.
        RunError: it fails a check.
    """
    started = time.perf_counter()
    config = potential_of_settings(name, settings)
    torch.manual_seed(0)
    charged = config.charges is not None or config.coulomb is not None
    quantities = ENERGIES | (FROM_CHARGES if charged else set())
    potential = build_potential(config, quantities, statistics_of(elements), elements)
    weights = sum(parameter.numel() for parameter in potential.parameters())
    findings = examine(potential, elements)
    _show(f"{name}, {weights} weights, elements {' '.join(elements)}", findings, terminal)
    failed = [finding for finding in findings if finding.passed is False]
    if failed:
        raise RunError(
            f"{name} fails {len(failed)} of {len(findings)} checks: "
            + "; ".join(f"{finding.check}: {finding.detail}" for finding in failed),
            remedy="energies must be smooth functions of distances and elements alone, within the "
            "cutoff; see experiments/README.md, A potential of your own",
        )
    return {
        "potential": name,
        "weights": weights,
        "checks": [asdict(finding) for finding in findings],
        "seconds": round(time.perf_counter() - started, 3),
    }


def statistics_of(elements: Sequence[str]) -> dict[str, Any]:
    """What a dataset would tell, for potentials that are scaled by it."""
    values = [SPREAD * (1 + index / 10) for index in range(len(elements))]
    return {
        "energy_per_atom_std": SPREAD,
        "energy_per_atom_mean": MEAN,
        "energy_by_element": dict(zip(elements, (MEAN * value for value in values), strict=True)),
        "forces_rms": SPREAD,
        "forces_rms_by_element": dict(zip(elements, values, strict=True)),
    }


def _show(title: str, findings: Sequence[Finding], terminal: Terminal) -> None:
    width = max(len(finding.check) for finding in findings)
    lines = [f"  {WORDS[f.passed]:>6}  {f.check:{width}}  {f.detail}" for f in findings]
    terminal.say(title, *lines)
