"""``kvscope diff``: what became worse between two replays."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvscope.cli.command import command
from kvscope.cli.options import Json, Quiet
from kvscope.core.errors import ExitStatus
from kvscope.core.options import DiffFormat

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvscope.cli.console import Column
    from kvscope.results.diff import Diff, DiffRow


@command("diff", order=100)
def diff(
    base: Annotated[str, typer.Argument(metavar="BASE", help="A replay (name or folder), or a summary.json.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="The same, later.")],
    tolerance: Annotated[
        list[str] | None,
        typer.Option(
            "--tolerance",
            "-t",
            metavar="[METRIC=]AMOUNT",
            help="How much worse a metric may become, as 0.01 or 1%; for all metrics, or for one. Repeatable. "
            "Default: 0.001.",
            show_default=False,
        ),
    ] = None,
    decisions: Annotated[
        bool, typer.Option("--decisions", help="Compare also which keys were evicted when; any difference fails.")
    ] = False,
    first: Annotated[
        int, typer.Option(metavar="N", help="With --decisions: evictions to name for each run, earliest first.", min=0)
    ] = 10,
    update: Annotated[
        bool, typer.Option("--update", help="Accept NEW: write its summary to BASE, a .json file, and end with 0.")
    ] = False,
    form: Annotated[
        DiffFormat, typer.Option("--format", help="text, markdown, json, or junit (XML for test reports).")
    ] = DiffFormat.text,
    everything: Annotated[bool, typer.Option("--all", help="Show the values that are the same too.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare two replays of the same trace; exit status 3 where fidelity fell by more than the tolerance.

    In a GitHub workflow the result is added to the job summary as well.
    """
    from kvscope.cli import console, places
    from kvscope.core.errors import ResultError
    from kvscope.results.baseline import accept, load_summary
    from kvscope.results.diff import diff as compare
    from kvscope.results.diff import parse_tolerance

    allowed = parse_tolerance(tolerance or [])
    begins = update and base.endswith(".json") and not Path(base).exists()
    before = Path(base) if begins else places.find_replay(base, quiet=quiet)
    after = places.find_replay(new, quiet=quiet)
    later = load_summary(after)
    if begins:
        accept(after, before)
        console.note(f"{base} is written: the summary of {after}", quiet=quiet)
        return
    try:
        sources = str(before), str(after)
        found = compare(load_summary(before), later, allowed, decisions=decisions, first=first, sources=sources)
    except ResultError as error:
        raise ResultError(error.what, f"To begin anew, remove {before} first.") if update else error from None
    if update:
        accept(after, before)
    show(found, _format(form, json), everything=everything, quiet=quiet)
    _add_to_job_summary(found)
    if update:
        console.note(f"{before} is now the summary of {after}", quiet=quiet)
    elif found.regressed:
        raise typer.Exit(ExitStatus.difference)


def show(found: Diff, form: DiffFormat, *, everything: bool, quiet: bool) -> None:
    """Print a comparison; where it is not for people, its verdict goes to stderr as well."""
    from kvscope.cli import console
    from kvscope.results.render import junit, markdown

    if form is DiffFormat.text:
        _show_tables(found, everything)
        return
    if form is DiffFormat.json:
        console.show_json(found.to_dict())
    else:
        console.show_raw(junit(found) if form is DiffFormat.junit else markdown(found))
    console.note(found.verdict(), quiet=quiet)


def columns(rows: Sequence[DiffRow]) -> list[Column]:
    """Return the columns of the comparison; a run is named once."""
    from kvscope.cli.console import ALWAYS, Column
    from kvscope.results.render import number

    names = [row.run if index == 0 or rows[index - 1].run != row.run else "" for index, row in enumerate(rows)]
    same = {index for index, row in enumerate(rows) if row.verdict == "same"}
    return [
        Column("run", names, wrap=20),
        Column("metric", [row.metric for row in rows], dim=same),
        Column("base", [number(row.base) for row in rows], keep=50, numeric=True, dim=same),
        Column("new", [number(row.new) for row in rows], keep=50, numeric=True, dim=same),
        Column("change", [number(row.change, sign=True) for row in rows], numeric=True, dim=same),
        Column("tolerance", [row.stated for row in rows], keep=20, numeric=True, dim=same),
        Column("verdict", [row.verdict for row in rows], keep=ALWAYS, dim=same),
    ]


def _show_tables(found: Diff, everything: bool) -> None:
    from kvscope.cli import console
    from kvscope.results.render import MOVED, counted, moved_cells

    shown = found.shown(everything)
    if shown:
        console.show_table(columns(shown), title=f"{found.base} -> {found.new}")
    for run in found.redecided:
        if run.first:
            cells = zip(*map(moved_cells, run.first), strict=True)
            table = [
                console.Column(name, list(column), numeric=name not in ("base", "new"))
                for name, column in zip(MOVED, cells, strict=True)
            ]
            more = "" if run.changed == len(run.first) else f"; the first {len(run.first)} in time"
            console.show_table(table, title=f"{run.run}: {counted(run)}{more}")
        else:
            console.show_text(f"{run.run}: {counted(run)}")
    hidden = len(found.rows) - len(shown)
    more = f" {hidden} values that are the same are not shown: --all." if hidden else ""
    console.show_text(found.verdict() + more, style="bold" if found.regressed else "")


def _format(form: DiffFormat, json: bool) -> DiffFormat:
    from kvscope.core.errors import UsageError

    if json and form not in (DiffFormat.text, DiffFormat.json):
        raise UsageError(f"--json and --format {form}", "Give one of the two.")
    return DiffFormat.json if json else form


def _add_to_job_summary(found: Diff) -> None:
    """Append to the summary page of a GitHub job, if this runs in one."""
    from kvscope.results.render import markdown

    file = os.environ.get("GITHUB_STEP_SUMMARY")
    if file:
        with Path(file).open("a", encoding="utf-8") as page:
            page.write(markdown(found) + "\n")
