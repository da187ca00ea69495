"""``kvscope diff``: what became worse between two replays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kvscope.cli.options import Json, Quiet

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvscope.cli.console import Column
    from kvscope.results.diff import Row

REGRESSION = 3
SHORT = 50  # rows up to which values that are the same are shown too


def diff(
    base: Annotated[str, typer.Argument(metavar="BASE", help="A replay (name or folder), or a summary.json.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="The same, later.")],
    tolerance: Annotated[
        list[str] | None,
        typer.Option(
            "--tolerance",
            "-t",
            metavar="[METRIC=]AMOUNT",
            help="How much worse a metric may become; for all metrics, or for one. Repeatable. Default: 0.001.",
            show_default=False,
        ),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Show the values that are the same too.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare two replays of the same trace; exit status 3 where fidelity fell by more than the tolerance."""
    from kvscope.cli import console, places
    from kvscope.results.diff import diff as compare
    from kvscope.results.diff import load_summary, parse_tolerance

    allowed = parse_tolerance(tolerance or [])
    old, later = (load_summary(places.find_replay(name, quiet=quiet)) for name in (base, new))
    found = compare(old, later, allowed)
    if json:
        console.show_json(found.to_dict())
    else:
        shown = found.rows if everything or len(found.rows) <= SHORT else [r for r in found.rows if r.verdict != "same"]
        if shown:
            console.show_table(columns(shown), title=f"{found.base} -> {found.new}")
        console.show_text(_verdict(found.rows, len(found.rows) - len(shown)), style="bold" if found.regressed else "")
    if found.regressed:
        raise typer.Exit(REGRESSION)


def columns(rows: Sequence[Row]) -> list[Column]:
    """Return the columns of the comparison; a run is named once."""
    from kvscope.cli.console import ALWAYS, Column

    names = [row.run if index == 0 or rows[index - 1].run != row.run else "" for index, row in enumerate(rows)]
    same = {index for index, row in enumerate(rows) if row.verdict == "same"}
    return [
        Column("run", names, wrap=20),
        Column("metric", [row.metric for row in rows], dim=same),
        Column("base", [_number(row.base) for row in rows], keep=50, numeric=True, dim=same),
        Column("new", [_number(row.new) for row in rows], keep=50, numeric=True, dim=same),
        Column("change", ["-" if row.change is None else f"{row.change:+.4f}" for row in rows], numeric=True, dim=same),
        Column("tolerance", [f"{row.tolerance:g}" for row in rows], keep=20, numeric=True, dim=same),
        Column("verdict", [row.verdict for row in rows], keep=ALWAYS, dim=same),
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _verdict(rows: Sequence[Row], hidden: int) -> str:
    counts = {
        verdict: sum(row.verdict == verdict for row in rows) for verdict in dict.fromkeys(r.verdict for r in rows)
    }
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    return f"{len(rows)} values: {told}." + (f" {hidden} that are the same are not shown: --all." if hidden else "")
