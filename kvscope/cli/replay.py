"""``kvscope replay``: which keys policies would have retained of a trace, and how faithful that is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from kvscope.cli.answer_options import AnswerScore, AnswerTokens, Generate
from kvscope.cli.cache_option import Cache, Merge
from kvscope.cli.command import command, examples
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
from kvscope.cli.table_options import Columns, Sort, TableOptions, Top, Wide
from kvscope.core.options import (
    ClosedLoopOptions,
    GenerateOptions,
    OutputOptions,
    PlanOptions,
    Positions,
    Prefill,
    ReplayOptions,
)

if TYPE_CHECKING:
    from kvscope.replay.compile import ReplayJob

EPILOG = f"{PARAMETERS} Without TRACE, the newest complete one under traces/ is used."


@command("replay", order=20, options_metavar="[TRACE] [OPTIONS]", epilog=EPILOG, extra_arguments=True)
@examples(
    "kvscope replay --policy h2o --policy tova --budget 20%,40%",
    "kvscope replay my-trace --policy all --sort output_error --top 10",
)
def replay(
    ctx: typer.Context,
    policy: Policy = None,
    budget: Budget = None,
    prefill: PrefillMode = Prefill.full,
    compress: Compress = None,
    allocate: Allocate = None,
    scope: Scope = None,
    accumulate: Accumulate = None,
    cache: Cache = None,
    merge: Merge = None,
    perplexity: ClosedLoop = False,
    generate: Generate = False,
    max_new_tokens: AnswerTokens = None,
    score: AnswerScore = None,
    positions: PositionsMode = Positions.original,
    model: TracedModel = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    output: ReportOutput = None,
    device: Device = "auto",
    force: Force = False,
    no_verify: NoVerify = False,
    sort: Sort = None,
    top: Top = None,
    columns: Columns = None,
    wide: Wide = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Replay any number of policies and budgets over a trace, in one pass.

    The results go to reports/NAME. The open loop uses the recorded attention, without the effect of an eviction on
    later layers and tokens. The closed loop (--perplexity) includes it. With --generate the model also answers prompts.
    """
    from kvscope.cli import console, places
    from kvscope.cli.parameters import only_word, select
    from kvscope.cli.summary import require_columns

    with console.working("loading torch", quiet=quiet):
        from kvscope.replay.compile import compile_replay
        from kvscope.trace.reader import open_trace

    selected, table = select(ctx, ctx.args, policy, budget, quiet=quiet), TableOptions(sort, top, columns, wide)
    require_columns(table.columns)
    trace = open_trace(places.find_trace(only_word(selected.words), quiet=quiet), compare=not no_verify)
    closed, answers = ClosedLoopOptions(positions, model, dtype, device_map), GenerateOptions(max_new_tokens, score)
    _require_closed_loop(closed, answers, perplexity=perplexity or generate, generate=generate)
    options = ReplayOptions(
        prefill=prefill,
        plan=PlanOptions({}, compress, allocate, accumulate, scope, tuple(cache or ()), tuple(merge or ())),
        closed=closed if perplexity or generate else None,
        generate=answers if generate else None,
        device=device,
        skip_unsupported=selected.everything,
    )
    path = places.place(places.REPORTS, output, f"{trace.name}-{selected.name}", force=force)
    with console.loading("checking the replay", quiet=quiet):
        job = compile_replay(trace, selected.policies, selected.budgets, options)
    _execute(job, OutputOptions(path, force, command_line(ctx)), table, as_json=json, quiet=quiet)


def _execute(job: ReplayJob, output: OutputOptions, table: TableOptions, *, as_json: bool, quiet: bool) -> None:
    """Execute a job with a progress bar, and print the summary."""
    from kvscope.cli import console
    from kvscope.cli.hints import next_report
    from kvscope.cli.skipped import skipped_line
    from kvscope.cli.summary import show
    from kvscope.cli.table_rows import require_metric
    from kvscope.core.output import size

    require_metric(table.sort, job.metric_names)
    if job.skipped:
        console.warn(skipped_line(job.skipped, job.remedies))
    needs, tokens = job.footprint, sum(sequence.length for sequence in job.open.trace.sequences)
    console.note(f"needs about {size(needs.bytes)} of memory, for {needs.layers} layers at a time", quiet=quiet)
    with console.bar("replaying", tokens, "tokens", quiet=quiet) as update:
        made = job.execute(output, lambda share: update(share * tokens))
    show(made, as_json=as_json, table=table)
    console.note(next_report(output.path), quiet=quiet)


def _require_closed_loop(
    closed: ClosedLoopOptions, answers: GenerateOptions, *, perplexity: bool, generate: bool
) -> None:
    """Raise UsageError for options of the closed loop without it, and for those of --generate without it."""
    from kvscope.core.errors import UsageError

    if closed != ClosedLoopOptions() and not perplexity:
        raise UsageError("--model, --dtype, --device-map and --positions need the closed loop", "Add --perplexity.")
    if answers != GenerateOptions() and not generate:
        raise UsageError("--max-new-tokens and --score need generated answers", "Add --generate.")
