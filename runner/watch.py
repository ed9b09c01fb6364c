"""`runner watch`: the learning curves of a run, in the terminal, while it is trained."""

from __future__ import annotations

import math
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plotille
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from runner.fields import LABELS
from runner.runs import find_run, read_manifest, read_rows, resume_command, status
from runner.terminal import Terminal

LOSS = "loss/total_loss"
PERIOD = 1.0  # s between looks at the files
COLOURS = {"train": "cyan", "val": "yellow"}
PANEL = (38, 9)  # the least width and height, in characters
FRAME = (14, 4)  # of it, what is not the plot: tick labels, title, values, axis


def watch(path: Path, terminal: Terminal, *, once: bool = False) -> dict[str, Any]:
    """Show how a training goes, until it ends.

    On a terminal the curves are drawn again with every epoch; elsewhere each epoch is a line.

    Args:
        path: a run directory, or an experiment, whose latest run is meant.
        terminal: where to show it.
        once: show what there is, and do not wait for more.

    Returns:
        The latest values, as `runner watch --json` prints them.
    """
    run = find_run(path)
    show = _draw if terminal.console.is_terminal else _list
    try:
        show(run, terminal, once)
    except KeyboardInterrupt:
        terminal.say("no longer watched; the run goes on")
    return Progress.of(run).summary()


def latest(path: Path) -> dict[str, Any]:
    """The latest values of a run, and nothing shown."""
    return Progress.of(find_run(path)).summary()


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        run: its directory.
        status: running, finished, interrupted, failed or killed.
        epochs: how many it is to have.
        rows: of `metrics.csv`, one an epoch.
        test: errors on the test split, once it is measured.
    """

    run: Path
    status: str
    epochs: int
    rows: Sequence[Mapping[str, float]]
    test: Mapping[str, float]

    @classmethod
    def of(cls, run: Path) -> Progress:
        """What the files of a run say now."""
        now = status(run)  # first: what it has written by then is there
        with (run / "config.toml").open("rb") as file:
            epochs = int(tomllib.load(file)["train"]["epochs"])
        rows = [
            {name: float(value) for name, value in row.items() if value}
            for row in read_rows(run / "metrics.csv")
        ]
        test = rows[-1] if rows and "epoch" not in rows[-1] else {}
        return cls(run, now, epochs, [row for row in rows if "epoch" in row], test)

    @property
    def goes_on(self) -> bool:
        """Whether more is to come."""
        return self.status == "running"

    @property
    def seconds_an_epoch(self) -> float:
        """How long the training of the last epochs took; validation is not in it."""
        times = [row.get("time/data", 0.0) + row.get("time/compute", 0.0) for row in self.rows[-5:]]
        return sum(times) / max(len(times), 1)

    def curve(self, name: str) -> tuple[list[float], list[float]]:
        """Epochs, counted from 1, and the values of a column."""
        points = [(row["epoch"] + 1, row[name]) for row in self.rows if name in row]
        return [epoch for epoch, _ in points], [value for _, value in points]

    def best(self, name: str) -> tuple[float, int] | None:
        """The lowest value of a column, and its epoch, counted from 1."""
        epochs, values = self.curve(name)
        lowest = min(zip(values, epochs, strict=True), default=None)
        return None if lowest is None else (lowest[0], int(lowest[1]))

    def summary(self) -> dict[str, Any]:
        """Plain data: values in eV, Å and e.

        The best epoch is that of the validation loss, and numbered as in `metrics.csv`: from 0.
        """
        best = self.best(f"val/{LOSS}")
        manifest = read_manifest(self.run)
        return {
            "run": str(self.run),
            "status": self.status,
            "started": manifest.get("started"),
            "ended": None if self.goes_on else manifest.get("ended"),
            "epoch": len(self.rows),
            "epochs": self.epochs,
            "seconds_an_epoch": round(self.seconds_an_epoch, 3),
            "best": None if best is None else {"epoch": best[1] - 1, "total_loss": best[0]},
            "latest": _without_times(self.rows[-1]) if self.rows else {},
            "test": {k.removeprefix("test/"): v for k, v in self.test.items() if k != "step"},
        }


def _without_times(row: Mapping[str, float]) -> dict[str, float]:
    return {name: v for name, v in row.items() if not name.startswith(("time/", "epoch", "step"))}


def _news(run: Path, once: bool) -> Iterator[Progress]:
    """A run's progress now, and whenever there is more, until it ends."""
    seen = None
    while True:
        progress = Progress.of(run)
        if seen != (seen := (progress.status, len(progress.rows))):
            yield progress
        if once or not progress.goes_on:
            return
        time.sleep(PERIOD)


# --------------------------------------------------------------------------------------------------
# Lines
# --------------------------------------------------------------------------------------------------


def _list(run: Path, terminal: Terminal, once: bool) -> None:
    """A line an epoch, as it comes, and one of how it ended."""
    told = 0
    for progress in _news(run, once):
        for row in progress.rows[told:]:
            terminal.say(_line(row, progress))
        told = len(progress.rows)
    terminal.say(_ending(progress))


def _line(row: Mapping[str, float], progress: Progress) -> str:
    """An epoch in a line; the two values are those of training and validation."""
    parts = [f"epoch {int(row['epoch']) + 1}/{progress.epochs}"]
    for quantity in quantities(progress):
        values = [row.get(f"{split}/{quantity.key}") for split in COLOURS]
        shown = " / ".join("–" if v is None else f"{quantity.factor * v:.4g}" for v in values)
        parts.append(f"{quantity.name} {shown} {quantity.unit}".strip())
    return "  ".join(parts)


def _ending(progress: Progress) -> str:
    """How far the run is, or how it ended, and what can be done."""
    done = f"after {len(progress.rows)} of {progress.epochs} epochs"
    if progress.goes_on:
        left = (progress.epochs - len(progress.rows)) * progress.seconds_an_epoch
        soon = f", about {_duration(left)} of training left" if progress.rows else ""
        return f"running, {done}{soon}"
    if progress.status == "finished":
        return f"finished {done}"
    words = {"killed": "was killed", "interrupted": "was interrupted", "failed": "failed"}
    can = (progress.run / "checkpoints" / "last.ckpt").is_file()
    more = f"; to go on: {resume_command(progress.run)}" if can else "; it has no checkpoint"
    return f"{words.get(progress.status, progress.status)} {done}{more}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


# --------------------------------------------------------------------------------------------------
# Curves
# --------------------------------------------------------------------------------------------------


def _draw(run: Path, terminal: Terminal, once: bool) -> None:
    """Curves, drawn again in place whenever there is more."""
    progress = Progress.of(run)
    if once or not progress.goes_on:
        terminal.say(Curves(progress))
    else:
        with Live(console=terminal.console, auto_refresh=False) as live:
            for progress in _news(run, once):
                live.update(Curves(progress), refresh=True)
    if not progress.goes_on and progress.status != "finished":
        terminal.say(_ending(progress))  # whole, to be copied


@dataclass(frozen=True)
class Quantity:
    """What a panel shows.

    Attributes:
        key: of the column, without `train/` or `val/`.
        name: for people.
        unit: that it is shown in.
        factor: from the program's unit to it.
    """

    key: str
    name: str
    unit: str
    factor: float


def quantities(progress: Progress) -> list[Quantity]:
    """The loss, and an error of each label: MAE or else RMSE, of energies an atom if there is."""
    names = {name.removeprefix("val/") for row in progress.rows for name in row}
    found = [Quantity(LOSS, "loss", "", 1.0)]
    for label, field in LABELS.items():
        wanted = [f"{label}{per}_{e}" for e in ("mae", "rmse") for per in ("_per_atom", "")]
        key = next((key for key in wanted if key in names), None)
        if key is not None:
            small = field.unit_text.startswith("eV")
            unit = ("m" if small else "") + field.unit_text
            unit += " an atom" if "_per_atom" in key else ""
            name = f"{label} {key.rpartition('_')[2].upper()}"
            found.append(Quantity(key, name, unit, 1000.0 if small else 1.0))
    return found


@dataclass(frozen=True)
class Curves:
    """Panels of learning curves, as many and as large as the terminal has room for."""

    progress: Progress

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        """A line on the run, the panels, and what the colours are."""
        width, height = options.max_width, max(console.height - 4, PANEL[1])
        shown = quantities(self.progress)
        columns = max(1, min(width // PANEL[0], len(shown)))
        shown = shown[: columns * max(1, height // PANEL[1])]
        rows = math.ceil(len(shown) / columns)
        size = (width // columns, height // rows)
        grid = Table.grid(expand=False)
        panels = [_panel(self.progress, quantity, size) for quantity in shown]
        for first in range(0, len(panels), columns):
            grid.add_row(*panels[first : first + columns])
        legend = Text("  ").join(Text(name, colour) for name, colour in COLOURS.items())
        yield Text(str(self.progress.run), "bold", no_wrap=True, overflow="ellipsis")
        yield Text(_ending(self.progress), no_wrap=True, overflow="ellipsis")
        yield grid if self.progress.rows else Text("no epoch is done yet")
        yield legend


def _panel(progress: Progress, quantity: Quantity, size: tuple[int, int]) -> Group:
    """A quantity's name, its values now, and its curves."""
    width, height = size
    head = ", ".join(filter(None, (quantity.name, quantity.unit)))
    values = Text()
    for split, colour in COLOURS.items():
        column = progress.curve(f"{split}/{quantity.key}")[1]
        if column:
            values.append(f"{quantity.factor * column[-1]:.4g}  ", colour)
    best = progress.best(f"val/{quantity.key}")
    if best is not None:
        values.append(f"best {quantity.factor * best[0]:.4g} in epoch {best[1]}")
    picture = _picture(progress, quantity, (width - FRAME[0], height - FRAME[1]))
    lines = [Text(head, "bold"), values, picture]
    for line in lines[:2]:
        line.truncate(width - 1, overflow="ellipsis")
    return Group(*lines)


def _tick(value: float) -> str:
    """A number of ten characters; 1350 rather than 1.35e+03."""
    return f"{value:>10.0f}" if 1e3 <= abs(value) < 1e6 else f"{value:>10.3g}"


def _picture(progress: Progress, quantity: Quantity, size: tuple[int, int]) -> Text:
    """Curves of training and validation; logarithmic, where all values are above zero."""
    curves = {split: progress.curve(f"{split}/{quantity.key}") for split in COLOURS}
    values = [quantity.factor * value for _, column in curves.values() for value in column]
    logarithmic = min(values, default=0.0) > 0
    figure = plotille.Figure()
    figure.width, figure.height = size
    figure.color_mode, figure.origin = "names", False
    figure.set_x_limits(1, max(2, len(progress.rows)))
    figure.x_label = figure.y_label = ""
    figure.x_ticks_fkt = lambda low, _: f"{low:.0f}"
    figure.y_ticks_fkt = lambda low, _: _tick(10**low if logarithmic else low)
    for split, (epochs, column) in curves.items():
        scaled = [quantity.factor * value for value in column]
        shown = [math.log10(value) for value in scaled] if logarithmic else scaled
        if shown:
            figure.plot(epochs, shown, lc=COLOURS[split])
    *drawn, axis, ticks = figure.show().splitlines()[2:]  # without the name of the axis
    lines = [*drawn, axis[: size[0] + FRAME[0] - 1], ticks[: size[0] + FRAME[0] - 1]]
    return Text.from_ansi("\n".join(lines), no_wrap=True, overflow="crop")
