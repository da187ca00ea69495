"""``kvscope perplexity``: what policies cost on plain text, without a trace."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvscope.cli.command import command
from kvscope.cli.options import (
    Allocate,
    Budget,
    Compress,
    Device,
    DeviceMap,
    Dtype,
    Force,
    Json,
    Model,
    Policy,
    PositionsMode,
    Quiet,
    ReportOutput,
    Revision,
    TrustRemoteCode,
    command_line,
)
from kvscope.cli.parameters import PARAMETERS
from kvscope.core.options import Positions


@command("perplexity", order=30, epilog=PARAMETERS, extra_arguments=True)
def perplexity(
    ctx: typer.Context,
    files: Annotated[list[str], typer.Argument(metavar="TEXT", help="UTF-8 text files.", show_default=False)],
    model: Model,
    policy: Policy = None,
    budget: Budget = None,
    window: Annotated[
        int | None,
        typer.Option(metavar="TOKENS", help="Each starts with an empty cache. Default: 1024, or the context.", min=2),
    ] = None,
    max_windows: Annotated[
        int | None, typer.Option(metavar="N", help="Windows of each file. Default: all.", min=1)
    ] = None,
    prompt_length: Annotated[
        int, typer.Option(metavar="TOKENS", help="Read with the full cache first in each window, unscored.", min=1)
    ] = 1,
    compress: Compress = None,
    allocate: Allocate = None,
    positions: PositionsMode = Positions.original,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    device_map: DeviceMap = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    output: ReportOutput = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure what policies cost in perplexity on text files: language modelling under a cache limit.

    Every token is scored in the closed loop while the cache is held to the budget from the first token on. Many
    policies and budgets ride in one pass of the model.
    """
    from kvscope.cli import console, places
    from kvscope.cli.parameters import named_policies, options_of, split
    from kvscope.cli.summary import show
    from kvscope.core.budget import parse_budgets

    with console.working("loading transformers", quiet=quiet):
        from kvscope.closed_loop.perplexity import perplexity as run

    words, params = split([*files, *ctx.args])  # what Typer does not know lands among the files
    texts = [Path(word) for word in words]
    chosen = named_policies(policy or [], params, options_of(ctx))
    budgets = parse_budgets(",".join(budget) if budget else "20%")
    if not budget:
        console.note("budget: 20% (the default)", quiet=quiet)
    names = "all" if policy == ["all"] else places.joined(list(dict.fromkeys(item.name for item in chosen)))
    stems = places.joined([text.stem for text in texts], most=1)
    path = places.place(places.REPORTS, output, f"{stems}-{names}", force=force)
    with console.bar(f"reading with {len(chosen)} policies", 100, "%", quiet=quiet) as update:
        made = run(
            model,
            texts,
            chosen,
            budgets,
            output=path,
            window=window,
            max_windows=max_windows,
            prompt=prompt_length,
            compress=compress,
            allocate=allocate,
            positions=positions,
            dtype=dtype,
            device=device,
            device_map=device_map,
            revision=revision,
            trust_remote_code=trust_remote_code,
            progress=lambda share: update(share * 100),
            command=command_line(ctx),
            force=force,
        )
    show(made.summary, made.info, title=str(path), as_json=json)
    console.note("next: kvscope report", quiet=quiet)
