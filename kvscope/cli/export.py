"""``kvscope export``: a replay as plain tables for DuckDB, Polars, pandas, R, spreadsheets."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from kvscope.cli.command import command
from kvscope.cli.options import Force, Json, Quiet


class Format(StrEnum):
    """What the files are."""

    csv = "csv"
    parquet = "parquet"
    arrow = "arrow"


class Per(StrEnum):
    """What a row of the fidelity is."""

    step = "step"
    head = "head"
    layer = "layer"
    sequence = "sequence"
    run = "run"


@command("export", order=120)
def export(
    replay: Annotated[
        str | None,
        typer.Argument(
            metavar="REPLAY", help="Name under reports/, or a path. Default: the newest.", show_default=False
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", "--name", metavar="FOLDER", help="Name under reports/, or a path."),
    ] = None,
    form: Annotated[Format, typer.Option("--format", help="csv, parquet, or arrow (Feather).")] = Format.parquet,
    per: Annotated[
        Per,
        typer.Option(
            metavar="WHAT",
            help="A row of fidelity: a step of a head, or a mean: step, head, layer, sequence, or run.",
        ),
    ] = Per.step,
    long: Annotated[
        bool, typer.Option("--long", help="fidelity with a row for each metric instead of a column.")
    ] = False,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write runs, fidelity and residency as tables in which every row names its policy and budget: no join is needed.

    Large replays are written piece by piece. export.json says what the columns are.
    """
    from kvscope.cli import console, places
    from kvscope.results.export import export as write
    from kvscope.results.store import open_replay

    opened = open_replay(places.find_replay(replay, quiet=quiet))
    path = places.place(places.REPORTS, output, f"{opened.name}-{form.value}", force=force)
    with console.working(f"exporting {opened.path}", quiet=quiet):
        made = write(opened, path, form=form.value, per=per.value, long=long, force=force)
    tables = sorted(str(file) for file in made.glob(f"*.{form.value}"))
    if json:
        console.show_json({"export": str(made), "replay": str(opened.path), "tables": tables})
    else:
        console.show_text("\n".join(tables))
