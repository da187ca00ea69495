"""``kvscope spans``: how long the tokens of a question, a fact or an instruction are held."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kvscope.cli.command import command, examples
from kvscope.cli.options import Json, NoVerify, Quiet, ReplayName, RunBudget, RunPolicy, TraceSource

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvscope.analysis.spans import RunSpans, SpanReport
    from kvscope.cli.console import Column


@command("spans", order=80)
@examples(
    "kvscope spans",
    "kvscope spans my-replay --span question=120:140",
)
def spans(
    replay: ReplayName = None,
    span: Annotated[
        list[str] | None,
        typer.Option(
            "--span",
            "-s",
            metavar="NAME=WHAT",
            help="Name a span: question=120:140 (140 excluded), or fact=text:WORDS for every occurrence. Repeatable.",
        ),
    ] = None,
    at: Annotated[
        list[int] | None,
        typer.Option(
            metavar="STEP",
            help="Report what is held after this step. Repeatable. Default: the ends of prompt and sequence.",
            show_default=False,
        ),
    ] = None,
    policy: RunPolicy = None,
    budget: RunBudget = None,
    sequence: Annotated[int, typer.Option(metavar="N", help="Use this sequence of the trace.", min=0)] = 0,
    trace: TraceSource = None,
    no_verify: NoVerify = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Report how much of a span of tokens the heads hold, and when half of it had been evicted.

    Without --span, the command uses the spans of the prompt: the facts and the question of kvscope tasks. It shows a
    single run layer by layer, and several runs with one line each.
    """
    from kvscope.analysis.spans import parse_spans, spans_of, spans_of_prompt
    from kvscope.cli import console, places
    from kvscope.cli.runs import chosen, trace_of
    from kvscope.core.errors import UsageError
    from kvscope.results.store import open_replay

    opened = open_replay(places.find_replay(replay, quiet=quiet))
    runs = chosen(opened, policy, budget)
    sequences = opened.info.trace.sequences
    if sequence >= len(sequences):
        raise UsageError(f"{opened.path} has no sequence {sequence}", f"Name one from 0 to {len(sequences) - 1}.")
    prompt, length = sequences[sequence].prompt, sequences[sequence].length

    def texts() -> list[str]:
        return [str(text) for text in trace_of(opened, trace, compare=not no_verify).tokens(sequence)["text"]]

    named = (
        parse_spans(span, length, texts) if span else spans_of_prompt(trace_of(opened, trace, compare=False), sequence)
    )
    steps = list(dict.fromkeys(at or [prompt - 1, length - 1]))
    found = spans_of(opened, named, steps, [run.run for run in runs], sequence)
    if json:
        console.show_json(found)
        return
    where = ", ".join(f"{one.name} = {one.start}:{one.stop}" for one in named)
    _show(found, steps, f"Sequence {sequence}: prompt {prompt}, length {length}. {where}.")


NOTE = (
    "held: share of the span's tokens held after a step, mean over heads. whole: share of heads that hold all of "
    "them. half evicted: first step after which heads hold half of them or less, on average."
)


def _show(report: SpanReport, steps: Sequence[int], about: str) -> None:
    from kvscope.cli import console
    from kvscope.cli.runs import title

    runs, notes = report["runs"], [about, NOTE]
    if any(run["reads"] for run in runs):
        notes.append("A sparse reader holds every key; the table shows what it reads.")
    single = len(runs) == 1
    heading = f"{report['replay']}: {title(runs[0])}" if single else report["replay"]
    console.show_table(columns(runs, steps, by_layer=single), title=heading, notes=notes)


def columns(runs: Sequence[RunSpans], steps: Sequence[int], *, by_layer: bool) -> list[Column]:
    """Return the columns: a row for each layer of one run, or for each run."""
    from kvscope.cli.console import Column
    from kvscope.cli.runs import title

    rows = [
        (title(run), span["name"], layer)
        for run in runs
        for span in run["spans"]
        for layer in (span["layers"] if by_layer else span["layers"][:1])
    ]
    first = (
        [Column("layer", [str(layer["layer"]) for _, _, layer in rows])]
        if by_layer
        else [Column("run", [run for run, _, _ in rows], wrap=20)]
    )
    table = [Column("span", [span for _, span, _ in rows]), *first]
    for place, step in enumerate(steps):
        for name in ("held", "whole"):
            cells = [_share(layer["at"][place][name]) for _, _, layer in rows]
            table.append(Column(f"{name}\nat {step}", cells, keep=90 - place, numeric=True))
    half_evicted = ["-" if layer["half_gone"] is None else str(layer["half_gone"]) for _, _, layer in rows]
    return [*table, Column("half\nevicted", half_evicted, numeric=True)]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
