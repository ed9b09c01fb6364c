"""`runner reproduce`: prepare and train again what a run was made from, and compare."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runner import sources
from runner.checkpoints import BEST, LAST
from runner.config import Config, LoggerConfig, TrainConfig, load_config
from runner.errors import RunError, SourceError
from runner.experiment import RunDirectory, surroundings
from runner.losses import Loss
from runner.predictor import read_checkpoint
from runner.prepare import default_data_dir, prepare
from runner.runs import read_manifest, read_rows, resume_command, status
from runner.store import SHARD_ROWS, PreparedDataset, scratch
from runner.structures import Structures
from runner.terminal import Terminal, table
from runner.train import require_train, train

HARMLESS = ("train.checkpoints", "train.data.residence", "train.data.workers", "train.logger")
Difference = dict[str, Any]


def reproduce(
    run: Path, data_dir: Path | None, terminal: Terminal, command: Sequence[str]
) -> dict[str, Any]:
    """Prepare and train anew, and compare with what there is; it ends at what differs first.

    Args:
        run: directory of a finished run.
        data_dir: folder of the prepared datasets, if not that of the run.
        terminal: to say on what is done.
        command: that was given.

    Returns:
        What `runner reproduce --json` prints: whether all is `identical`, `differences` (of each
        thing that is compared the first), what was `compared`, and the `surroundings` that differ.
    """
    manifest, config = read_manifest(run), load_config(run / "config.toml")
    settings = require_train(config, run / "config.toml")
    _require_reproducible(run, manifest, settings)
    terminal.say(f"reproduces {run}")
    others = list(_surroundings(run, manifest, terminal))
    result = {"run": str(run), "reproduction": None, "surroundings": others}
    compared: list[str] = []

    def ended(differences: Iterable[Difference | None]) -> dict[str, Any]:
        found = [difference for difference in differences if difference is not None]
        for difference in found:
            terminal.say(f"differs: {_told(difference)}")
        if not found:
            terminal.say(f"identical: {'; '.join(compared)}")
        return result | {"identical": not found, "differences": found, "compared": compared}

    folder = data_dir or _folder(manifest, run / "config.toml")
    with scratch(folder) as aside:
        changed = source_difference(config, manifest, aside)
        compared.append(f"SHA-256 of the sources ({len(manifest['sources'])} files)")
        if changed is not None:
            return ended([changed])
        prepared = prepare(config, aside, terminal)
        dataset = PreparedDataset(Path(prepared["dataset"]))
        changed = dataset_difference(dataset, manifest)
        there = Path(manifest["dataset"]).is_dir()
        compared.append(
            "the prepared dataset"
            if there
            else "fingerprint and self-energies of the dataset, which is no longer there"
        )
        if changed is not None:
            return ended([changed])
        again = _without_loggers(config)
        trained = train(
            again, run / "config.toml", aside, terminal, command, reproduces=run.resolve()
        )
    result["reproduction"] = trained["run"]
    second = Path(trained["run"])
    RunDirectory(second, read_manifest(second)).note(dataset=manifest["dataset"])
    found = list(comparisons(run, second))
    compared += [what for what, _ in found]
    return ended(difference for _, difference in found)


def require_identical(result: Mapping[str, Any]) -> None:
    """Let the command end as one that failed, where there are differences.

    Raises:
        RunError: there are; names the first, and what may be the reason.
    """
    if result["identical"]:
        return
    others = ", ".join(
        f"{one['what']} ({one['then']} then, {one['now']} now)" for one in result["surroundings"]
    )
    raise RunError(
        f"the run is not reproduced: {_told(result['differences'][0])}",
        where=result["run"],
        remedy=f"what else differs may be the reason: {others}"
        if others
        else "versions, hardware and git commit are the same, so look at the numbers themselves",
    )


def _told(difference: Difference) -> str:
    then, now = difference["then"], difference["now"]
    values = f": {then} then, {now} now" if then is not None or now is not None else ""
    return f"{difference['what']}{values}"


def _differs(what: str, then: Any = None, now: Any = None, **where: Any) -> Difference:
    return {"what": what, "then": then, "now": now} | where


# --------------------------------------------------------------------------------------------------
# What can be reproduced
# --------------------------------------------------------------------------------------------------


def _require_reproducible(run: Path, manifest: Mapping[str, Any], config: TrainConfig) -> None:
    """Refuse a run that has not ended, or that no single training is equal to.

    Raises:
        RunError: it is one.
    """
    now = status(run)
    if now != "finished":
        can = any((run / "checkpoints" / name).is_file() for name in (LAST, BEST))
        finish = f"finish it: {resume_command(run)}" if can else "train anew; it has no checkpoint"
        words = {"running": "is still trained", "killed": "was killed", "failed": "has failed"}
        raise RunError(
            f"the run {words.get(now, f'was {now}')}, so there is no end to compare with",
            where=str(run / "manifest.json"),
            remedy="wait for it" if now == "running" else finish,
        )
    if len(manifest.get("compiled", [])) > 1:
        raise RunError(
            "some epochs of the run were compiled and others were not, which differ by rounding: "
            "no training in one go is equal to it",
            where=str(run / "manifest.json"),
            remedy=f"train it anew in one go: runner train {run}",
        )
    loss = Loss(config.loss, config.stage, [source["name"] for source in manifest["sources"]])
    for entry in manifest.get("resumed", []):
        for key, (then, later) in entry["changed"].items():
            if key.startswith(HARMLESS):
                continue
            if key == "train.epochs" and not _matters(
                loss, config, then, later, entry["epochs_done"]
            ):
                continue
            raise RunError(
                f"{key} was changed when the run went on after {entry['epochs_done']} epochs, "
                f"from {then} to {later}: no training in one go is equal to it",
                where=str(run / "manifest.json"),
                remedy=f"train it anew in one go: runner train {run}",
            )


def _matters(loss: Loss, config: TrainConfig, then: int, later: int, done: int) -> bool:
    """Whether epochs that were done would be others if there were more in all, or fewer.

    The rate may depend on how many there are, and so do the last weights of the loss, by which
    validations are measured.
    """
    schedule, parts = config.schedule, 16
    epochs = [number / parts for number in range((done + 1) * parts)]
    rates = any(
        schedule.relative_rate(epoch, then) != schedule.relative_rate(epoch, later)
        for epoch in epochs
    )
    return rates or loss.weights_at(then - 1, math.inf) != loss.weights_at(later - 1, math.inf)


def _folder(manifest: Mapping[str, Any], config_file: Path) -> Path:
    """Where the run's dataset lies, or others do."""
    there = Path(manifest["dataset"]).parent
    return there if there.is_dir() else default_data_dir(config_file)


def _without_loggers(config: Config) -> Config:
    """The config, but not told to W&B or MLflow a second time."""
    assert config.train is not None
    quiet = config.train.model_copy(update={"logger": LoggerConfig()})
    return config.model_copy(update={"train": quiet})


def _surroundings(
    run: Path, manifest: Mapping[str, Any], terminal: Terminal
) -> Iterator[Difference]:
    """Versions, hardware and git commit that are not what they were, said as a table."""
    now = surroundings(run)
    found = []
    for group in ("versions", "hardware"):
        for name in {**manifest[group], **now[group]}:
            then, here = manifest[group].get(name), now[group].get(name)
            if then != here:
                found.append(_differs(name, then, here))
    if manifest["git_commit"] != now["git_commit"]:
        found.append(_differs("git commit", manifest["git_commit"], now["git_commit"]))
    rows = [(one["what"], str(one["then"]), str(one["now"])) for one in found]
    if rows:
        terminal.say("", table("What is not as it was", ("", "then", "now"), rows), "")
    else:
        terminal.say("versions, hardware and git commit are as they were")
    yield from found


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------


def source_difference(
    config: Config, manifest: Mapping[str, Any], folder: Path
) -> Difference | None:
    """The first source file that is not what the run was made from, by its SHA-256."""
    paths = [Path(source["path"]) for source in manifest["sources"]]
    gone = [path for path in paths if not path.exists()]
    try:
        files = sources.locate(config.prepare.source, folder)
    except SourceError:
        if not gone:
            raise
        return _differs(f"the source file {gone[0]} is gone", file=str(gone[0]))
    for source, file in itertools.zip_longest(manifest["sources"], files):
        if file is None or source is None:
            name = source["path"] if file is None else str(file.path)
            word = "is gone" if file is None else "is new"
            return _differs(f"the source file {name} {word}", file=name)
        if file.sha256 != source["sha256"]:
            what = f"the source file {file.path} has changed, SHA-256"
            return _differs(what, source["sha256"], file.sha256, file=str(file.path))
    return None


def dataset_difference(dataset: PreparedDataset, manifest: Mapping[str, Any]) -> Difference | None:
    """What is first not as in the dataset of a run: fingerprint, self-energies, arrays."""
    now = dataset.attributes
    if now["fingerprint"] != manifest["fingerprint"]:
        what = "the fingerprint of the dataset, though the sources are the same: a file of the "
        what += "split, or how the program prepares data"
        return _differs(what, manifest["fingerprint"], now["fingerprint"])
    for element, value in manifest["self_energies"].items():
        if now["self_energies"].get(element) != value:
            what = f"the self-energy of {element}, in eV"
            return _differs(what, value, now["self_energies"].get(element))
    path = Path(manifest["dataset"])
    return _array_difference(PreparedDataset(path), dataset) if path.is_dir() else None


def _array_difference(before: PreparedDataset, now: PreparedDataset) -> Difference | None:
    """The first structure and array in which two datasets differ, to the bit."""
    if len(before) != len(now):
        return _differs("the number of structures", len(before), len(now))
    for start in range(0, len(now), SHARD_ROWS):
        stop = min(start + SHARD_ROWS, len(now))
        for name, then, here in _pairs(before.read_rows(start, stop), now.read_rows(start, stop)):
            where = _first(then, here)
            if where is not None:
                return _differs(f"{name}{where[0]} of the dataset", *where[1:], array=name)
    return None


def _pairs(
    before: Structures, now: Structures
) -> Iterator[tuple[str, np.ndarray | None, np.ndarray | None]]:
    """Arrays of the same name."""
    yield "first_atom", before.first_atom, now.first_atom
    for then, here in ((before.structures, now.structures), (before.atoms, now.atoms)):
        for name in {**then, **here}:
            yield name, then.get(name), here.get(name)


def _first(then: np.ndarray | None, now: np.ndarray | None) -> tuple[str, Any, Any] | None:
    """Where two arrays differ first, to the bit, with both values."""
    if then is None or now is None:
        return "", None if then is None else "there", None if now is None else "there"
    if then.dtype != now.dtype or then.shape != now.shape:
        return "", f"{then.dtype} {then.shape}", f"{now.dtype} {now.shape}"
    if then.tobytes() == now.tobytes():
        return None
    flat = [np.ascontiguousarray(a).reshape(-1) for a in (then, now)]
    bits = [a.view(np.uint8).reshape(len(a), -1) for a in flat]
    index = int((bits[0] != bits[1]).any(axis=1).argmax())
    place = np.unravel_index(index, then.shape) if then.shape else ()
    return (
        f"[{', '.join(str(int(i)) for i in place)}]" if then.shape else "",
        flat[0][index].item(),
        flat[1][index].item(),
    )


# --------------------------------------------------------------------------------------------------
# What came out
# --------------------------------------------------------------------------------------------------


def comparisons(before: Path, now: Path) -> Iterator[tuple[str, Difference | None]]:
    """(what was compared, where it differs first) of all that two runs have left behind."""
    rows = read_rows(before / "metrics.csv")
    yield (
        f"metrics.csv, {len(rows)} rows but for the times",
        metrics_difference(rows, read_rows(now / "metrics.csv")),
    )
    yield "test_metrics.json", _test_difference(before, now)
    for name in (BEST, LAST):
        yield f"the weights in {name}", weights_difference(before, now, name)


def metrics_difference(
    before: Sequence[Mapping[str, str]], now: Sequence[Mapping[str, str]]
) -> Difference | None:
    """The first row and column in which two `metrics.csv` differ, as they are written."""
    for then, here in zip(before, now, strict=False):
        for column in {**then, **here}:
            if not column.startswith("time/") and then.get(column, "") != here.get(column, ""):
                epoch = int(then["epoch"]) if then.get("epoch") else None
                place = "the test" if epoch is None else f"epoch {epoch}"
                what = f"{column} of {place} in metrics.csv"
                return _differs(
                    what, then.get(column), here.get(column), epoch=epoch, column=column
                )
    if len(before) != len(now):
        return _differs("the number of rows of metrics.csv", len(before), len(now))
    return None


def _test_difference(before: Path, now: Path) -> Difference | None:
    name = "test_metrics.json"
    then, here = (
        json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        for file in (before / name, now / name)
    )
    for key in {**then, **here}:
        if then.get(key) != here.get(key):
            return _differs(f"{key} in {name}", then.get(key), here.get(key))
    return None


def weights_difference(before: Path, now: Path, name: str) -> Difference | None:
    """The first weight in which two checkpoints differ, to the bit."""
    then, here = (
        read_checkpoint(run / "checkpoints" / name)["state_dict"] for run in (before, now)
    )
    for key in {**then, **here}:
        pair = [state[key].numpy() if key in state else None for state in (then, here)]
        where = _first(*pair)
        if where is not None:
            return _differs(f"{key}{where[0]} in {name}", *where[1:], weight=key)
    return None
