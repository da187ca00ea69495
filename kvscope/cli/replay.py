"""``kvscope replay``: which keys policies would have retained of a trace, and how faithful that is."""

from __future__ import annotations

import typer

from kvscope.cli.command import command
from kvscope.cli.options import (
    Accumulate,
    Allocate,
    Budget,
    ClosedLoop,
    Compress,
    Device,
    DeviceMap,
    Dtype,
    Force,
    Json,
    NoVerify,
    Policy,
    PositionsMode,
    PrefillMode,
    Quiet,
    ReportOutput,
    Scope,
    TracedModel,
    command_line,
)
from kvscope.cli.parameters import PARAMETERS
from kvscope.core.options import ClosedLoopOptions, OutputOptions, PlanOptions, Positions, Prefill, ReplayOptions

EPILOG = f"{PARAMETERS} Without TRACE, the newest complete one under traces/ is used."


@command("replay", order=20, options_metavar="[TRACE] [OPTIONS]", epilog=EPILOG, extra_arguments=True)
def replay(
    ctx: typer.Context,
    policy: Policy = None,
    budget: Budget = None,
    prefill: PrefillMode = Prefill.full,
    compress: Compress = None,
    allocate: Allocate = None,
    scope: Scope = None,
    accumulate: Accumulate = None,
    perplexity: ClosedLoop = False,
    positions: PositionsMode = Positions.original,
    model: TracedModel = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    output: ReportOutput = None,
    device: Device = "auto",
    force: Force = False,
    no_verify: NoVerify = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Replay any number of policies and budgets over a trace, in one pass.

    The results go to reports/NAME and a summary is printed. The open loop uses the recorded attention, so it does not
    include the effect of an eviction on later layers and tokens; the closed loop, with --perplexity, does.
    """
    from kvscope.cli import console, places
    from kvscope.cli.hints import next_report
    from kvscope.cli.parameters import only_word, select
    from kvscope.cli.summary import show
    from kvscope.core.output import size

    with console.working("loading torch", quiet=quiet):
        from kvscope.replay.compile import compile_replay
        from kvscope.trace.reader import open_trace

    selected = select(ctx, ctx.args, policy, budget, quiet=quiet)
    trace = open_trace(places.find_trace(only_word(selected.words), quiet=quiet), compare=not no_verify)
    closed = ClosedLoopOptions(positions, model, dtype, device_map)
    _require_closed_loop(closed, perplexity)
    options = ReplayOptions(
        prefill=prefill,
        plan=PlanOptions(compress=compress, allocate=allocate, accumulate=accumulate, scope=scope),
        closed=closed if perplexity else None,
        device=device,
        skip_unsupported=selected.everything,
    )
    path = places.place(places.REPORTS, output, f"{trace.name}-{selected.name}", force=force)
    with console.working("checking the replay", quiet=quiet):
        job = compile_replay(trace, selected.policies, selected.budgets, options)
    for why in job.skipped.values():
        console.warn(f"skipped: {why}")
    needs, tokens = job.footprint, sum(sequence.length for sequence in trace.sequences)
    console.note(f"about {size(needs.bytes)} of memory, for {needs.layers} layers at a time", quiet=quiet)
    with console.bar("replaying", tokens, "tokens", quiet=quiet) as update:
        made = job.execute(OutputOptions(path, force, command_line(ctx)), lambda share: update(share * tokens))
    show(made, as_json=json)
    console.note(next_report(path), quiet=quiet)


def _require_closed_loop(closed: ClosedLoopOptions, perplexity: bool) -> None:
    """Raise UsageError for options of the closed loop without --perplexity."""
    from kvscope.core.errors import UsageError

    if closed != ClosedLoopOptions() and not perplexity:
        raise UsageError("--model, --dtype, --device-map and --positions need the closed loop", "Add --perplexity.")
