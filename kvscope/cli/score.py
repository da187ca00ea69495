"""``kvscope score``: compute other metrics of a replay, without replaying it."""

from __future__ import annotations

import typer

from kvscope.cli.command import command, examples
from kvscope.cli.options import (
    Device,
    Force,
    Json,
    Metrics,
    NoVerify,
    Quiet,
    ReplayName,
    ReportOutput,
    TraceSource,
    command_line,
)
from kvscope.core.options import OutputOptions


@command("score", order=60)
@examples(
    "kvscope score",
    "kvscope score my-replay --metric output_error",
)
def score(
    ctx: typer.Context,
    replay: ReplayName = None,
    metric: Metrics = None,
    trace: TraceSource = None,
    output: ReportOutput = None,
    device: Device = "auto",
    force: Force = False,
    no_verify: NoVerify = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compute further metrics from the decisions of a replay and its trace.

    The metrics go to a new replay, REPLAY-scored, with the same decisions. They equal those that the replay itself
    would compute. Runs of the closed loop are skipped, because their attention is not recorded.
    """
    from kvscope.cli import console, places
    from kvscope.cli.runs import trace_of
    from kvscope.cli.summary import show
    from kvscope.results.store import open_replay

    opened = open_replay(places.find_replay(replay, quiet=quiet))
    source = trace_of(opened, trace, compare=not no_verify)
    with console.working("loading torch", quiet=quiet):
        from kvscope.replay.rescore import compile_score
    path = places.place(places.REPORTS, output, f"{opened.name}-scored", force=force)
    job = compile_score(opened, source, metric, device)
    if job.skipped_runs:
        console.warn(f"{job.skipped_runs} runs of the closed loop are skipped, because their attention is not recorded")
    tokens = sum(sequence.length for sequence in source.sequences)
    with console.bar("scoring", tokens, "tokens", quiet=quiet) as update:
        made = job.execute(OutputOptions(path, force, command_line(ctx)), lambda share: update(share * tokens))
    show(made, as_json=json)
