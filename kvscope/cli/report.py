"""``kvscope report``: write a self-contained HTML page of one or more replays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kvscope.cli.command import command, examples
from kvscope.cli.completion import replay_names
from kvscope.cli.options import Force, Json, NoVerify, Quiet, ReportOutput

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvscope.report.parts import NamedSpan
    from kvscope.results.store import Replay
    from kvscope.trace.reader import Trace


@command("report", order=90)
@examples(
    "kvscope report",
    "kvscope report first-replay second-replay -o both",
)
def report(
    replays: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="REPLAY",
            autocompletion=replay_names,
            help="Show these replays: names under reports/, paths or addresses. Default: the newest.",
            show_default=False,
        ),
    ] = None,
    output: ReportOutput = None,
    span: Annotated[
        list[str] | None,
        typer.Option(
            "--span",
            "-s",
            metavar="NAME=WHAT",
            help="Show when each head lost a span: fact=120:140, or fact=text:WORDS for every occurrence. Repeatable.",
        ),
    ] = None,
    title: Annotated[str | None, typer.Option(help="Set the heading of the page.")] = None,
    data_only: Annotated[bool, typer.Option("--data-only", help="Write the data of the page as JSON instead.")] = False,
    force: Force = False,
    no_verify: NoVerify = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write an interactive HTML page that needs no network, and print its path."""
    from kvscope.cli import console, places
    from kvscope.report.page import report as page
    from kvscope.report.page import report_data
    from kvscope.results.store import open_replay

    named: list[str | None] = [*replays] if replays else [None]
    found = [open_replay(places.find_replay(name, quiet=quiet)) for name in named]
    name = places.joined([replay.path.name for replay in found])
    write, suffix = (report_data, ".json") if data_only else (page, ".html")
    given = output or (f"{places.readable(name)}{suffix}" if force else None)
    path = places.place(places.REPORTS, given, name, force=force, suffix=suffix)
    with console.working("reading the traces", quiet=quiet):
        traces = traces_of(found, compare=not no_verify)
        spans = spans_of(found, traces, span or [])
    with console.bar("drawing", 100, "%", quiet=quiet) as update:
        made = write(
            found, traces, path, force=force, title=title, spans=spans, progress=lambda share: update(100 * share)
        )
    if json:
        console.show_json({"report": str(made), "replays": [str(replay.path) for replay in found]})
    else:
        console.show_text(str(made))


def spans_of(
    replays: Sequence[Replay], traces: Mapping[str, Trace], given: Sequence[str]
) -> dict[str, list[NamedSpan]]:
    """Return the spans of every sequence that has them, by identity of the trace and number of the sequence.

    Raises
    ------
    UsageError
        For one that no sequence has.
    """
    from kvscope.analysis.spans import parse_spans
    from kvscope.core.errors import UsageError
    from kvscope.report.parts import NamedSpan

    found: dict[str, list[NamedSpan]] = {}
    for item in given:
        fault: UsageError | None = None
        seen = False
        for source in {replay.info.trace.identity: replay.info.trace for replay in replays}.values():
            for number, sequence in enumerate(source.sequences):

                def texts(identity: str = source.identity, number: int = number) -> list[str]:
                    if identity not in traces:
                        raise UsageError("the words of a span need the trace, which was not found", "Name positions.")
                    return [str(text) for text in traces[identity].tokens(number)["text"]]

                try:
                    spans = parse_spans([item], sequence.length, texts)
                except UsageError as error:  # another sequence may have it
                    fault = error
                else:
                    seen = True
                    own = found.setdefault(f"{source.identity}/{number}", [])
                    own += [NamedSpan(one.name, one.start, one.stop) for one in spans]
        if fault is not None and not seen:
            raise fault
    return found


def traces_of(replays: Sequence[Replay], *, compare: bool = True) -> dict[str, Trace]:
    """Return the traces of the replays by identity, as far as they are still at their recorded paths."""
    from kvscope.cli.console import warn
    from kvscope.core.errors import TraceError
    from kvscope.trace.reader import open_trace

    traces: dict[str, Trace] = {}
    for replay in replays:
        source = replay.info.trace
        if source.identity in traces or source.path is None:  # a replay of plain text has no trace
            continue
        try:
            trace = open_trace(source.path, compare=compare)
        except TraceError as error:
            warn(f"the report has no token text: {error.what}")
            continue
        if trace.identity == source.identity:
            traces[trace.identity] = trace
        else:
            warn(f"the report has no token text: {trace.path} is not the trace of {replay.path}")
    return traces
