"""``kvscope export``: write a replay as plain tables for DuckDB, Polars, pandas, R or spreadsheets."""

from __future__ import annotations

from typing import Annotated

import typer

from kvscope.cli.command import command
from kvscope.cli.options import Force, Json, Quiet, ReplayName, ReportOutput
from kvscope.core.options import ExportFormat, ExportLevel


@command("export", order=120)
def export(
    replay: ReplayName = None,
    output: ReportOutput = None,
    form: Annotated[
        ExportFormat, typer.Option("--format", help="Write csv, parquet, or arrow (Feather).")
    ] = ExportFormat.parquet,
    per: Annotated[
        ExportLevel,
        typer.Option(
            metavar="WHAT",
            help="Write fidelity of each step, or means of each head, layer, sequence or run.",
        ),
    ] = ExportLevel.step,
    long: Annotated[
        bool, typer.Option("--long", help="Give each metric a row of fidelity instead of a column.")
    ] = False,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write runs, fidelity and residency as tables in which every row names its policy and budget: no join is needed.

    Where right answers are known, examples.* has what the model says beside all metrics of the example, tasks.* means.
    Large replays are written in pieces. export.json describes the columns.
    """
    from kvscope.cli import console, places
    from kvscope.results.export import export as write
    from kvscope.results.store import open_replay

    opened = open_replay(places.find_replay(replay, quiet=quiet))
    path = places.place(places.REPORTS, output, f"{opened.name}-{form}", force=force)
    with console.working(f"exporting {opened.path}", quiet=quiet):
        made = write(opened, path, form=form, per=per, long=long, force=force)
    tables = sorted(str(file) for file in made.glob(f"*.{form}"))
    if json:
        console.show_json({"export": str(made), "replay": str(opened.path), "tables": tables})
    else:
        console.show_text("\n".join(tables))
