"""Residency raster: which keys were held at which step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import pandas as pd

from kvscope.report.encoding import packed, packed_bytes, visible_token
from kvscope.report.panel import panel
from kvscope.report.source import ReportInput
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
    fits can be compared. Where not even one layer fits, it has the runs that do.
    """
    texts, rasters, notes = _fill(source)
    for name, replay in zip(source.names, source.replays, strict=True):
        if source.trace_of(replay) is None:
            notes.append(f"Token text is missing: the trace of {name} is not at hand.")
    return {
        "sequences": texts,
        "runs": [{"id": run.id, "name": source.name_of(run), "prefill": run.protocol[2]} for run in source.runs],
        "first": next((run.id for run in source.ranking if run.budget is not None), None),
        "rasters": rasters,
        "notes": notes,
    }


def _fill(source: ReportInput) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]], list[str]]:
    """Return texts by sequence, rasters, and what is to be said of those that do not fit."""
    left = source.limits.raster_bytes
    texts: dict[str, dict[str, Any]] = {}
    rasters: list[dict[str, Any]] = []
    layers = list(_order(source.replays))
    for shown, (index, replay, sequence, layer) in enumerate(layers):
        name = f"{index}.{sequence}"
        text = texts.get(name) or _sequence(source, replay, sequence)
        left -= 0 if name in texts else sum(len(token.encode()) for token in text["tokens"] or ())
        made = _layer(source, index, replay, sequence, layer)
        fitting = _fitting(made, left)
        left -= sum(each.pop("bytes") for each in made[:fitting])
        if fitting == len(made) or (not rasters and fitting):
            texts[name] = text
            rasters += made[:fitting]
        if fitting < len(made):
            what = f"{shown} of {len(layers)} layers are shown"
            if shown == 0:
                what = f"{fitting} of {len(made)} runs are shown, in 1 of {len(layers)} layers"
            return texts, rasters, [f"{what}: {_limit(source)}"]
    return texts, rasters, []


def _fitting(made: Sequence[dict[str, Any]], left: int) -> int:
    """Return how many rasters, from the first on, fit into `left` bytes."""
    return sum(total <= left for total in accumulate(each["bytes"] for each in made))


def _limit(source: ReportInput) -> str:
    limit = source.limits.raster_bytes
    size = f"{limit / 1e6:g} MB" if limit >= 100_000 else f"{limit} bytes"
    return f"rasters of all layers, sequences and replays are limited to {size}. residency.parquet has all of them."


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
    """Return the rasters of every run in one layer, read at once, in the order of `ReportInput.ranking`."""
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
        for run in source.ranking
        if run.replay is replay and run.number in by_run
    ]


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
