"""``kvscope replay``: what policies would have kept of a trace, and how faithful that is."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from kvscope.cli.options import Device, Force, Json, Quiet, command_line

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvscope.policies import Policy

EPILOG = (
    "Any other --NAME VALUE sets a parameter of every named policy that has it, as in --alpha 0.7; "
    "'kvscope policies' lists them. --policy a2sf:alpha=0.7,recent=16 sets it for one. "
    "Without TRACE, the newest whole one under traces/ is taken."
)


class Prefill(StrEnum):
    """What happens during the prompt."""

    full = "full"
    stream = "stream"


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

    The results go to reports/NAME and a summary is printed. The replay is open loop: each layer sees the recorded
    attention, so what an eviction would do to later layers and tokens is not part of it.
    """
    from kvscope.budget import parse_budgets
    from kvscope.cli import console, places
    from kvscope.cli.summary import show

    with console.working("loading torch", quiet=quiet):
        from kvscope.replay.run import able
        from kvscope.replay.run import replay as run
        from kvscope.trace.reader import open_trace

    given, params = split(ctx.args)
    chosen = _policies(policy or [], params, [flag for item in ctx.command.params for flag in item.opts])
    budgets = parse_budgets(",".join(budget) if budget else "20%")
    if not budget:
        console.note("budget: 20% (the default)", quiet=quiet)
    trace = open_trace(places.find_trace(given, quiet=quiet))
    if "all" in (policy or []):
        chosen, left = able(
            trace, chosen, budgets, prefill.value, compress=compress, allocate=allocate, accumulate=accumulate
        )
        for why in left.values():
            console.warn(f"left out of all: {why}")
    names = "all" if policy == ["all"] else places.joined(list(dict.fromkeys(item.name for item in chosen)))
    path = places.place(places.REPORTS, output, f"{trace.name}-{names}", force=force)
    tokens = sum(sequence.length for sequence in trace.sequences)
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
            device=device,
            progress=lambda share: update(share * tokens),
            command=command_line(ctx),
            force=force,
        )
    show(made.summary, made.info, title=str(path), as_json=json)
    console.note("next: kvscope report", quiet=quiet)


def split(arguments: Sequence[str]) -> tuple[str | None, dict[str, str]]:
    """Return the trace and the policy parameters of what Typer did not know.

    Raises
    ------
    UsageError
        For a flag without a value, a flag given twice, or a second trace.
    """
    from kvscope.errors import UsageError

    trace: str | None = None
    params: dict[str, str] = {}
    left = list(arguments)
    while left:
        word = left.pop(0)
        if not word.startswith("-") or word == "-":
            if trace is not None:
                raise UsageError(f"two traces: {trace} and {word}", "Replay one trace at a time: kvscope replay TRACE")
            trace = word
            continue
        name, equals, value = word.partition("=")
        if not name.startswith("--") or len(name) == 2:
            raise UsageError(f"no option {name}", "See: kvscope replay --help, and kvscope policies")
        if not equals:
            if not left or left[0].startswith("--"):
                raise UsageError(f"{name} has no value", f"Write {name} VALUE. Parameters: kvscope policies")
            value = left.pop(0)
        key = name.removeprefix("--").replace("-", "_")
        if key in params:
            raise UsageError(f"{name} is given twice", "Set it for one policy with --policy NAME:parameter=value")
        params[key] = value
    return trace, params


def _policies(specs: Sequence[str], params: dict[str, str], own: Sequence[str]) -> list[Policy]:
    """Return the policies that the command line names; a misspelt option, one of `own`, is told from a parameter."""
    import difflib

    from kvscope.errors import UsageError
    from kvscope.policies import POLICIES
    from kvscope.policies.spec import parse_policies

    if not specs:
        raise UsageError(
            "no policy is named",
            f"Name one or more: --policy {' --policy '.join(POLICIES.names()[:2])}, or --policy all",
        )
    names = [name for spec in specs for name in (POLICIES.names() if spec == "all" else [spec])]
    try:
        return parse_policies(names, params)
    except UsageError as error:
        for flag in ("--" + name.replace("_", "-") for name in params):
            close = difflib.get_close_matches(flag, own, n=1, cutoff=0.75)
            if close and flag in error.what:
                raise UsageError(error.what, f"Did you mean {close[0]}?") from None
        raise
