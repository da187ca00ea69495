"""``kvscope perplexity``: what policies cost on plain text, without a trace."""

from __future__ import annotations

from pathlib import Path

import typer

from kvscope.cli.cache_option import Cache, Merge
from kvscope.cli.command import command, examples
from kvscope.cli.options import (
    Allocate,
    Budget,
    Compress,
    Device,
    DeviceMap,
    Dtype,
    Force,
    Json,
    MaxWindows,
    Model,
    Policy,
    PositionsMode,
    PromptLength,
    Quantize,
    Quiet,
    ReportOutput,
    Revision,
    Scope,
    TextFiles,
    TrustRemoteCode,
    Window,
    command_line,
)
from kvscope.cli.parameters import PARAMETERS
from kvscope.core.options import ModelSource, OutputOptions, PerplexityOptions, PlanOptions, Positions


@command("perplexity", order=30, epilog=PARAMETERS, extra_arguments=True)
@examples(
    "kvscope perplexity book.txt --model demo --policy h2o --policy snapkv",
    "kvscope perplexity book.txt -m llama2-7b -p a2sf:alpha=0.7 -b 10%,20%",
)
def perplexity(
    ctx: typer.Context,
    files: TextFiles,
    model: Model,
    policy: Policy = None,
    budget: Budget = None,
    window: Window = None,
    max_windows: MaxWindows = None,
    prompt_length: PromptLength = 1,
    compress: Compress = None,
    allocate: Allocate = None,
    scope: Scope = None,
    cache: Cache = None,
    merge: Merge = None,
    positions: PositionsMode = Positions.original,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    device: Device = "auto",
    device_map: DeviceMap = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    output: ReportOutput = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure the perplexity of text files under each policy: language modelling with a limited cache.

    The closed loop scores every token, with the cache limited to the budget from the first token on. One pass of the
    model evaluates many policies and budgets.
    """
    from kvscope.cli import console, places
    from kvscope.cli.parameters import select
    from kvscope.cli.summary import show
    from kvscope.core.text_names import text_name

    with console.working("loading transformers", quiet=quiet):
        from kvscope.closed_loop.compile import compile_perplexity

    selected = select(ctx, [*files, *ctx.args], policy, budget, quiet=quiet)  # Typer puts unknown options into files
    texts = [Path(word) for word in selected.words]
    source = ModelSource(model, revision, dtype, device, device_map, trust_remote_code, quantize)
    options = PerplexityOptions(
        plan=PlanOptions({}, compress, allocate, None, scope, tuple(cache or ()), tuple(merge or ())),
        positions=positions,
        window=window,
        max_windows=max_windows,
        prompt=prompt_length,
    )
    stems = places.joined([text_name(text) for text in texts], most=1)
    path = places.place(places.REPORTS, output, f"{stems}-{selected.name}", force=force)
    with console.loading(f"loading {model}", quiet=quiet):
        job = compile_perplexity(source, texts, selected.policies, selected.budgets, options)
    for line in job.notes:
        console.warn(line)
    with console.bar(f"reading with {len(selected.policies)} policies", 100, "%", quiet=quiet) as update:
        made = job.execute(OutputOptions(path, force, command_line(ctx)), lambda share: update(share * 100))
    show(made, as_json=json)
    console.note("next: kvscope report", quiet=quiet)
