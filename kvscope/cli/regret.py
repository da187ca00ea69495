"""``kvscope regret``: the evictions that lost most attention, by token, kind of token and lag."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kvscope.cli.command import command, examples
from kvscope.cli.options import Json, NoVerify, Quiet, ReplayName, RunBudget, RunPolicy, TraceSource

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvscope.analysis.find_regrets import RunRegret
    from kvscope.analysis.regret import EvictionRegret, KindRegret, LagRegret, SpanRegret, TokenRegret
    from kvscope.analysis.token_kinds import TokenInContext
    from kvscope.cli.console import Column

LATE = 64  # steps from an eviction to its peak missed attention, from which it counts as late
SHOWN = 8  # tokens listed below the list of evictions
NOTE = (
    "mass: full-cache attention that the key would have received after its eviction, mean over the query heads of its "
    "group. lag: steps from the eviction to its peak missed attention."
)
SUMMARY_NOTE = (
    "lost: share of the full-cache attention on keys that had been evicted, mean over steps and heads. to: of this, "
    "the share by kind of token. lag: of this, what was missed so many steps after the eviction."
)


@command("regret", order=70)
@examples(
    "kvscope regret",
    "kvscope regret my-replay --policy h2o --budget 20% --top 20",
)
def regret(
    replay: ReplayName = None,
    policy: RunPolicy = None,
    budget: RunBudget = None,
    top: Annotated[int, typer.Option(metavar="N", help="List N evictions.", min=1)] = 20,
    trace: TraceSource = None,
    no_verify: NoVerify = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List the evictions that lost most attention: which key, when it was evicted, and when queries missed it most.

    For one run, the command prints its worst evictions, then the lost attention by token, by kind of token and by lag.
    For several runs, it prints one line each.
    """
    from kvscope.analysis.find_regrets import regrets
    from kvscope.cli import console, places
    from kvscope.cli.runs import chosen, how_to_name_one, title, trace_of
    from kvscope.results.store import open_replay

    opened = open_replay(places.find_replay(replay, quiet=quiet))
    runs = chosen(opened, policy, budget)
    source = trace_of(opened, trace, compare=not no_verify)
    tokens = sum(sequence.length for sequence in source.sequences)
    with console.bar("reading", tokens, "tokens", quiet=quiet) as update:
        numbers = [run.run for run in runs]
        found = regrets(opened, source, numbers, top=top, progress=lambda share: update(share * tokens))
    if json:
        console.show_json(found)
    elif len(found["runs"]) == 1:
        _show_run(found["runs"][0], f"{opened.path}: {title(found['runs'][0])}", several=len(source.sequences) > 1)
    else:
        hint = f"For the worst evictions of one run, name it with {how_to_name_one(runs)}."
        console.show_table(summary(found["runs"]), title=str(opened.path), notes=[SUMMARY_NOTE, hint])


def _show_run(run: RunRegret, heading: str, *, several: bool) -> None:
    from kvscope.cli import console

    if not run["worst"]:
        console.show_text(f"{heading}: no evicted key was attended to again.")
        return
    console.show_table(worst(run["worst"], several=several), title=heading, notes=[NOTE])
    console.show_table(by_token(run["tokens"][:SHOWN], several=several), title="tokens, over all layers and heads")
    console.show_table(by_kind(run["kinds"]), title="kinds of tokens")
    if run["spans"]:
        console.show_table(by_span(run["spans"]), title="spans of the prompts")
    console.show_table(by_lag(run["lags"]), title="lags")
    console.show_text(f"{run['per_step']:.2%} of the attention mass at the scored steps falls on evicted keys.")


def summary(runs: Sequence[RunRegret]) -> list[Column]:
    """Return a row for each run: how much attention was lost, to which kinds of tokens, and how much of it late."""
    from kvscope.cli.console import Column
    from kvscope.cli.runs import title

    def share(run: RunRegret, kind: str) -> str:
        return f"{next(each['share'] for each in run['kinds'] if each['kind'] == kind):.0%}"

    late = [sum(each["share"] for each in run["lags"] if each["from"] > LATE - 1) for run in runs]
    most = [run["tokens"][0] if run["tokens"] else None for run in runs]
    return [
        Column("run", [title(run) for run in runs], wrap=20),
        Column("lost\nof all", [f"{run['per_step']:.2%}" for run in runs], numeric=True),
        *(
            Column(f"to\n{kind}", [share(run, kind) for run in runs], keep=keep, numeric=True)
            for kind, keep in (("digits", 80), ("rare", 78), ("punctuation", 70), ("other", 60), ("first", 50))
        ),
        Column(f"lag {LATE}\nor more", [f"{value:.0%}" for value in late], keep=85, numeric=True),
        Column("token with\nmost regret", ["-" if each is None else in_context(each) for each in most], keep=40),
    ]


def worst(evictions: Sequence[EvictionRegret], *, several: bool = False) -> list[Column]:
    """Return a row for each eviction, the one with most regret first."""
    from kvscope.cli.console import Column

    attended = [", ".join(map(str, each["wanted"])) for each in evictions]
    return [
        *_sequence(evictions, several),
        Column("layer", [str(each["layer"]) for each in evictions], numeric=True),
        Column("kv\nhead", [str(each["kv_head"]) for each in evictions], numeric=True),
        Column("key", [str(each["key"]) for each in evictions], numeric=True),
        Column("token", [in_context(each) for each in evictions], wrap=24),
        *_span(evictions),
        Column("evicted\nafter", [str(each["gone"]) for each in evictions], numeric=True),
        Column("missed\nmost at", attended, keep=80, numeric=True),
        Column("weight\nthen", [f"{each['weights'][0]:.3f}" for each in evictions], keep=70, numeric=True),
        Column("lag", [str(each["lag"]) for each in evictions], keep=90, numeric=True),
        Column("mass", [f"{each['mass']:.3f}" for each in evictions], numeric=True),
    ]


def by_token(tokens: Sequence[TokenRegret], *, several: bool = False) -> list[Column]:
    """Return a row for each token, the one with most regret first."""
    from kvscope.cli.console import Column

    return [
        *_sequence(tokens, several),
        Column("key", [str(each["key"]) for each in tokens], numeric=True),
        Column("token", [in_context(each) for each in tokens], wrap=24),
        Column("kind", [each["kind"] for each in tokens], keep=70),
        *_span(tokens),
        Column("heads that\nmissed it", [str(each["heads"]) for each in tokens], keep=60, numeric=True),
        *_amount(tokens),
    ]


def by_kind(kinds: Sequence[KindRegret]) -> list[Column]:
    """Return a row for each kind of token."""
    from kvscope.cli.console import Column

    return [
        Column("kind", [each["kind"] for each in kinds]),
        Column("tokens", [str(each["tokens"]) for each in kinds], keep=70, numeric=True),
        *_amount(kinds),
        Column("mass for\neach token", [f"{each['mass_per_token']:.3f}" for each in kinds], keep=80, numeric=True),
    ]


def by_span(spans: Sequence[SpanRegret]) -> list[Column]:
    """Return a row for the spans of each name: the needles, the questions."""
    from kvscope.cli.console import Column

    return [
        Column("span", [each["name"] for each in spans], wrap=24),
        Column("tokens", [str(each["tokens"]) for each in spans], keep=70, numeric=True),
        *_amount(spans),
        Column("mass for\neach token", [f"{each['mass_per_token']:.3f}" for each in spans], keep=80, numeric=True),
    ]


def by_lag(lags: Sequence[LagRegret]) -> list[Column]:
    """Return a row for each range of lags."""
    from kvscope.cli.console import Column

    return [
        Column("steps since\neviction", [f"{each['from']}-{each['to']}" for each in lags], numeric=True),
        *_amount(lags),
        Column("keys missed\nmost then", [str(each["keys"]) for each in lags], keep=70, numeric=True),
    ]


def in_context(each: TokenInContext) -> str:
    """Return a token between two marks, with the text around it, on one line."""
    text = f"{each['before']}\N{LEFT-POINTING DOUBLE ANGLE QUOTATION MARK}{each['text']}"
    text += f"\N{RIGHT-POINTING DOUBLE ANGLE QUOTATION MARK}{each['after']}"
    return text.replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}")


def _sequence(rows: Sequence[EvictionRegret | TokenRegret], several: bool) -> list[Column]:
    from kvscope.cli.console import Column

    return [Column("sequence", [str(each["sequence"]) for each in rows], numeric=True)] if several else []


def _span(rows: Sequence[EvictionRegret | TokenRegret]) -> list[Column]:
    """Return the column of spans, if a row is in one."""
    from kvscope.cli.console import Column

    there = any(each["span"] is not None for each in rows)
    return [Column("span", [each["span"] or "-" for each in rows], keep=95, wrap=10)] if there else []


def _amount(rows: Sequence[TokenRegret | KindRegret | SpanRegret | LagRegret]) -> list[Column]:
    from kvscope.cli.console import Column

    return [
        Column("mass", [f"{each['mass']:.3f}" for each in rows], numeric=True),
        Column("share", [f"{each['share']:.1%}" for each in rows], numeric=True),
    ]
