"""Kinds of values in a config, and the class that every table of it is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any

from ase.data import chemical_symbols
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema
from pydantic_core import PydanticCustomError

from runner.errors import UnitError, did_you_mean
from runner.units import parse_quantity


def reject(message: str) -> PydanticCustomError:
    """An error of ours that pydantic collects with all the others."""
    return PydanticCustomError("runner", "{message}", {"message": message})


def quantity_in(unit: str) -> Any:
    """The type of a number that is written with its unit, and kept in `unit`."""

    def parse(value: object) -> object:
        if not isinstance(value, str):
            raise reject(f'{value!r} has no unit; write a string such as "{value} {unit}"')
        try:
            quantity = parse_quantity(value, unit)
        except UnitError as error:
            raise reject("; ".join(filter(None, (error.what, error.allowed)))) from None
        if not math.isfinite(quantity):
            raise reject(f"found {shown(value)}; it should be finite")
        return quantity

    return Annotated[
        float,
        BeforeValidator(parse),
        PlainSerializer(lambda value: f"{value!r} {unit}"),
        WithJsonSchema({"type": "string", "examples": [f"5 {unit}"]}),
    ]


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


def _share(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise reject(f"found {shown(value)}; it is a fraction such as 0.8, or a count such as 1000")
    return value


Share = Annotated[int | float, BeforeValidator(_share)]


class Section(BaseModel):
    """A table of the config: unknown keys and wrong types are mistakes; nothing can be changed."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )


def shown(value: object) -> str:
    """A value as the user wrote it, with its type."""
    names = {str: "string", bool: "boolean", int: "integer", float: "float", list: "array"}
    kind = names.get(type(value), "table" if isinstance(value, dict) else type(value).__name__)
    text = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "…"
    return f"{text} ({kind})"


def require_elements(symbols: Iterable[str]) -> None:
    for symbol in symbols:
        if symbol not in chemical_symbols[1:]:
            hint = did_you_mean(symbol, chemical_symbols[1:])
            raise reject("; ".join(filter(None, [f'"{symbol}" is not an element', hint])))
