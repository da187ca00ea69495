"""``kvscope diff``: what became worse between two replays."""

from __future__ import annotations

from typing import Annotated

import typer

from kvscope.cli.options import Json, Quiet

REGRESSION = 3


def diff(
    base: Annotated[str, typer.Argument(metavar="BASE", help="A replay (name or folder), or a summary.json.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="The same, later.")],
    tolerance: Annotated[
        list[str] | None,
        typer.Option(
            "--tolerance",
            "-t",
            metavar="[METRIC=]AMOUNT",
            help="How much worse a metric may become. Repeatable. Default: 0.001.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare two replays of the same trace; exit status 3 where fidelity fell by more than the tolerance."""
    from kvscope.cli import console, places
    from kvscope.results.diff import diff as compare
    from kvscope.results.diff import load_summary

    allowed = _tolerance(tolerance or [])
    found = compare(
        load_summary(places.find_replay(base, quiet=quiet)),
        load_summary(places.find_replay(new, quiet=quiet)),
        allowed,
    )
    console.show_json(found)
    if found.regressions:
        raise typer.Exit(REGRESSION)


def _tolerance(texts: list[str]) -> dict[str, float]:
    return {}
