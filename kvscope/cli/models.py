"""``kvscope models``: which models can be traced, and what one of them would take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kvscope.cli.command import command, examples
from kvscope.cli.options import Json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvscope.cli.console import Column
    from kvscope.model.known_types import TypeRecord
    from kvscope.model.model_facts import ModelFacts
    from kvscope.trace.layer_records import LayerHeads


@command("models", order=145)
@examples(
    "kvscope models",
    "kvscope models llama2-7b",
)
def models(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="A type of transformers, or a model: an alias, a folder or a Hub id.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """List the types of models and what works with each, or describe one type or model; no weights are loaded."""
    from dataclasses import asdict

    from kvscope.cli import console
    from kvscope.model.known_types import known_types, type_of

    if name is None:
        from kvscope.model.names import ALIASES

        rows = list(known_types().values())
        if json:
            console.show_json({"aliases": ALIASES, "types": [asdict(row) for row in rows]})
            return
        console.show_pairs(sorted(ALIASES.items()), title="short names")
        console.show_text("")
        console.show_table(columns(rows), title="types of models", notes=NOTES)
        return
    known = type_of(name)
    if known is not None:
        shown, pairs = asdict(known), _of_type(known)
    else:
        facts = _facts(name, quiet=json)
        shown, pairs = facts.plain, _of_model(facts)
    if json:
        console.show_json(shown)
    else:
        console.show_pairs(pairs, title=name)


def _facts(name: str, *, quiet: bool) -> ModelFacts:
    from kvscope.cli import console

    with console.working("loading transformers", quiet=quiet):
        from kvscope.model.model_facts import model_facts
    return model_facts(name)


NOTES = [
    "rows: recomputed from queries and keys, with all signals; module rows: returned by the model's modules.",
    "Each type was tried with a tiny random model. kvscope models NAME describes one type or model.",
]


def columns(rows: Sequence[TypeRecord]) -> list[Column]:
    """Return the columns of the list of types."""
    from kvscope.cli.console import Column

    return [
        Column("type", [row.name for row in rows]),
        Column("trace", [row.trace for row in rows]),
        Column("open loop", [row.replay for row in rows], keep=40),
        Column("closed loop", [row.closed for row in rows]),
        Column("verify", [row.verify for row in rows], keep=50),
        Column("remark", [row.remark or "-" for row in rows], keep=10, wrap=30),
    ]


def _of_type(row: TypeRecord) -> list[tuple[str, str]]:
    return [
        ("trace", row.trace),
        ("open loop", row.replay),
        ("closed loop", row.closed),
        ("verify", row.verify),
        ("remark", row.remark or "-"),
    ]


def _heads_of(facts: ModelFacts) -> LayerHeads:
    from kvscope.trace.layer_records import LayerHeads

    return LayerHeads(facts.heads, facts.kv_heads, facts.head_dim)


def _windows(facts: ModelFacts) -> str:
    """Return which layers have a sliding window, and of how many keys."""
    of_size: dict[int, list[str]] = {}
    for layer, window in enumerate(facts.windows):
        if window is not None:
            of_size.setdefault(window, []).append(str(layer))
    every = sum(map(len, of_size.values())) == len(facts.windows)
    return "; ".join(
        f"{window:,} keys in " + ("every layer" if every and len(of_size) == 1 else f"layers {', '.join(layers)}")
        for window, layers in of_size.items()
    )


def _of_model(facts: ModelFacts) -> list[tuple[str, str]]:
    from kvscope.core.output import size
    from kvscope.trace.layer_records import heads_text

    others = facts.layers - facts.attention_layers
    reading = f", {facts.reading_layers} of them read the cache of an earlier one" if facts.reading_layers else ""
    return [
        ("model", facts.source + (f", an adapter of {facts.base}" if facts.base else "")),
        ("type", facts.type.name),
        *_of_type(facts.type),
        ("layers", f"{facts.layers}" + (f", {others} of them without a cache to evict" if others else "") + reading),
        ("heads", heads_text(dict(enumerate(facts.layer_heads)) or {0: _heads_of(facts)})),
        *([("windows", _windows(facts))] if facts.windows else []),
        ("cache", f"{size(facts.cache_bytes)} per token in 16 bit"),
        ("trace size", f"about {size(facts.trace_bytes)} for 1,000 tokens with --store maps"),
    ]
