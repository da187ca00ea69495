"""``kvscope replay``: what policies would have kept of a trace, and how faithful that is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kvscope.cli.command import command
from kvscope.cli.options import (
    Accumulate,
    Allocate,
    Budget,
    Compress,
    Device,
    DeviceMap,
    Dtype,
    Force,
    Json,
    Policy,
    PositionsMode,
    PrefillMode,
    Quiet,
    ReportOutput,
    TracedModel,
    command_line,
)
from kvscope.cli.parameters import PARAMETERS
from kvscope.core.options import Positions, Prefill

if TYPE_CHECKING:
    from kvscope.replay.footprint import Footprint

EPILOG = f"{PARAMETERS} Without TRACE, the newest whole one under traces/ is taken."


@command("replay", order=20, options_metavar="[TRACE] [OPTIONS]", epilog=EPILOG, extra_arguments=True)
def replay(
    ctx: typer.Context,
    policy: Policy = None,
    budget: Budget = None,
    prefill: PrefillMode = Prefill.full,
    compress: Compress = None,
    allocate: Allocate = None,
    accumulate: Accumulate = None,
    perplexity: Annotated[
        bool,
        typer.Option("--perplexity", help="Run the model again with the policies inside: the closed loop."),
    ] = False,
    positions: PositionsMode = Positions.original,
    model: TracedModel = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    output: ReportOutput = None,
    device: Device = "cpu",
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Replay any number of policies and budgets over a trace, in one pass.

    The results go to reports/NAME and a summary is printed. In the open loop each layer sees the recorded attention, so
    what an eviction would do to later layers and tokens is not part of it; --perplexity adds the closed loop, in which
    it is.
    """
    from kvscope.cli import console, places
    from kvscope.cli.parameters import named_policies, options_of, split
    from kvscope.cli.summary import show
    from kvscope.core.budget import parse_budgets
    from kvscope.core.errors import UsageError
    from kvscope.core.output import size

    with console.working("loading torch", quiet=quiet):
        from kvscope.closed_loop.options import ClosedLoopOptions
        from kvscope.replay.run import replay as run
        from kvscope.replay.run import supported_policies
        from kvscope.trace.reader import open_trace

    words, params = split(ctx.args)
    if len(words) > 1:
        raise UsageError(f"two traces: {words[0]} and {words[1]}", "Replay one trace at a time: kvscope replay TRACE")
    chosen = named_policies(policy or [], params, options_of(ctx))
    budgets = parse_budgets(",".join(budget) if budget else "20%")
    if not budget:
        console.note("budget: 20% (the default)", quiet=quiet)
    trace = open_trace(places.find_trace(words[0] if words else None, quiet=quiet))
    closed = ClosedLoopOptions(positions, model, dtype, device_map) if perplexity else None
    if closed is None and (model or device_map or dtype != "auto" or positions is not Positions.original):
        raise UsageError(
            "--model, --dtype, --device-map and --positions are about the closed loop", "Add --perplexity."
        )
    if "all" in (policy or []):
        plan = {"compress": compress, "allocate": allocate, "accumulate": accumulate}
        chosen, left = supported_policies(trace, chosen, budgets, prefill, closed, **plan)
        for why in left.values():
            console.warn(f"left out of all: {why}")
    names = "all" if policy == ["all"] else places.joined(list(dict.fromkeys(item.name for item in chosen)))
    path = places.place(places.REPORTS, output, f"{trace.name}-{names}", force=force)
    tokens = sum(sequence.length for sequence in trace.sequences)

    def say(needs: Footprint) -> None:
        console.note(f"about {size(needs.bytes)} of memory for {needs.layers} layers at a time", quiet=quiet)

    with console.bar("replaying", tokens, "tokens", quiet=quiet) as update:
        made = run(
            trace,
            chosen,
            budgets,
            output=path,
            prefill=prefill,
            compress=compress,
            allocate=allocate,
            accumulate=accumulate,
            closed=closed,
            announce=say,
            device=device,
            progress=lambda share: update(share * tokens),
            command=command_line(ctx),
            force=force,
        )
    show(made.summary, made.info, title=str(path), as_json=json)
    console.note("next: kvscope report", quiet=quiet)
