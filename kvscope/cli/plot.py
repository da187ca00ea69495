"""``kvscope plot``: write one figure of a replay as PDF, SVG or PNG."""

from __future__ import annotations

from typing import Annotated

import typer

from kvscope.cli.command import command, examples
from kvscope.cli.options import Force, NoVerify, Quiet, RunBudget, RunPolicy

Replays = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="REPLAY",
        help="Draw these replays: names under reports/, paths or addresses. Default: the newest.",
        show_default=False,
    ),
]
PanelName = Annotated[str, typer.Option(help="Draw this panel of the report.")]
FigureOutput = Annotated[
    str | None,
    typer.Option(
        "-o", "--output", metavar="FILE", help="Write to this file: .pdf, .svg or .png. Default: REPLAY-PANEL.pdf."
    ),
]
MetricName = Annotated[
    str | None, typer.Option(metavar="METRIC", help="Draw this metric. Default: the first that has a better direction.")
]
AxisName = Annotated[
    str, typer.Option(help="Draw budget_curve against held, share, read, budget or bytes.", metavar="AXIS")
]
Layer = Annotated[int | None, typer.Option(metavar="N", help="Draw this layer. Default: the middle one.")]
Head = Annotated[int | None, typer.Option(metavar="N", help="Draw this query head. Default: all.", min=0)]
StepNumber = Annotated[int | None, typer.Option(metavar="N", help="Draw this step. Default: the last.", min=0)]
SpanName = Annotated[str | None, typer.Option(metavar="NAME", help="Draw this span. Default: the first of the prompt.")]
StyleName = Annotated[str, typer.Option(help="Use this style: paper (one column, without heading) or slides.")]
Width = Annotated[float | None, typer.Option(metavar="INCHES", help="Width of the figure. Default: that of the style.")]
Height = Annotated[
    float | None, typer.Option(metavar="INCHES", help="Height of the figure. Default: that of the style.")
]
FontSize = Annotated[float | None, typer.Option(metavar="POINTS", help="Size of all text. Default: that of the style.")]


@command("plot", order=95)
@examples(
    "kvscope plot my-replay --panel budget_curve -o figure.pdf",
    "kvscope plot --panel residency --layer 2 --head 1 --width 6.5",
)
def plot(
    replays: Replays = None,
    panel: PanelName = "budget_curve",
    output: FigureOutput = None,
    metric: MetricName = None,
    policy: RunPolicy = None,
    budget: RunBudget = None,
    against: AxisName = "held",
    layer: Layer = None,
    head: Head = None,
    step: StepNumber = None,
    span: SpanName = None,
    style: StyleName = "paper",
    width: Width = None,
    height: Height = None,
    font_size: FontSize = None,
    force: Force = False,
    no_verify: NoVerify = False,
    quiet: Quiet = False,
) -> None:
    """Write one panel of the report as a figure for a paper, and print its path.

    A line plot shows the runs that the report shows first, or those of --policy. A map shows the first run that
    --policy and --budget select.
    """
    from pathlib import Path

    from kvscope.cli import console, places
    from kvscope.cli.report import traces_of
    from kvscope.cli.runs import chosen
    from kvscope.report.figures import plot as figure_of
    from kvscope.report.paper import save
    from kvscope.report.paper import style as style_of
    from kvscope.results.store import open_replay

    look = style_of(style, width, height, font_size)
    named: list[str | None] = [*replays] if replays else [None]
    found = [open_replay(places.find_replay(name, quiet=quiet)) for name in named]
    runs = chosen(found[0], policy, budget) if policy or budget else []
    name = f"{places.joined([each.path.name for each in found])}-{panel.replace('_', '-')}"
    path = Path(output) if output else places.place(places.REPORTS, None, name, force=force, suffix=".pdf")
    with console.working("drawing", quiet=quiet):
        figure = figure_of(
            found,
            panel,
            metric=metric,
            run=runs[0].run if runs else None,
            traces=traces_of(found, compare=not no_verify),
            policies=list(dict.fromkeys(run.label for run in runs)) if policy else (),
            against=against,
            layer=layer,
            head=head,
            step=step,
            span=span,
        )
        made = save(figure, path, look, force=force)
    console.show_text(str(made))
