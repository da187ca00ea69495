"""``kvscope verify``: compare real decoding with a shortened cache with the closed loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from kvscope.cli.cache_option import Cache, Merge
from kvscope.cli.command import command, examples
from kvscope.cli.options import (
    Allocate,
    Budget,
    Compress,
    DecodedTokens,
    Device,
    Dtype,
    FirstSequences,
    Json,
    NoVerify,
    Policy,
    PositionsMode,
    PrefillMode,
    Quiet,
    Scope,
    TracedModel,
)
from kvscope.cli.parameters import PARAMETERS
from kvscope.core.errors import ExitStatus
from kvscope.core.options import ClosedLoopOptions, PlanOptions, Positions, Prefill, VerifyOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvscope.closed_loop.verify import Verdict


@command("verify", order=40, options_metavar="[TRACE] [OPTIONS]", epilog=PARAMETERS, extra_arguments=True)
@examples(
    "kvscope verify --policy h2o",
    "kvscope verify my-trace --policy tova --budget 30% --tokens 64",
)
def verify(
    ctx: typer.Context,
    policy: Policy = None,
    budget: Budget = None,
    prefill: PrefillMode = Prefill.full,
    compress: Compress = None,
    allocate: Allocate = None,
    scope: Scope = None,
    cache: Cache = None,
    merge: Merge = None,
    positions: PositionsMode = Positions.original,
    tokens: DecodedTokens = 128,
    sequences: FirstSequences = 1,
    model: TracedModel = None,
    dtype: Dtype = "float64",
    device: Device = "auto",
    no_verify: NoVerify = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Decode token by token with a cache from which keys are removed, and compare with the closed loop.

    Both must hold the same keys at every step and give the same logits; then the perplexities of the closed loop are
    those of real decoding. Any policy that evicts can be verified, including one from your own file.
    """
    from kvscope.cli import console, places
    from kvscope.cli.parameters import only_word, select

    with console.working("loading transformers", quiet=quiet):
        from kvscope.closed_loop.compile import compile_verify
        from kvscope.trace.reader import open_trace

    selected = select(ctx, ctx.args, policy, budget, quiet=quiet)
    trace = open_trace(places.find_trace(only_word(selected.words), quiet=quiet), compare=not no_verify)
    options = VerifyOptions(
        prefill=prefill,
        plan=PlanOptions({}, compress, allocate, None, scope, tuple(cache or ()), tuple(merge or ())),
        closed=ClosedLoopOptions(positions, model, dtype),
        tokens=tokens,
        sequences=sequences,
        device=device,
    )
    with console.loading("loading the model", quiet=quiet):
        job = compile_verify(trace, selected.policies, selected.budgets, options)
    with console.bar("decoding", 100, "%", quiet=quiet) as update:
        found = job.execute(lambda share: update(share * 100))
    _show(found, str(trace.path), as_json=json)
    if any(item.decided and not item.agrees for item in found):
        raise typer.Exit(ExitStatus.difference)


def _show(found: Sequence[Verdict], title: str, *, as_json: bool) -> None:
    from dataclasses import asdict

    from kvscope.cli.console import Column, show_json, show_table

    if as_json:
        rows = [{**asdict(item), "agrees": item.agrees} for item in found]
        show_json({"verdicts": rows, "agrees": all(item.agrees for item in found)})
        return
    columns = [
        Column("policy", [item.label for item in found], wrap=16),
        Column("budget", [item.budget or "-" for item in found], numeric=True),
        Column("keys", [str(item.keys) for item in found], keep=60, numeric=True),
        Column("largest\ncache", [str(item.largest_cache) for item in found], keep=50, numeric=True),
        Column("sequence", [str(item.sequence) for item in found], keep=10, numeric=True),
        Column("tokens", [str(item.tokens) for item in found], keep=30, numeric=True),
        Column("same\nevictions", [_share(item) for item in found], numeric=True),
        Column("logits\ndiffer by", [f"{item.logit_difference:.1e}" for item in found], numeric=True),
        Column("verdict", [_verdict(item) for item in found]),
    ]
    notes = ["The closed loop, compared with token-by-token decoding in which evicted keys are removed from the cache."]
    if not all(item.decided for item in found):
        notes.append(
            "Below float64, rounding can change a decision and those that follow, so agreement is reported but not "
            "required."
        )
    own = max((item.model_difference for item in found if item.model_differs), default=None)
    if own is not None:
        notes.append(
            f"With a full cache, the model's own decoding gives logits that differ by {own:.1e} from those of one "
            f"pass over the text, so the perplexities of the closed loop are not those of its decoding."
        )
    show_table(columns, title=title, notes=notes)


def _share(item: Verdict) -> str:
    if not item.different:
        return "all"
    return f"{1 - item.different / item.decisions:.2%}"


def _verdict(item: Verdict) -> str:
    if item.model_differs:
        return "the model differs from itself"
    if item.agrees:
        return "equal"
    if item.different:
        return f"differs from step {item.first_difference}" + ("" if item.decided else " (rounding?)")
    return "same keys, other logits" if item.decided else "same keys"
