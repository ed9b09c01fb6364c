"""What the user sees: text and tables on the terminal, the same in a log file."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from rich.console import Console, RenderableType
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text


class _Lasting(Console):
    """A console whose reader may go away: what is done is done to its end, unseen."""

    def on_broken_pipe(self) -> None:
        """Write nowhere from now on; rich would end the program."""
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, (sys.stderr if self.stderr else sys.stdout).fileno())


class Terminal:
    """Where a command says what it does: standard output, or standard error beside `--json`."""

    def __init__(self, *, stderr: bool = False, quiet: bool = False, lasting: bool = True) -> None:
        """Write to standard output.

        Args:
            stderr: write to standard error instead.
            quiet: write nowhere.
            lasting: whether the command goes on when nobody reads it any more.
        """
        kind = _Lasting if lasting else Console
        self.console = kind(stderr=stderr, quiet=quiet, highlight=False, soft_wrap=True)
        self._logs: list[Console] = []

    def say(self, *lines: RenderableType) -> None:
        """Show lines of text or tables."""
        for console in (self.console, *self._logs):
            console.print(*lines, sep="\n", markup=False)

    def note(self, line: str) -> None:
        """Write a line to the log files alone."""
        for console in self._logs:
            console.print(line, markup=False)

    def warn(self, text: str) -> None:
        """Show something that may be wrong."""
        self.say(Text(f"warning: {text}", style="yellow"))

    @contextlib.contextmanager
    def counting(self, what: str) -> Iterator[Callable[[int], None]]:
        """Show how many of something are done, on a terminal; gives what to call with more."""
        columns = (TextColumn(what), TextColumn("{task.completed:,.0f}"), TimeElapsedColumn())
        shown = self.console.is_terminal
        with Progress(*columns, console=self.console, transient=True, disable=not shown) as bar:
            task = bar.add_task(what, total=None)
            yield lambda more: bar.advance(task, more)

    @contextlib.contextmanager
    def log_to(self, path: Path) -> Iterator[None]:
        """Write everything that is said to a file as well."""
        with path.open("a", encoding="utf-8") as file:
            self._logs.append(Console(file=file, width=120, highlight=False, soft_wrap=True))
            try:
                yield
            finally:
                self._logs.pop()


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table: the first column is text, the others are numbers."""
    result = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    rows = list(rows)
    for number, column in enumerate(columns):
        if number == 0:
            result.add_column(column, overflow="fold")
        else:  # a number is shown whole, or it is another one
            width = max(len(column), *(len(row[number]) for row in rows), 1)
            result.add_column(column, justify="right", no_wrap=True, min_width=width)
    for row in rows:
        result.add_row(*row)
    return result
