"""``kvscope replay``: what policies would have kept of a trace, and how faithful that is."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from kvscope.cli.command import command
from kvscope.cli.options import Device, Force, Json, Quiet, command_line
from kvscope.cli.parameters import PARAMETERS

if TYPE_CHECKING:
    from kvscope.replay.footprint import Footprint

EPILOG = f"{PARAMETERS} Without TRACE, the newest whole one under traces/ is taken."


class Positions(StrEnum):
    """Which positions keys have in a shortened cache."""

    original = "original"
    compacted = "compacted"


class Prefill(StrEnum):
    """What happens during the prompt."""

    full = "full"
    stream = "stream"


@command("replay", order=20, options_metavar="[TRACE] [OPTIONS]", epilog=EPILOG, extra_arguments=True)
def replay(
    ctx: typer.Context,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            "-p",
            metavar="POLICY",
            help="NAME, NAME:param=value,..., path/to/file.py:Class, or all. Repeatable.",
        ),
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            "--budget",
            "-b",
            metavar="LIST",
            help="Keys or shares: 20%,40%,256. Default: 20%.",
            show_default=False,
        ),
    ] = None,
    prefill: Annotated[
        Prefill,
        typer.Option(help="full: one choice at the end of the prompt. stream: evict from the first token on."),
    ] = Prefill.full,
    compress: Annotated[
        str | None,
        typer.Option(metavar="WHEN", help="prefill, step or every:N. Default: each policy as published."),
    ] = None,
    allocate: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Budget of layers and heads: uniform, pyramid, ada, cake."),
    ] = None,
    accumulate: Annotated[
        str | None,
        typer.Option(metavar="DTYPE", help="Precision of sums: float32, float16, bfloat16."),
    ] = None,
    perplexity: Annotated[
        bool,
        typer.Option("--perplexity", help="Run the model again with the policies inside: the closed loop."),
    ] = False,
    positions: Annotated[
        Positions,
        typer.Option(help="With --perplexity: keys keep their place in the text, or get that in the cache."),
    ] = Positions.original,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="With --perplexity: where the model of the trace is now."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="With --perplexity: auto, float64, float32, float16, bfloat16.")] = "auto",
    device_map: Annotated[str | None, typer.Option(help="With --perplexity: as in transformers.")] = None,
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", "--name", metavar="NAME", help="Name under reports/, or a path."),
    ] = None,
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
    closed = ClosedLoopOptions(positions.value, model, dtype, device_map) if perplexity else None
    if closed is None and (model or device_map or dtype != "auto" or positions is not Positions.original):
        raise UsageError(
            "--model, --dtype, --device-map and --positions are about the closed loop", "Add --perplexity."
        )
    if "all" in (policy or []):
        plan = {"compress": compress, "allocate": allocate, "accumulate": accumulate}
        chosen, left = supported_policies(trace, chosen, budgets, prefill.value, closed, **plan)
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
            prefill=prefill.value,
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
