"""Everything that is printed: tables on stdout, notes, bars and errors on stderr. Nobody else uses Rich."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

PIPE_WIDTH = 200  # a file or a pipe has no edge: no column is left out, no line is broken
GAP = 2  # columns between two columns of a table: padding, and the separator of the box
ALWAYS = 100  # of `Column.keep`: never left out


def stdout() -> Console:
    """Return a console for results."""
    return _console(sys.stdout)


def stderr() -> Console:
    """Return a console for notes, bars and errors: that of the bar while one moves, so that lines go above it."""
    return _live[-1] if _live else _console(sys.stderr)


def note(text: str, *, quiet: bool = False) -> None:
    """Print one line about what is going on, unless `quiet`."""
    if not quiet:
        stderr().print(Text(text, style="dim"), soft_wrap=True)


def warn(text: str) -> None:
    """Print one line that the user should see even with ``--quiet``."""
    stderr().print(Text.assemble(("warning: ", "yellow"), text), soft_wrap=True)


def fail(what: str, todo: str) -> None:
    """Print an error: one line what is wrong, one line what to do."""
    console = stderr()
    console.print(Text.assemble(("error: ", "bold red"), _one_line(what)), soft_wrap=True)
    console.print(Text(_one_line(todo)), soft_wrap=True)


def show_json(value: Any) -> None:
    """Print a value as JSON; numbers that JSON does not know become null."""
    sys.stdout.write(json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n")


@dataclass
class Column:
    """One column of a table.

    Attributes
    ----------
    header : str
        May have two lines.
    cells : list of str
        One for each row.
    keep : int
        Where the terminal is too narrow, the columns with the lowest number go first; `ALWAYS` stays.
    numeric : bool
        Whether to align to the right.
    dim : set of int
        Rows whose cell is shown dimmed.
    wrap : int
        Width down to which cells may be broken into lines; 0 if they may not.
    """

    header: str
    cells: list[str]
    keep: int = ALWAYS
    numeric: bool = False
    dim: set[int] = field(default_factory=set)
    wrap: int = 0

    def width(self) -> int:
        """Return the columns that it takes at least, the gap included."""
        longest = max(len(line) for text in (self.header, *self.cells) for line in text.split("\n"))
        return (min(longest, self.wrap) if self.wrap else longest) + GAP


def show_table(columns: Sequence[Column], *, title: str = "", notes: Sequence[str] = ()) -> None:
    """Print a table on stdout; columns that do not fit are left out, and named under the table."""
    console = stdout()
    shown, left_out = fit(columns, console.width)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, GAP - 1, 0, 0), show_edge=False, header_style="bold")
    for column in shown:
        table.add_column(
            column.header,
            justify="right" if column.numeric else "left",
            no_wrap=not column.wrap,
            overflow="fold" if column.wrap else "ellipsis",
            vertical="top",
        )
    for row in range(len(columns[0].cells)):
        cells = [Text(column.cells[row], style="dim" if row in column.dim else "") for column in shown]
        table.add_row(*cells)
    if title:
        console.print(Text(title, style="bold"))
    console.print(table)
    for line in notes:
        console.print(Text(line, style="dim"))
    if left_out:
        names = ", ".join(column.header.replace("\n", " ") for column in left_out)
        console.print(Text(f"Too narrow for: {names}. --json has everything.", style="dim"))


def fit(columns: Sequence[Column], width: int) -> tuple[list[Column], list[Column]]:
    """Return the columns that fit into `width`, in order, and those that do not."""
    shown = list(columns)
    left_out: list[Column] = []
    while sum(column.width() for column in shown) - GAP > width:
        droppable = [column for column in shown if column.keep < ALWAYS]
        if not droppable:
            break
        least = min(droppable, key=lambda column: column.keep)
        shown.remove(least)
        left_out.append(least)
    return shown, [column for column in columns if column in left_out]


def show_pairs(pairs: Sequence[tuple[str, str]], *, title: str = "") -> None:
    """Print names and values, one pair a line."""
    console = stdout()
    if title:
        console.print(Text(title, style="bold"))
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in pairs:
        grid.add_row(name, Text(value))
    console.print(grid)


def show_text(text: str, *, style: str = "") -> None:
    """Print text on stdout as it is, wrapped to the terminal."""
    stdout().print(Text(text, style=style))


def show_raw(text: str) -> None:
    """Write text on stdout as it is: what another program reads."""
    sys.stdout.write(text)


_live: list[Console] = []


class Update(Protocol):
    """Moves a progress bar."""

    def __call__(self, done: float, detail: str = "", total: float | None = None) -> None:
        """Set what is done, a word about it, and the total where it was not known before."""


@contextmanager
def bar(title: str, total: float | None, unit: str, *, quiet: bool = False) -> Iterator[Update]:
    """Give a function that moves a progress bar with rate and time left.

    There is no bar with `quiet`, or where stderr is no terminal.
    """
    console = stderr()
    if quiet or not console.is_terminal:
        yield _no_update
        return
    from rich import progress as rich

    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(bar_width=24),
        rich.TextColumn("{task.percentage:>3.0f}%"),
        rich.TextColumn("{task.fields[rate]}", style="dim"),
        rich.TextColumn("{task.fields[detail]}", style="dim"),
        rich.TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    )
    with rich.Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=total, detail="", rate="")

        def update(done: float, detail: str = "", total: float | None = None) -> None:
            seconds = progress.tasks[0].elapsed or 0.0
            rate = f"{done / seconds:,.0f} {unit}/s" if seconds else ""
            progress.update(task, completed=done, total=total, detail=detail, rate=rate)

        with _owning(console):
            yield update


@contextmanager
def working(title: str, *, quiet: bool = False) -> Iterator[None]:
    """Show that something of unknown length is going on, unless `quiet` or stderr is no terminal."""
    console = stderr()
    if quiet or not console.is_terminal:
        yield
        return
    with console.status(title), _owning(console):
        yield


@contextmanager
def _owning(console: Console) -> Iterator[None]:
    _live.append(console)
    try:
        yield
    finally:
        _live.pop()


def _no_update(done: float, detail: str = "", total: float | None = None) -> None:
    """Take the place of a bar where there is none."""


def _console(file: Any) -> Console:
    width = None if file.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    return Console(file=file, highlight=False, width=width)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
