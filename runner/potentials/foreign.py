"""Architectures from elsewhere: classes that the config names, or that installed packages offer.

Such a class is a `torch.nn.Module`, and all that it has to do is

- take in its constructor, by name, `cutoff` (Å), and every further key of `[train.potential]` with
  the type that it is annotated with; of `elements` (symbols of those in the data), `heads` (what
  else it has to read out: "charges", "spins") and `inputs` (see
  `runner.config.ArchitectureConfig`) those that it names;
- give in `forward`, for a `runner.batches.Batch`, a dict with `energies`, one an atom, and one of
  every head: smooth, differentiable functions of `batch.positions`.

`runner check-potential` tries whether it also obeys physics.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from ase.data import atomic_numbers
from pydantic import ConfigDict, ValidationError, create_model
from torch import Tensor, nn

from runner.batches import Batch, make_batch
from runner.config import ENTRY_POINTS, ForeignConfig, installed_potentials
from runner.errors import ConfigError, did_you_mean
from runner.foreign import find_class
from runner.structures import Structures

WHERE = "train.potential"
TABLES = ("energy", "charges", "coulomb", "zbl")


def build_foreign(
    config: ForeignConfig, heads: Collection[str], elements: Sequence[str]
) -> nn.Module:
    """An architecture that is named by its class, or by an entry point.

    Raises:
        ConfigError: the class cannot be found, does not take what the config gives, or does not
            give what an architecture has to.
    """
    points = installed_potentials()
    kind: type[nn.Module] = find_class(
        config.name,
        nn.Module,
        f"{WHERE}.name",
        reference=points[config.name].value if config.name in points else "",
        allowed=f"an entry point of the group {ENTRY_POINTS}",
    )
    offered = {
        "cutoff": config.cutoff,
        "elements": list(elements),
        "heads": frozenset(heads),
        "inputs": list(config.inputs),
    }
    given = _arguments(kind, config, offered)
    try:
        architecture = kind(**given)
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"{config.name} cannot be built: {error}", where=WHERE) from error
    _check_output(architecture, config, heads, elements)
    return architecture


def _arguments(
    kind: type[nn.Module], config: ForeignConfig, offered: Mapping[str, Any]
) -> dict[str, Any]:
    """What the constructor is called with."""
    inherited = kind.__init__ is nn.Module.__init__
    parameters = {} if inherited else dict(inspect.signature(kind).parameters)
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {n: p for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    if "cutoff" not in named and not anything:
        raise ConfigError(
            f"the constructor of {config.name} does not take the cutoff",
            where=f"{WHERE}.name",
            remedy="give it a parameter `cutoff`, in Å: pairs further apart are not in the batch",
        )
    for what in ("heads", "inputs"):
        if offered[what] and what not in named:
            raise ConfigError(
                f"{config.name} has no {what}, and {', '.join(sorted(offered[what]))} is asked for",
                where=f"{WHERE}.name",
                remedy=f"give its constructor a parameter `{what}`, or do without: "
                + (
                    "charges are needed by train.loss.charges, total_charge, dipole and quadrupole "
                    "and by train.potential.coulomb, spins by train.loss.spin_multiplicity"
                    if what == "heads"
                    else f"take out {WHERE}.inputs"
                ),
            )
    hints = typing.get_type_hints(kind.__init__)
    fields: dict[str, Any] = {
        n: (hints.get(n, Any), ... if p.default is p.empty else p.default)
        for n, p in named.items()
        if n not in offered
    }
    settings = ConfigDict(
        extra="allow" if anything else "forbid", strict=True, arbitrary_types_allowed=True
    )
    model = create_model(kind.__name__, __config__=settings, **fields)
    try:
        values = model.model_validate(config.hyperparameters)
    except ValidationError as error:
        keys = [n for n in fields if n != "self"]
        lines = [_mistake(dict(one), keys) for one in error.errors()]
        allowed = ", ".join([*keys, "name", "cutoff", "inputs", *TABLES])
        raise ConfigError(
            f"{config.name} does not take what the config gives:\n" + "\n".join(lines),
            allowed=allowed,
        ) from None
    chosen = {n: value for n, value in offered.items() if n in named or (n == "cutoff")}
    return chosen | {n: getattr(values, n) for n in fields} | dict(values.model_extra or {})


def _mistake(details: Mapping[str, Any], keys: Sequence[str]) -> str:
    key = ".".join(str(part) for part in details["loc"])
    if details["type"] == "extra_forbidden":
        text = "; ".join(filter(None, ["unknown key", did_you_mean(key, keys)]))
    elif details["type"] == "missing":
        text = "this key is missing"
    else:
        text = f"found {details['input']!r}; {details['msg'].replace('Input', 'it')}"
    return f"  {WHERE}.{key}\n    {text}"


def trial_batch(elements: Sequence[str], dtype: torch.dtype) -> Batch:
    """Two small molecules of some elements, near each other and with every input."""
    numbers = [atomic_numbers[symbol] for symbol in elements] or [1]
    rng = np.random.default_rng(0)
    structures = Structures(
        np.array([0, 3, 5]),
        {
            "atomic_numbers": np.resize(np.array(numbers, np.uint8), 5),
            "positions": np.array([[0, 0, 0], [1.1, 0, 0], [0, 1.3, 0.2], [0, 0, 0], [0, 0, 1.2]])
            + rng.normal(0, 0.02, (5, 3)),
        },
        {"total_charge": np.array([1.0, 0.0]), "spin_multiplicity": np.array([2.0, 1.0])},
    )
    return make_batch(structures, 1e6, dtype)


def _check_output(
    architecture: nn.Module, config: ForeignConfig, heads: Collection[str], elements: Sequence[str]
) -> None:
    """Compute two molecules, and look at what comes out."""
    batch = trial_batch(elements, torch.get_default_dtype())
    try:
        found = architecture(batch)
    except Exception as error:  # the code is the user's
        raise ConfigError(
            f"{config.name} fails: {type(error).__name__}: {str(error).strip()}",
            where="train.potential.name",
            remedy="forward(self, batch) takes a runner.batches.Batch and gives tensors by name",
        ) from error
    fits = isinstance(found, Mapping) and all(isinstance(v, Tensor) for v in found.values())
    shown = (
        ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in found.items())
        if fits
        else type(found).__name__
    )
    n_atoms = batch.positions.shape[0]
    for name in ("energies", *sorted(heads)):
        if not fits or name not in found or found[name].shape != (n_atoms,):
            raise ConfigError(
                f"{config.name} gives no {name} of the shape (n_atoms,); for {n_atoms} atoms it "
                f"gives {shown}",
                where=f"{WHERE}.name",
                allowed='a dict of tensors with "energies", and one of every head, one an atom',
            )
