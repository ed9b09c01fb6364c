"""Classes that a config names: of the user's own, or of installed packages."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any, TypeVar

from runner.errors import ConfigError, did_you_mean

T = TypeVar("T")


def find_class(
    name: str, base: type[T], where: str, *, reference: str = "", allowed: str = ""
) -> type[T]:
    """Import the class that a config names.

    Args:
        name: `"package.module:Class"`, or what stands for it.
        base: class that it has to be derived from.
        where: key of the config.
        reference: `"package.module:Class"` that the name stands for.
        allowed: what else may be written for the name.

    Raises:
        ConfigError: it cannot be found, or is not such a class.
    """

    def fits(value: Any) -> bool:
        return isinstance(value, type) and issubclass(value, base)

    reference = reference or name
    module, _, attribute = reference.partition(":")
    if os.getcwd() not in sys.path:  # noqa: PTH109 - as Python itself has it there
        sys.path.append(os.getcwd())  # noqa: PTH109
    try:
        imported = importlib.import_module(module)
    except Exception as error:  # the code is the user's
        kind_of = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        raise ConfigError(
            f"{name} cannot be imported: {kind_of}{error}",
            where=where,
            remedy="install what it needs into this environment, or run where Python finds "
            f"{module}: the current directory is searched",
        ) from error
    kind = getattr(imported, attribute, None)
    if kind is None:
        names = [n for n, v in vars(imported).items() if fits(v)]
        hint = did_you_mean(attribute, names)
        raise ConfigError(
            "; ".join(filter(None, [f"there is no {attribute} in {module}", hint])),
            where=where,
            allowed=", ".join(f"{module}:{n}" for n in names),
        )
    if not fits(kind):
        raise ConfigError(
            f"{reference} is not a class of {base.__module__.removesuffix('.module')}."
            f"{base.__name__}".replace("torch.nn.modules", "torch.nn"),
            where=where,
            allowed=", ".join(filter(None, ['"package.module:Class"', allowed])),
        )
    found: type[T] = kind
    return found
