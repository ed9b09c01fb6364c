"""The experiment file: how it is read, and what is said when it is wrong."""

from __future__ import annotations

import os
import string
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tomli
import tomli_w
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from runner.config.potentials import (
    FOREIGN,
    ArchitectureConfig,
    ForeignConfig,
    installed_potentials,
    potential_config,
)
from runner.config.prepare import PrepareConfig
from runner.config.train import TrainConfig
from runner.config.values import Section, shown
from runner.errors import ConfigError, did_you_mean


class Config(Section):
    """A whole experiment file."""

    prepare: PrepareConfig
    train: TrainConfig | None = None


Location = tuple[str | int, ...]


@dataclass
class Document:
    """A config as tables, and where each of its keys stands."""

    tables: dict[str, Any]
    places: dict[Location, str] = field(default_factory=dict)

    def place(self, location: Location) -> str:
        """`file:line` of a key, or of the nearest table around it that stands somewhere.

        With the `--set` that have changed a table.
        """
        around = (location[:length] for length in range(len(location), -1, -1))
        nearest = next((self.places[one] for one in around if one in self.places), "")
        below = [loc for loc in self.places if len(loc) > len(location) and _is_in(loc, location)]
        settings = [self.places[loc] for loc in below if self.places[loc].startswith("--set ")]
        return " with ".join(filter(None, [nearest, ", ".join(settings)]))


def _is_in(location: Location, table: Location) -> bool:
    return location[: len(table)] == table


def config_path(experiment: Path) -> Path:
    """The config of an experiment, which is named by its directory or by the file itself."""
    path = experiment / "config.toml" if experiment.is_dir() else experiment
    if not path.is_file():
        raise ConfigError(
            f"there is no experiment at {experiment}",
            where=str(path),
            allowed="a directory with a config.toml in it, or a TOML file",
        )
    return path


def load_config(path: Path, settings: Sequence[str] = ()) -> Config:
    """Read and check an experiment file, with `extends` and `--set` applied.

    Args:
        path: the TOML file.
        settings: `KEY=VALUE` strings; a later one wins.

    Raises:
        ConfigError: with every mistake that there is, each with file, line and key.
    """
    document = _read_document(path, ())
    for setting in settings:
        _apply_setting(document, setting)
    _resolve_paths(document.tables, Path.cwd())  # those that came by --set
    try:
        return Config.model_validate(document.tables)
    except ValidationError as error:
        raise ConfigError(_describe(error.errors(), document)) from None


def potential_of_settings(name: str, settings: Sequence[str]) -> ArchitectureConfig:
    """A `[train.potential]` table without a file.

    Args:
        name: of the potential.
        settings: `KEY=VALUE` strings, with keys of the table.

    Raises:
        ConfigError: with every mistake that there is.
    """
    document = Document({"train": {"potential": {"name": name}}})
    for setting in settings:
        _apply_setting(document, f"train.potential.{setting}")
    try:
        return potential_config(document.tables["train"]["potential"])
    except ValidationError as error:
        inside = [{**one, "loc": ("train", "potential", *one["loc"])} for one in error.errors()]
        raise ConfigError(_describe(typing.cast(list[ErrorDetails], inside), document)) from None


def resolved_toml(config: Config) -> str:
    """The whole config with every default written out: a file that runs by itself."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def differences(before: Config, now: Config) -> dict[str, tuple[Any, Any]]:
    """By dotted key, what it was before and what it is now; None where it is not there.

    The name of the dataset does not count, and neither does where its sources lie.
    """
    tables = [config.model_dump(mode="json", exclude_none=True) for config in (before, now)]
    for table in tables:
        table["prepare"].pop("name", None)
        for source in table["prepare"]["source"]:
            source.pop("path", None)
    then, after = tables
    return dict(_differences(then, after, ""))


def _differences(before: Any, now: Any, key: str) -> Iterator[tuple[str, tuple[Any, Any]]]:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in [*before, *(name for name in now if name not in before)]:
            dotted = f"{key}.{name}" if key else name
            yield from _differences(before.get(name), now.get(name), dotted)
    elif before != now:
        yield key, (before, now)


def json_schema() -> dict[str, Any]:
    """The JSON schema of an experiment file."""
    properties = Config.model_json_schema()
    properties["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    properties["properties"]["extends"] = {
        "type": "string",
        "description": "A TOML file that this one is laid over; relative to this one.",
    }
    return properties


def _read_document(path: Path, extended_by: tuple[Path, ...]) -> Document:
    """One file under the files that it extends; its paths made absolute."""
    path = path.resolve()
    if path in extended_by:
        raise ConfigError("`extends` goes round in a circle", where=str(path))
    try:
        text = path.read_bytes()
        tables = tomli.loads(text.decode())
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}", where=_origin(extended_by)
        ) from None
    except (tomli.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"not valid TOML: {error}", where=str(path)) from None
    base = tables.pop("extends", None)
    document = Document(tables, {(): str(path)})
    for location, line in _lines(text):
        for length in range(1, len(location) + 1):  # [a.b] makes a table a as well
            document.places.setdefault(location[:length], f"{path}:{line}")
    _resolve_paths(tables, path.parent)
    if base is None:
        return document
    if not isinstance(base, str):
        raise ConfigError(
            "`extends` is the path of one TOML file", where=document.place(("extends",))
        )
    below = _read_document(path.parent / base, (*extended_by, path))
    kept = {loc: place for loc, place in below.places.items() if not _replaced(loc, tables)}
    return Document(_merged(below.tables, tables), kept | document.places)


def _origin(extended_by: tuple[Path, ...]) -> str:
    return f"extends of {extended_by[-1]}" if extended_by else ""


def _resolve_paths(tables: dict[str, Any], folder: Path) -> None:
    """Paths are relative to the file they stand in; `$NAME` is an environment variable."""

    def here(path: str) -> str:
        file = folder / _with_variables(path, folder)
        return str(file.parent.resolve() / file.name)  # without the "..", whose folders may go

    prepare = tables.get("prepare")
    sources = prepare.get("source") if isinstance(prepare, dict) else None
    for source in sources if isinstance(sources, list) else []:
        if isinstance(source, dict) and isinstance(source.get("path"), str):
            source["path"] = here(source["path"])
        elif isinstance(source, dict) and isinstance(source.get("path"), list):
            source["path"] = [here(p) if isinstance(p, str) else p for p in source["path"]]
    split = prepare.get("split") if isinstance(prepare, dict) else None
    if isinstance(split, dict) and isinstance(split.get("file"), str):
        split["file"] = here(split["file"])
    elif isinstance(split, dict) and isinstance(split.get("file"), dict):
        named = split["file"].items()
        split["file"] = {k: here(v) if isinstance(v, str) else v for k, v in named}


def _with_variables(path: str, folder: Path) -> str:
    """A path with the values of the environment variables that it names.

    Raises:
        ConfigError: one is not set.
    """
    try:
        return string.Template(path).substitute(os.environ)
    except KeyError as error:
        name = error.args[0]
        raise ConfigError(
            f"the path {path} needs the environment variable {name}, which is not set",
            where=f"the config in {folder}",
            remedy=f"export {name}=/where/the/data/is",
        ) from None
    except ValueError:  # a dollar that begins no name
        return path


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`, table by table; lists are replaced whole."""
    result = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(key), dict)
        result[key] = _merged(below[key], value) if both else value
    return result


def _replaced(location: Location, above: Any) -> bool:
    """Whether a key of the file below is inside something that the file above replaces whole."""
    for part in location:
        if not isinstance(above, dict):
            return True
        if part not in above:
            return False
        above = above[part]
    return False


def _apply_setting(document: Document, setting: str) -> None:
    """Lay one `KEY=VALUE` over the document; VALUE is TOML, or else a plain string."""
    dotted, equals, text = setting.partition("=")
    keys = [key.strip() for key in dotted.split(".")]
    if not equals or not all(keys):
        raise ConfigError(
            f'--set "{setting}" is not a setting',
            allowed="KEY=VALUE with a dotted key, such as train.optimizer.lr=1e-4",
        )
    try:
        value = tomli.loads(f"value = {text}")["value"]
    except tomli.TOMLDecodeError:
        value = text.strip()
    table: Any = document.tables
    location: Location = ()
    for key in keys[:-1]:
        table, location = _step(table, key, location, setting)
    last: str | int = int(keys[-1]) if isinstance(table, list) and keys[-1].isdigit() else keys[-1]
    if not isinstance(table, dict) and not (isinstance(last, int) and last < len(table)):
        raise ConfigError(f'--set "{setting}": {".".join(map(str, location))} is not a table')
    table[last] = value
    location = (*location, last)
    for inside in [one for one in document.places if _is_in(one, location)]:
        del document.places[inside]
    document.places[location] = f"--set {setting}"


def _step(table: Any, key: str, location: Location, setting: str) -> tuple[Any, Location]:
    """One table further down, made where it is not there yet."""
    if isinstance(table, list) and key.isdigit() and int(key) < len(table):
        return table[int(key)], (*location, int(key))
    if isinstance(table, dict):
        below = table.setdefault(key, {})
        if isinstance(below, dict | list):
            return below, (*location, key)
    raise ConfigError(
        f'--set "{setting}": there is no table {".".join(map(str, (*location, key)))}'
    )


def _lines(text: bytes) -> Iterator[tuple[Location, int]]:
    """Where each key and table of a TOML file stands: (location, line)."""
    import tree_sitter
    import tree_sitter_toml

    parser = tree_sitter.Parser(tree_sitter.Language(tree_sitter_toml.language()))
    seen: dict[Location, int] = {}  # how often a [[table]] has come, so far

    def key_of(node: tree_sitter.Node) -> Location:
        if node.type == "dotted_key":
            return tuple(part for child in node.named_children for part in key_of(child))
        return ((node.text or b"").decode().strip("\"'"),)

    def indexed(location: Location) -> Location:
        """A location with the number of the latest [[table]] put in, wherever it is in one."""
        result: Location = ()
        for part in location:
            result = (*result, part)
            if result in seen:
                result = (*result, seen[result])
        return result

    def walk(node: tree_sitter.Node, location: Location) -> Iterator[tuple[Location, int]]:
        elements = 0
        for child in node.named_children:
            if child.type in ("table", "table_array_element"):
                key = key_of(child.named_children[0])
                here = (*indexed(key[:-1]), key[-1])
                if child.type == "table_array_element":
                    seen[here] = seen.get(here, -1) + 1
                    here = (*here, seen[here])
                yield here, child.start_point.row + 1
                yield from walk(child, here)
            elif child.type == "pair":
                here = (*location, *key_of(child.named_children[0]))
                yield here, child.start_point.row + 1
                yield from walk_value(child.named_children[-1], here)
            elif node.type == "array" and child.type != "comment":
                yield (*location, elements), child.start_point.row + 1
                yield from walk_value(child, (*location, elements))
                elements += 1

    def walk_value(node: tree_sitter.Node, location: Location) -> Iterator[tuple[Location, int]]:
        if node.type in ("inline_table", "array"):
            yield from walk(node, location)

    return walk(parser.parse(text).root_node, ())


# --------------------------------------------------------------------------------------------------
# What is wrong
# --------------------------------------------------------------------------------------------------


def _describe(errors: Iterable[ErrorDetails], document: Document) -> str:
    """Every mistake of a config, in the order of the file."""
    found = [one for details in errors for one in _spelt_out(details, document.tables)]
    mistakes = [_describe_one(details, document) for details in found]
    head = (
        "the config has a mistake"
        if len(mistakes) == 1
        else f"{len(mistakes)} mistakes in the config"
    )
    return "\n".join([head + ":", *mistakes])


def _spelt_out(details: ErrorDetails, tables: dict[str, Any]) -> Iterator[ErrorDetails]:
    """One error as it is; but of a table whose `name` tells its keys and is wrong, all of them.

    pydantic stops at such a name. What else is wrong with the table is wrong by each of the names
    that may be meant: those similar to the one found, or else all.
    """
    if details["type"] not in ("union_tag_invalid", "union_tag_not_found"):
        yield details
        return
    loc, table = details["loc"], details["input"]
    if not isinstance(table, Mapping):
        yield ErrorDetails(type="dict_type", loc=loc, msg="", input=table)
        return
    location, section = _locate(loc, tables)
    variants = _variants(_annotation_below(section, location[-1]))
    others = {
        "potential": [*installed_potentials(), "package.module:Class"],
        "optimizer": ["torch.optim:Class", "package.module:Class"],
    }.get(str(location[-1]), [])
    expected = " or ".join(f"'{name}'" for name in [*variants, *others])
    kind = "literal_error" if "name" in table else "missing"
    input_, context = table.get("name", table), {"expected": expected}
    yield ErrorDetails(type=kind, loc=(*loc, "name"), msg="", input=input_, ctx=context)
    similar = [name for name in variants if did_you_mean(str(input_), [name])]
    by_name = [_errors_of(variants[name], name, details) for name in similar or variants]
    first, *more = by_name or [{}]
    yield from (e for key, e in first.items() if all(key in errors for errors in more))


def _errors_of(
    variant: type[BaseModel], name: str, details: ErrorDetails
) -> dict[tuple[str | int, ...], ErrorDetails]:
    """What is wrong in a table if its `name` is meant to be this one, by key and kind."""
    try:
        variant.model_validate(details["input"] | {"name": name})
    except ValidationError as error:
        errors = {(*one["loc"], one["type"]): one for one in error.errors()}
        for one in errors.values():
            one["loc"] = (*details["loc"], name, *one["loc"])
        return errors
    return {}


def _describe_one(details: ErrorDetails, document: Document) -> str:
    location, section = _locate(details["loc"], document.tables)
    problem, allowed = _explain(details, section)
    dotted = ".".join(str(part) for part in location) or "(top level)"
    place = document.place(location)
    lines = [f"  {place + '  ' if place else ''}{dotted}", f"    {problem}"]
    return "\n".join([*lines, *([f"    allowed: {allowed}"] if allowed else [])])


def _locate(
    loc: tuple[str | int, ...], tables: dict[str, Any]
) -> tuple[Location, type[BaseModel] | None]:
    """The key that pydantic means, without its own tags, and the section that the key is in."""
    location: Location = ()
    section: type[BaseModel] | None = Config
    value: Any = tables
    annotation: Any = Config
    for number, part in enumerate(loc):
        variants = _variants(annotation)
        if variants and part == FOREIGN:
            annotation = ForeignConfig
            continue
        if isinstance(part, str) and part in variants:
            annotation = variants[part]
            continue
        inside = (isinstance(value, dict) and part in value) or (
            isinstance(value, list) and isinstance(part, int) and part < len(value)
        )
        if not inside and number < len(loc) - 1:
            continue
        if not inside and not isinstance(value, dict):
            continue
        section = _section_of(annotation)
        location = (*location, part)
        value = value[part] if inside else None
        annotation = _annotation_below(annotation, part)
    return location, section


def _annotation_below(annotation: Any, part: str | int) -> Any:
    section = _section_of(annotation)
    if section is not None and not isinstance(part, int):
        found = section.model_fields.get(part)
        return found.annotation if found else None
    return annotation if isinstance(part, int) else None


def _variants(annotation: Any) -> dict[str, type[BaseModel]]:
    """The sections that a table may be, by the `name` that it has to have for each."""
    sections, left = [], list(typing.get_args(annotation))
    while left:
        argument = left.pop(0)
        if typing.get_origin(argument) is Annotated:
            argument = typing.get_args(argument)[0]
        left = [*typing.get_args(argument), *left]
        if isinstance(argument, type) and issubclass(argument, Section):
            sections.append(argument)
    if len(sections) < 2 or not all("name" in section.model_fields for section in sections):
        return {}
    return {
        name: section
        for section in sections
        for name in typing.get_args(section.model_fields["name"].annotation)
    }


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section inside an annotation such as `list[Section]` or `Section | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if isinstance(annotation, types.GenericAlias | types.UnionType) or typing.get_args(annotation):
        for argument in typing.get_args(annotation):
            found = _section_of(argument)
            if found is not None:
                return found
    return None


def _explain(details: ErrorDetails, section: type[BaseModel] | None) -> tuple[str, str]:
    """(what is wrong, what is allowed) of one mistake."""
    kind, found = details["type"], details["input"]
    context = details.get("ctx", {})
    keys = sorted(section.model_fields) if section is not None else []
    if kind == "extra_forbidden":
        hint = did_you_mean(str(details["loc"][-1]), keys)
        return "; ".join(filter(None, ["unknown key", hint])), ", ".join(keys)
    if kind == "missing":
        return "this key is missing", str(context.get("expected", ""))
    if kind == "literal_error":
        expected = str(context.get("expected", ""))
        words = [word.strip("' ") for word in expected.replace(" or ", ",").split(",")]
        hint = did_you_mean(str(found), words)
        return "; ".join(filter(None, [f"found {shown(found)}", hint])), expected
    if kind == "runner":
        return str(context["message"]), ""
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        return f"found {shown(found)}; it should be of type table", ""
    message = details["msg"].replace("Input should be a valid", "it should be of type")
    message = message.replace("Input", "it")
    return f"found {shown(found)}; {message}", ""
