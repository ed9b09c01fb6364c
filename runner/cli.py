"""The command line: one short function a verb. torch is imported by the verbs that need it."""

from __future__ import annotations

import contextlib
import errno
import gc
import importlib
import json
import sys
import tempfile
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from runner import __version__
from runner.errors import InputError

if TYPE_CHECKING:
    from runner.config import Config

app = typer.Typer(
    help="Train neural network potentials on quantum-chemistry data, from one TOML file.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

LATEST = "latest"

OF_THE_MACHINE = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room, or ask for a larger quota",
    errno.EROFS: "give a folder that can be written",
    errno.EACCES: "give a folder or file that you may read and write",
    errno.EIO: "the disk or the network may be at fault",
}
"""What a machine refuses, whatever the program does, and the remedy."""

Experiment = Annotated[Path, typer.Argument(help="Directory with a config.toml, or a TOML file.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Lay a value over the config; repeatable."),
]
Run = Annotated[
    Path, typer.Argument(help="Run directory, or an experiment, whose latest run is meant.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
DataDir = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the prepared datasets [default: RUNNER_DATA_DIR, or data/prepared]."
    ),
]


@app.command(short_help="Make the dataset, or find it in the cache.")
def prepare(
    experiment: Experiment,
    settings: Settings = None,
    data_dir: DataDir = None,
    split_file: Annotated[
        Path | None,
        typer.Option(help="Write which structure is in which split, to be used again (JSON)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Build the prepared dataset of an experiment, or find it in the cache."""
    _, config, folder = _open(experiment, settings, data_dir)
    with _importing():
        from runner import prepare as verb
        from runner.terminal import Terminal

    result = verb.prepare(config, folder, Terminal(stderr=as_json), split_file)
    _print_json(result, as_json)


@app.command(short_help="Train on the prepared dataset.")
def train(
    experiment: Experiment,
    settings: Settings = None,
    data_dir: DataDir = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="[RUN]",
            help="Go on exactly where a run stopped: a run directory [default: the latest].",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train on the prepared dataset of an experiment, into a new run directory or an old one."""
    path, config, folder = _open(experiment, settings, data_dir)
    with _importing():
        _import_torchmetrics()
        from runner.terminal import Terminal
        from runner.train import train as verb

    old = path.parent / "runs" / "latest" if resume == LATEST else resume
    run = None if old is None else Path(old)
    result = verb(config, path, folder, Terminal(stderr=as_json), sys.argv, run)
    _print_json(result, as_json and bool(result))


@app.command(short_help="Prepare, then train.")
def run(
    experiment: Experiment,
    settings: Settings = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Prepare, then train."""
    path, config, folder = _open(experiment, settings, data_dir)
    with _importing():
        _import_torchmetrics()
        from runner import prepare as first
        from runner.processes import Place, together
        from runner.terminal import Terminal
        from runner.train import require_train
        from runner.train import train as second

    terminal, place = Terminal(stderr=as_json), Place.of(require_train(config, path).trainer)
    with together(place) as all_of_them:
        prepared = first.prepare(config, folder, terminal) if all_of_them.first else {}
        trained = second(config, path, folder, terminal, command=sys.argv, processes=all_of_them)
    _print_json({"prepare": prepared, "train": trained}, as_json and bool(trained))


@app.command(hidden=True)
def follow() -> None:
    """Train with the process that has started this one."""
    with _importing():
        _import_torchmetrics()
        from runner.processes import Place, together
        from runner.train import follow as verb

    with together(Place.of_follower()) as processes:
        verb(processes)


@app.command(short_help="Show the learning curves of a run, also while it is trained.")
def watch(
    run: Run,
    once: Annotated[
        bool, typer.Option("--once", help="Show what there is, and do not wait for more.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the latest values as one JSON object instead.")
    ] = False,
) -> None:
    """Show the learning curves of a run until it ends; without a terminal, a line an epoch."""
    with _importing():
        from runner import watch as verb
        from runner.terminal import Terminal

    if as_json:
        _print_json(verb.latest(run), wanted=True)
    else:
        verb.watch(run, Terminal(lasting=False), once=once)


@app.command(short_help="Train a run again, and compare.")
def reproduce(run: Run, data_dir: DataDir = None, as_json: Json = False) -> None:
    """Prepare and train again what a run was made from, and say whether it is identical."""
    with _importing():
        from runner import reproduce as verb
        from runner.runs import find_run
        from runner.terminal import Terminal

    result = verb.reproduce(find_run(run), data_dir, Terminal(stderr=as_json), sys.argv)
    _print_json(result, as_json)
    verb.require_identical(result)


@app.command(name="check-potential", short_help="Try whether a potential obeys physics.")
def check_potential(
    name: Annotated[
        str,
        typer.Argument(help="As in train.potential.name: painn, or your own package.module:Class."),
    ],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A key of [train.potential]; repeatable."),
    ] = None,
    element: Annotated[
        list[str] | None, typer.Option(help="Element to try; repeatable [default: H C N O].")
    ] = None,
    as_json: Json = False,
) -> None:
    """Try whether a potential, with random weights, obeys physics and can be trained."""
    with _importing():
        from ase.data import chemical_symbols

        from runner.check_potential import check_potential as verb
        from runner.errors import ConfigError
        from runner.terminal import Terminal

    elements = element or ["H", "C", "N", "O"]
    unknown = [symbol for symbol in elements if symbol not in chemical_symbols[1:]]
    if unknown:
        raise ConfigError(
            f"there is no element {unknown[0]}",
            where="--element",
            allowed="symbols such as H, C, Cl",
        )
    _print_json(verb(name, settings or [], elements, Terminal(stderr=as_json)), as_json)


@app.command(short_help="Print the JSON schema of the config.")
def schema(
    reference: Annotated[
        bool, typer.Option("--reference", help="Print all keys in Markdown.")
    ] = False,
) -> None:
    """Print the JSON schema of an experiment file, for editors."""
    with _importing():
        from runner.config import json_schema
        from runner.reference import reference as keys

    print(keys() if reference else json.dumps(json_schema(), indent=2))


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@contextlib.contextmanager
def _importing() -> Iterator[None]:
    """Look for no garbage among the million objects that imports make, now or ever: none is."""
    known = len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > known:
            gc.freeze()
        gc.enable()


def _import_torchmetrics() -> None:
    """Without scipy.signal, a sixth of what a training takes to start.

    For a metric of speech torchmetrics looks whether `hamming` is in it, and for nothing else.
    """
    name = "scipy.signal"
    if name in sys.modules or "torchmetrics" in sys.modules:
        return
    instead = types.ModuleType(name)
    instead.hamming = None  # type: ignore[attr-defined]
    sys.modules[name] = instead
    try:
        importlib.import_module("torchmetrics")
    finally:
        del sys.modules[name]


def _open(
    experiment: Path, settings: list[str] | None, data_dir: Path | None
) -> tuple[Path, Config, Path]:
    """The config file of an experiment, what it says, and where datasets are kept."""
    with _importing():
        from runner.config import config_path, load_config
        from runner.prepare import default_data_dir

    path = config_path(experiment)
    return path, load_config(path, settings or []), data_dir or default_data_dir(path)


def _spelt_out(arguments: list[str]) -> list[str]:
    """The command line with a value for `--resume` where it has none, which typer would ask for."""
    following = [*arguments[1:], "--"]
    return [
        word
        for argument, after in zip(arguments, following, strict=False)
        for word in (
            [argument, LATEST] if argument == "--resume" and after[:1] == "-" else [argument]
        )
    ]


def _print_json(result: dict[str, Any], wanted: bool) -> None:
    if wanted:
        print(json.dumps(result))


def main() -> None:
    """Run the command line; every way it can end has its exit code."""
    try:
        app(_spelt_out(sys.argv[1:]))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as ended:
        if ended.code == 130:  # what typer makes of Ctrl-C
            print("interrupted", file=sys.stderr)
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in OF_THE_MACHINE:
            print(f"error: {_refused(error)}", file=sys.stderr)
            sys.exit(2)
        with tempfile.NamedTemporaryFile(
            "w", prefix="runner-traceback-", suffix=".txt", delete=False
        ) as file:
            traceback.print_exc(file=file)
        print(
            f"This is a bug in runner, not a mistake of yours: {type(error).__name__}: {error}\n"
            f"The traceback is in {file.name}; please report it.",
            file=sys.stderr,
        )
        sys.exit(1)


def _refused(error: OSError) -> InputError:
    """The error that tells of it."""
    remedy = OF_THE_MACHINE[error.errno or 0]
    if sys.argv[1:2] == ["train"]:
        remedy += "; a run that has a checkpoint goes on from it with --resume"
    return InputError(error.strerror or "", where=str(error.filename or ""), remedy=remedy)
