"""``kvscope diff``: what became worse between two replays."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from kvscope.cli.command import command, examples
from kvscope.cli.diff_options import (
    AllowedChange,
    DiffBase,
    DiffForm,
    DiffNew,
    ListedChanges,
    UnchangedToo,
    UpdateBase,
    WithDecisions,
)
from kvscope.cli.options import Json, Quiet
from kvscope.core.errors import ExitStatus
from kvscope.core.options import DiffFormat

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvscope.cli.console import Column
    from kvscope.results.diff import Diff, DiffRow


@command("diff", order=100)
@examples(
    "kvscope diff old-replay new-replay",
    "kvscope diff baseline.json new-replay --tolerance output_error=1%",
)
def diff(
    base: DiffBase,
    new: DiffNew,
    tolerance: AllowedChange = None,
    decisions: WithDecisions = False,
    first: ListedChanges = 10,
    update: UpdateBase = False,
    form: DiffForm = DiffFormat.text,
    everything: UnchangedToo = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare two replays of one trace; exit with status 3 if fidelity fell by more than the tolerance.

    In a GitHub workflow, the result is also added to the job summary.
    """
    from kvscope.cli import console, places
    from kvscope.core.errors import ResultError, UsageError
    from kvscope.results.baseline import accept, load_summary
    from kvscope.results.diff import diff as compare
    from kvscope.results.tolerance import parse_tolerance
    from kvscope.sharing.remote import is_remote, shown

    allowed = parse_tolerance(tolerance or [])
    if update and is_remote(base):
        raise UsageError(f"{shown(base)} is on another machine, so it cannot be written", "Name a file here as BASE.")
    if update and base.endswith(".json") and not Path(base).exists():
        source = places.find_replay(new, quiet=quiet)
        accept(source, Path(base))
        console.note(f"{base} is written: the summary of {source}", quiet=quiet)
        return
    before, after = places.find_replay(base, quiet=quiet), places.find_replay(new, quiet=quiet)
    later = load_summary(after)
    try:
        sources = str(before), str(after)
        found = compare(load_summary(before), later, allowed, decisions=decisions, first=first, sources=sources)
    except ResultError as error:
        raise ResultError(error.what, f"To start a new baseline, remove {before} first.") if update else error from None
    if update:
        accept(after, before)
    show(found, _format(form, json), everything=everything, quiet=quiet)
    _add_to_job_summary(found)
    if update:
        console.note(f"{before} is now the summary of {after}", quiet=quiet)
    elif found.regressed:
        raise typer.Exit(ExitStatus.difference)


def show(found: Diff, form: DiffFormat, *, everything: bool, quiet: bool) -> None:
    """Print a comparison; for formats that programs read, its verdict is printed on stderr as well."""
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
    """Return the columns of the comparison; a run is named in its first row only."""
    from kvscope.cli.console import ALWAYS, Column
    from kvscope.results.render import number

    names = [row.run if index == 0 or rows[index - 1].run != row.run else "" for index, row in enumerate(rows)]
    same = {index for index, row in enumerate(rows) if row.verdict == "same"}
    return [
        Column("run", names, wrap=20),
        Column("metric", [row.metric for row in rows], dim=same),
        Column("base", [number(row.base) for row in rows], numeric=True, dim=same),
        Column("new", [number(row.new) for row in rows], numeric=True, dim=same),
        Column("change", [number(row.change, sign=True) for row in rows], numeric=True, dim=same),
        Column("tolerance", [row.stated for row in rows], keep=20, numeric=True, dim=same),
        Column("verdict", [row.verdict for row in rows], keep=ALWAYS, dim=same),
    ]


def with_lost_runs_joined(rows: Sequence[DiffRow]) -> list[DiffRow]:
    """Return rows in which a run that only one side has, with several metrics, is a single row."""
    found: list[DiffRow] = []
    for _, same_run in groupby(rows, lambda row: row.run):
        own = list(same_run)
        one_side = len({row.verdict for row in own} & {"missing", "new"}) == len({row.verdict for row in own}) == 1
        found += [replace(own[0], metric=f"all {len(own)}", base=None, new=None)] if one_side and own[1:] else own
    return found


def _show_tables(found: Diff, everything: bool) -> None:
    from kvscope.cli import console
    from kvscope.results.render import CHANGE_COLUMNS, change_cells, change_count

    shown = found.shown(everything)
    if shown:
        console.show_table(
            columns(shown if everything else with_lost_runs_joined(shown)), title=f"{found.base} -> {found.new}"
        )
    for run in found.changed_decisions:
        if run.first:
            cells = zip(*map(change_cells, run.first), strict=True)
            table = [
                console.Column(name, list(column), numeric=name not in ("base", "new"))
                for name, column in zip(CHANGE_COLUMNS, cells, strict=True)
            ]
            more = "" if run.changed == len(run.first) else f"; the earliest {len(run.first)}"
            console.show_table(table, title=f"{run.run}: {change_count(run)}{more}")
        else:
            console.show_text(f"{run.run}: {change_count(run)}")
    hidden = len(found.rows) - len(shown)
    more = f" {hidden} unchanged values are not shown; --all shows them." if hidden else ""
    console.show_text(found.verdict() + more, style="bold" if found.regressed else "")


def _format(form: DiffFormat, json: bool) -> DiffFormat:
    from kvscope.core.errors import UsageError

    if json and form not in (DiffFormat.text, DiffFormat.json):
        raise UsageError(f"--json and --format {form} exclude each other", "Use one of the two.")
    return DiffFormat.json if json else form


def _add_to_job_summary(found: Diff) -> None:
    """Append to the summary page of a GitHub job, if there is one."""
    from kvscope.results.render import markdown

    file = os.environ.get("GITHUB_STEP_SUMMARY")
    if file:
        with Path(file).open("a", encoding="utf-8") as page:
            page.write(markdown(found) + "\n")
