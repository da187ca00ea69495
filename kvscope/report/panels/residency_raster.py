"""Residency raster: which keys were held at which step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from kvscope.report.encoding import packed, packed_bytes, visible_token
from kvscope.report.panel import panel
from kvscope.report.source import ReportInput, Run
from kvscope.results.store import Replay

NEVER = -1  # the `leave` of a key that is held to the end


@panel(
    "residency",
    title="Residency raster",
    order=40,
    needs=("residency",),
    help="Each row is a token, each column a step: blue where the token's key is still held after the step, sand or "
    "brown where it has been evicted, empty before it exists. Long blue rows are tokens that the policy holds on to, "
    "and an edge that runs parallel to the diagonal is a window moving on.",
)
def residency_raster(source: ReportInput) -> dict[str, Any]:
    """Return stays of keys per sequence, run and layer as packed integers, as many as the page may carry.

    Layers are added for all runs at a time, spread over the depth of the model, sequence by sequence, so that what
    fits can be compared.
    """
    left = source.limits.raster_bytes
    texts: dict[str, dict[str, Any]] = {}
    rasters: list[dict[str, Any]] = []
    sizes = [replay.info["trace"] for replay in source.replays]
    total = sum(len(size["sequences"]) * len(size["layers"]) for size in sizes)
    shown, full = 0, False
    for index, replay, sequence, layer in _order(source.replays):
        made = _layer(source, index, replay, sequence, layer)
        name = f"{index}.{sequence}"
        text = texts.get(name) or _sequence(source, replay, sequence)
        cost = sum(each.pop("bytes") for each in made)
        if name not in texts:
            cost += sum(len(token) for token in text["tokens"] or ())
        if cost > left:
            full = True
            break
        left -= cost
        shown += 1
        texts[name] = text
        rasters += made
    return {
        "sequences": texts,
        "runs": [{"id": run.id, "name": source.name_of(run), "prefill": run.protocol[2]} for run in source.runs],
        "first": next((run.id for run in source.ranking if run.budget is not None), None),
        "rasters": rasters,
        "notes": _notes(source, texts, shown, total, full),
    }


def _order(replays: Sequence[Replay]) -> Iterator[tuple[int, Replay, int, int]]:
    """Yield number and replay, sequence and layer: first sequences first, layers spread over the depth."""
    most = max(len(replay.info["trace"]["sequences"]) for replay in replays)
    for sequence in range(most):
        depth = max(len(replay.info["trace"]["layers"]) for replay in replays)
        for place in range(depth):
            for index, replay in enumerate(replays):
                trace = replay.info["trace"]
                if sequence < len(trace["sequences"]) and place < len(trace["layers"]):
                    yield index, replay, sequence, spread(trace["layers"])[place]


def spread(layers: Sequence[int]) -> list[int]:
    """Return layers in an order in which every beginning is spread over the depth: first, last, middle, quarters."""
    order, queue = [0, len(layers) - 1], [(0, len(layers) - 1)]
    while queue:
        low, high = queue.pop(0)
        if high - low > 1:
            middle = (low + high) // 2
            order.append(middle)
            queue += [(low, middle), (middle, high)]
    return [int(layers[place]) for place in dict.fromkeys(order)]


def _layer(source: ReportInput, index: int, replay: Replay, sequence: int, layer: int) -> list[dict[str, Any]]:
    """Return the rasters of every run in one layer, read at once."""
    trace = replay.info["trace"]
    length, heads = int(trace["sequences"][sequence]["length"]), int(trace["kv_heads"])
    frame = replay.residency(sequence=sequence, layer=layer)
    by_run = dict(iter(frame.groupby("run")))
    return [
        {
            "run": run.id,
            "sequence": f"{index}.{sequence}",
            "layer": layer,
            **stays(by_run[run.number], heads, length),
        }
        for run in _of(source, replay)
        if run.number in by_run
    ]


def _of(source: ReportInput, replay: Replay) -> list[Run]:
    return [run for run in source.runs if run.replay is replay]


def stays(frame: pd.DataFrame, heads: int, length: int) -> dict[str, Any]:
    """Return the stays of one layer, packed.

    Where every key of every head stays once, from its own position on, ``leave`` alone is given, head by head and key
    by key. Otherwise ``counts`` says how many stays each head has, and ``key``, ``enter`` and ``leave`` give them. If
    all heads agree, one of them is given.

    Parameters
    ----------
    frame : DataFrame
        Columns ``kv_head``, ``key``, ``enter``, ``leave``; ``leave`` is null or negative where the key never left.
    heads, length : int
        ``G`` and ``T``.
    """
    frame = frame.sort_values(["kv_head", "key", "enter"])
    head, key, enter = (frame[name].to_numpy(dtype=np.int64) for name in ("kv_head", "key", "enter"))
    leave = frame["leave"].fillna(NEVER).to_numpy(dtype=np.int64)
    counts = np.bincount(head, minlength=heads)
    columns = {"key": key, "enter": enter, "leave": leave}
    if len(set(counts.tolist())) == 1:
        parts = {name: column.reshape(heads, -1) for name, column in columns.items()}
        if all((part == part[0]).all() for part in parts.values()):
            columns, counts = {name: part[0] for name, part in parts.items()}, counts[:1]
    once = (counts == length).all() and np.array_equal(columns["key"], np.tile(np.arange(length), len(counts)))
    if once and np.array_equal(columns["enter"], columns["key"]):
        columns = {"leave": columns["leave"]}
    arrays = {name: packed(column) for name, column in columns.items()}
    return {
        "heads": heads,
        "stored": len(counts),
        "counts": None if len(arrays) == 1 else counts.tolist(),
        **arrays,
        "bytes": sum(packed_bytes(each) for each in arrays.values()),
    }


def _sequence(source: ReportInput, replay: Replay, sequence: int) -> dict[str, Any]:
    """Return sizes and token texts of a sequence; None for the texts where the trace is absent."""
    info = replay.info["trace"]["sequences"][sequence]
    trace = source.trace_of(replay)
    tokens = None
    if trace is not None:
        frame = trace.tokens(sequence).sort_values("position")
        tokens = ["" if text is None else visible_token(str(text)) for text in frame["text"]]
    return {"prompt": int(info["prompt"]), "length": int(info["length"]), "tokens": tokens}


def _notes(source: ReportInput, texts: dict[str, dict[str, Any]], shown: int, total: int, full: bool) -> list[str]:
    notes = []
    if full:
        limit = source.limits.raster_bytes
        size = f"{limit / 1e6:g} MB" if limit >= 100_000 else f"{limit} bytes"
        notes.append(
            f"{shown} of {total} layers are shown, counted over all sequences and replays: rasters are limited to "
            f"{size}. residency.parquet has all of them."
        )
    for index, replay in enumerate(source.replays):
        if source.trace_of(replay) is None:
            notes.append(f"Token text is missing: the trace of {source.names[index]} is not at hand.")
    return notes
