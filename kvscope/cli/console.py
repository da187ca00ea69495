"""All output: results on stdout; notes, progress bars and errors on stderr. No other module uses Rich.

Names and texts come from users and from files: control characters in them are shown, not sent to the terminal, and
nothing in them is taken for markup.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvscope.core.printable import in_json, one_line, printable

PIPE_WIDTH = 200  # where stdout is no terminal: wide enough for every column
GAP = 2  # characters between two columns of a table: padding and the separator of the box
ALWAYS = 100  # of `Column.keep`: never dropped


def stdout() -> Console:
    """Return a console for results."""
    return _console(sys.stdout)


def stderr() -> Console:
    """Return a console for notes and errors: while a bar is shown, that of the bar, so that lines go above it."""
    return _live[-1] if _live else _console(sys.stderr)


def note(text: str, *, quiet: bool = False) -> None:
    """Print one line of information, unless `quiet`."""
    if not quiet:
        _print_line(Text(printable(text), style="dim"))


def warn(text: str) -> None:
    """Print one line that the user should see even with ``--quiet``."""
    _print_line(Text.assemble(("warning: ", "yellow"), printable(text)))


def _print_line(text: Text) -> None:
    """Print a line on stderr: on a terminal, words are not broken; in a file or a pipe, it stays one line.

    What follows ``next:`` is a command to copy, and stays one line everywhere.
    """
    console = stderr()
    console.print(text, soft_wrap=not console.is_terminal or text.plain.startswith("next: "))


def fail(what: str, todo: str) -> None:
    """Print an error: what is wrong on one line, what to do on the next."""
    console = stderr()
    console.print(Text.assemble(("error: ", "bold red"), one_line(what)), soft_wrap=not console.is_terminal)
    console.print(Text(one_line(todo)), soft_wrap=True)


def show_json(value: object) -> None:
    """Print a value as JSON; NaN and infinities become null."""
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False, default=str)
    sys.stdout.write(in_json(text) + "\n")


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
        Columns with the lowest number are dropped first where the terminal is too narrow; `ALWAYS` is never dropped.
    numeric : bool
        Whether to align to the right.
    dim : set of int
        Rows whose cell is dimmed.
    wrap : int
        Smallest width to which cells may be wrapped; 0 if they may not be.
    note : str
        Line under the table that explains the column; not printed where the column is dropped.
    """

    header: str
    cells: list[str]
    keep: int = ALWAYS
    numeric: bool = False
    dim: set[int] = field(default_factory=set)
    wrap: int = 0
    note: str = ""

    def width(self) -> int:
        """Return the smallest width in characters, the gap included."""
        longest = max(len(line) for text in (self.header, *self.cells) for line in text.split("\n"))
        return (min(longest, self.wrap) if self.wrap else longest) + GAP


def show_table(
    columns: Sequence[Column],
    *,
    title: str = "",
    notes: Sequence[str] = (),
    whole: bool = False,
    options: str = "--json prints everything",
) -> None:
    """Print a table on stdout; columns that do not fit are dropped and listed under the table, unless `whole`.

    `options` says which options of the command print the dropped columns.
    """
    console = stdout()
    if whole:
        console.width = max(console.width, sum(column.width() for column in columns))
    shown, dropped = fit(columns, console.width)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, GAP - 1, 0, 0), show_edge=False, header_style="bold")
    for column in shown:
        table.add_column(
            Text(printable(column.header)),
            justify="right" if column.numeric else "left",
            no_wrap=not column.wrap,
            overflow="fold" if column.wrap else "ellipsis",
            vertical="top",
        )
    for row in range(len(columns[0].cells)):
        cells = [Text(printable(column.cells[row]), style="dim" if row in column.dim else "") for column in shown]
        table.add_row(*cells)
    if title:
        console.print(Text(printable(title), style="bold"))
    console.print(table)
    for line in (*notes, *(column.note for column in shown if column.note)):
        console.print(Text(printable(line), style="dim"))
    if dropped:
        names = ", ".join(column.header.replace("\n", " ") for column in dropped)
        console.print(Text(f"Columns that do not fit: {names}. {options}.", style="dim"))


def fit(columns: Sequence[Column], width: int) -> tuple[list[Column], list[Column]]:
    """Return the columns that fit into `width`, and those that are dropped, both in order."""
    shown = list(columns)
    dropped: list[Column] = []
    while sum(column.width() for column in shown) - GAP > width:
        droppable = [column for column in shown if column.keep < ALWAYS]
        if not droppable:
            break
        least = min(droppable, key=lambda column: column.keep)
        shown.remove(least)
        dropped.append(least)
    return shown, [column for column in columns if column in dropped]


def show_pairs(pairs: Sequence[tuple[str, str]], *, title: str = "") -> None:
    """Print names and values, one pair per line."""
    console = stdout()
    if title:
        console.print(Text(printable(title), style="bold"))
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in pairs:
        grid.add_row(Text(printable(name)), Text(printable(value)))
    console.print(grid)


def show_text(text: str, *, style: str = "") -> None:
    """Print text on stdout, wrapped to the terminal."""
    stdout().print(Text(printable(text), style=style))


def show_raw(text: str) -> None:
    """Write text to stdout unchanged, for another program to read."""
    sys.stdout.write(text)


_live: list[Console] = []


class Update(Protocol):
    """Updates a progress bar."""

    def __call__(self, done: float, detail: str = "", total: float | None = None) -> None:
        """Set the amount done, a short detail, and the total if it was not known before."""


@contextmanager
def bar(title: str, total: float | None, unit: str, *, quiet: bool = False) -> Iterator[Update]:
    """Yield a function that updates a progress bar with rate, elapsed and remaining time.

    The elapsed time moves before anything is done. What remains is reckoned from all that is done, so it is known from
    the first part on. No bar is shown with `quiet`, or where stderr is not a terminal.
    """
    console = stderr()
    if quiet or not console.is_terminal:
        yield _no_update
        return
    from rich import progress as rich

    columns = (
        rich.TextColumn("{task.description}", markup=False),
        rich.BarColumn(bar_width=24),
        rich.TextColumn("{task.percentage:>3.0f}%"),
        rich.TextColumn("{task.fields[rate]}", style="dim", markup=False),
        rich.TextColumn("{task.fields[detail]}", style="dim", markup=False),
        rich.TimeElapsedColumn(),
        rich.TextColumn("{task.fields[left]}", markup=False),
    )
    with rich.Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(one_line(title), total=total, detail="", rate="", left="")

        def update(done: float, detail: str = "", total: float | None = None) -> None:
            seconds = progress.tasks[0].elapsed or 0.0
            rate = f"{done / seconds:,.0f} {unit}/s" if seconds else ""
            whole = progress.tasks[0].total if total is None else total
            left = _left(seconds, done, whole)
            progress.update(task, completed=done, total=total, detail=one_line(detail), rate=rate, left=left)

        with _in_use(console):
            yield update


@contextmanager
def counted(title: str, *, total: float | None = None, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """Yield a function that adds bytes to a progress bar, as `bar`."""
    done = 0

    with bar(title, None if total is None else total / 1e6, "MB", quiet=quiet) as update:

        def add(count: int) -> None:
            nonlocal done
            done += count
            update(done / 1e6)

        yield add


@contextmanager
def loading(title: str, *, quiet: bool = False) -> Iterator[None]:
    """Show a bar while a model may be loaded: it moves, and shows the time left, from the first weight on."""
    from kvscope.core.progress import weights_shown

    with bar(title, None, "%", quiet=quiet) as update, weights_shown(lambda share: update(100 * share, total=100)):
        yield


@contextmanager
def working(title: str, *, quiet: bool = False) -> Iterator[None]:
    """Show a spinner while something of unknown length runs, unless `quiet` or stderr is not a terminal."""
    console = stderr()
    if quiet or not console.is_terminal:
        yield
        return
    with console.status(Text(one_line(title))), _in_use(console):
        yield


@contextmanager
def _in_use(console: Console) -> Iterator[None]:
    _live.append(console)
    try:
        yield
    finally:
        _live.pop()


def _left(seconds: float, done: float, total: float | None) -> str:
    """Return the time that remains if it goes on as before, ``1:05 left``; nothing where it cannot be known."""
    if not total or not 0 < done < total:
        return ""
    remaining = round(seconds * (total - done) / done)
    hours, minutes = divmod(remaining // 60, 60)
    return f"{hours}:{minutes:02}:{remaining % 60:02} left" if hours else f"{minutes}:{remaining % 60:02} left"


def _no_update(done: float, detail: str = "", total: float | None = None) -> None:
    """Do nothing: no bar is shown."""


def _console(file: TextIO) -> Console:
    width = None if file.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    return Console(file=file, highlight=False, width=width)


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
