"""``kvscope export``: a replay as plain tables, as one table for a paper, or in an experiment tracker."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvscope.cli.command import command, examples
from kvscope.cli.options import Force, Json, Quiet, ReplayName, ReportOutput
from kvscope.cli.trackers import ToTracker, export_to
from kvscope.core.errors import UsageError
from kvscope.core.options import ExportFormat, ExportLevel

if TYPE_CHECKING:
    from kvscope.results.store import Replay


@command("export", order=120)
@examples(
    "kvscope export",
    "kvscope export my-replay --to wandb",
)
def export(
    replay: ReplayName = None,
    output: ReportOutput = None,
    form: Annotated[
        ExportFormat,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="Write csv, parquet or arrow (Feather); or print the summary as one table in markdown or latex, or "
            "write it with -o FILE.",
        ),
    ] = ExportFormat.parquet,
    per: Annotated[
        ExportLevel,
        typer.Option(
            metavar="WHAT",
            help="Write one row of fidelity for each step, or means for each head, layer, sequence or run.",
        ),
    ] = ExportLevel.step,
    long: Annotated[
        bool, typer.Option("--long", help="Write each metric of fidelity as a row instead of a column.")
    ] = False,
    to: ToTracker = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write runs, fidelity and residency as tables in which every row names its policy and budget: no join is needed.

    If right answers are known, examples.* has the model's answer and all metrics of each example, and tasks.* has
    means. Large replays are written in pieces. export.json describes the columns.
    """
    from kvscope.cli import console, places
    from kvscope.results.export import export as write
    from kvscope.results.store import open_replay

    if to is not None and (form is not ExportFormat.parquet or per is not ExportLevel.step or long):
        raise UsageError("--format, --per and --long apply to tables, not to --to", "Omit them, or export twice.")
    opened = open_replay(places.find_replay(replay, quiet=quiet))
    if to is not None:
        export_to(opened, to, output, force=force, json=json, quiet=quiet)
        return
    if form in (ExportFormat.markdown, ExportFormat.latex):
        _paper_table(opened, form, output, force=force, quiet=quiet)
        return
    path = places.place(places.REPORTS, output, f"{opened.name}-{form}", force=force)
    with console.working(f"exporting {opened.path}", quiet=quiet):
        made = write(opened, path, form=form, per=per, long=long, force=force)
    tables = sorted(str(file) for file in made.glob(f"*.{form}"))
    if json:
        console.show_json({"export": str(made), "replay": str(opened.path), "tables": tables})
    else:
        console.show_text("\n".join(tables))


def _paper_table(replay: Replay, form: ExportFormat, output: str | None, *, force: bool, quiet: bool) -> None:
    """Print the summary as a table of Markdown or LaTeX, or write it into a file."""
    from kvscope.cli import console
    from kvscope.core.output import replace_file, require_free
    from kvscope.results.paper_table import as_latex, as_markdown, paper_table

    table = paper_table(replay.summary)
    text = as_latex(table) if form is ExportFormat.latex else as_markdown(table)
    if output is None:
        console.show_raw(text)
        return
    require_free(Path(output), force=force)
    replace_file(Path(output), text.encode(), force=force)
    console.note(f"table: {output}", quiet=quiet)
