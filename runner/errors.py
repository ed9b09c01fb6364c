"""What can be wrong with the user's input, and how it is said.

RunnerError
└── InputError            the command ends with exit code 2 and this message
    ├── ConfigError       the TOML file, or --set
    ├── UnitError         a unit that is unknown, missing or of the wrong dimension
    ├── SourceError       a data file
    ├── SelfEnergyError   elements or compositions that the fit does not cover
    ├── DatasetError      a prepared dataset that is missing or damaged
    └── RunError          a run directory, or a training that cannot go on
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RunnerError(Exception):
    """Base of every error that this package raises on purpose."""


class InputError(RunnerError):
    """The user's input is wrong: says what, where, what is allowed, and the remedy."""

    def __init__(self, what: str, *, where: str = "", allowed: str = "", remedy: str = "") -> None:
        self.what, self.where, self.allowed, self.remedy = what, where, allowed, remedy
        details = (("where", where), ("allowed", allowed), ("remedy", remedy))
        lines = [f"  {name + ':':9s}{text}" for name, text in details if text]
        super().__init__("\n".join([what, *lines]))


class ConfigError(InputError):
    """One or several mistakes in a config."""


class UnitError(InputError):
    """A unit that is unknown, missing or of the wrong dimension."""


class SourceError(InputError):
    """A data file that cannot be read as the config says."""


class SelfEnergyError(InputError):
    """Elements or compositions for which no self-energy can be given."""


class DatasetError(InputError):
    """A prepared dataset that is missing, damaged or unsuitable."""


class RunError(InputError):
    """A run directory that is unsuitable, or a training that cannot go on."""


def did_you_mean(found: str, allowed: Iterable[str]) -> str:
    """`did you mean "forces"?`, or nothing when no allowed word is near."""
    same = [name for name in allowed if name.lower() == found.lower()]
    near = same or difflib.get_close_matches(found, list(allowed), n=1, cutoff=0.6)
    return f'did you mean "{near[0]}"?' if near else ""
