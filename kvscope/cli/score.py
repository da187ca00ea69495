"""``kvscope score``: other metrics of a replay, without replaying it."""

from __future__ import annotations

import typer

from kvscope.cli.command import command
from kvscope.cli.options import (
    Device,
    Force,
    Json,
    Metrics,
    Quiet,
    ReplayName,
    ReportOutput,
    TraceSource,
    command_line,
)


@command("score", order=60)
def score(
    ctx: typer.Context,
    replay: ReplayName = None,
    metric: Metrics = None,
    trace: TraceSource = None,
    output: ReportOutput = None,
    device: Device = "cpu",
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compute metrics from the decisions of a replay and its trace, as the replay itself would have.

    They go to a new replay, REPLAY-scored, with the same decisions. Runs of a closed loop are left out: what they paid
    attention to is not recorded.
    """
    from kvscope.cli import console, places
    from kvscope.cli.runs import trace_of
    from kvscope.cli.summary import show
    from kvscope.results.store import open_replay

    opened = open_replay(places.find_replay(replay, quiet=quiet))
    source = trace_of(opened, trace)
    with console.working("loading torch", quiet=quiet):
        from kvscope.replay.rescore import rescore
    path = places.place(places.REPORTS, output, f"{opened.name}-scored", force=force)
    closed = sum(run["loop"] == "closed" for run in opened.info["runs"])
    if closed:
        console.warn(f"{closed} runs of the closed loop are left out: what they paid attention to is not recorded")
    tokens = sum(sequence.length for sequence in source.sequences)
    with console.bar("scoring", tokens, "tokens", quiet=quiet) as update:
        made = rescore(
            opened,
            source,
            metric,
            output=path,
            device=device,
            progress=lambda share: update(share * tokens),
            command=command_line(ctx),
            force=force,
        )
    show(made.summary, made.info, title=str(path), as_json=json)
