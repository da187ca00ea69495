"""What a recording will be, before it starts: which layers and heads, how many bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvscope.core.errors import UsageError
from kvscope.model.loading import Loaded
from kvscope.model.pipeline import IN_FLIGHT
from kvscope.model.selfcheck import AttentionFacts
from kvscope.trace.record import TraceHeader
from kvscope.trace.schema import STORES, TOP
from kvscope.trace.space import estimate_bytes, free_bytes


@dataclass(frozen=True)
class RecordingPlan:
    """What a recording will be.

    Attributes
    ----------
    path : Path
        Where.
    bytes, free : int
        Bytes that it takes about, and that are free there.
    others : dict of str to int
        Bytes that the other stores would take about.
    sequences, tokens : int
        How many, at most.
    prefill_chunk : int or None
        Tokens of a prompt that go through the model at a time, where one has more than that.
    in_flight : int
        Bytes that wait to be written at most, beside what files collect for a block of rows.
    """

    path: Path
    bytes: int
    free: int
    others: dict[str, int]
    sequences: int
    tokens: int
    prefill_chunk: int | None
    in_flight: int = IN_FLIGHT


def planned(path: Path, known: TraceHeader, lengths: list[int], hidden: int) -> RecordingPlan:
    """Return what a recording will be: sequences of at most so many tokens, layer inputs of so many numbers."""
    inputs = ("hidden",) if "hidden" in known.stored else ()
    sizes = {
        store: estimate_bytes(
            layers=len(known.layers),
            heads=known.heads,
            kv_heads=known.kv_heads,
            head_dim=known.head_dim,
            lengths=lengths,
            stored=(*stored, *inputs),
            hidden=hidden,
            top=known.top or TOP,
            query_stride=known.query_stride,
            number_bytes=2 if known.model.dtype in ("float16", "bfloat16") else 4,
        )
        for store, stored in STORES.items()
    }
    needed = sizes.pop(known.store)
    return RecordingPlan(path, needed, free_bytes(path), sizes, len(lengths), sum(lengths), known.prefill_chunk)


def layers_of(loaded: Loaded, wanted: Sequence[int] | None) -> list[int]:
    """Return the layers to record; raises UsageError if the model lacks one."""
    count = loaded.text_config.num_hidden_layers
    for layer in wanted or []:
        if not 0 <= layer < count:
            raise UsageError(f"no layer {layer} in {loaded.name}", f"Its layers are 0 to {count - 1}.")
    return sorted(set(wanted)) if wanted else list(range(count))


def heads_of(loaded: Loaded, facts: AttentionFacts, wanted: Sequence[int] | None) -> list[int]:
    """Return the query heads to record, none for all.

    Raises
    ------
    UsageError
        If the model lacks one, or heads that share keys and values are not all among them.
    """
    chosen, group = sorted(set(wanted or ())), facts.heads // facts.kv_heads
    for head in chosen:
        if not 0 <= head < facts.heads:
            raise UsageError(f"no query head {head} in {loaded.name}", f"Its heads are 0 to {facts.heads - 1}.")
    whole = sorted({head // group * group + number for head in chosen for number in range(group)})
    if whole != chosen:
        raise UsageError(
            f"heads {_listed(chosen)} split a group of {group} that shares keys and values in {loaded.name}",
            f"Record whole groups: --heads {_listed(whole)}",
        )
    return [] if len(chosen) == facts.heads else chosen


def _listed(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))
