"""Attention inspector: single attention rows with token texts, the keys that a run saw, and the ideal set."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from kvscope.core.json import JsonDict
from kvscope.report.encoding import packed_bytes, packed_halves, rounded
from kvscope.report.panel import panel
from kvscope.report.panels.over_time import bins
from kvscope.report.parts import Part, spread
from kvscope.report.source import ReportInput

STEPS = 64  # evenly spaced steps whose rows are selected for every head
WORST = 5  # evictions of each run whose missed rows are selected
HEAVY = 20  # keys of a head that received the most attention
SINKS = 4  # first positions, where surplus attention gathers

RowIndex = tuple[int, int, int]  # layer, query head, step


@panel(
    "inspector",
    title="Attention rows",
    order=70,
    needs=("residency", "trace"),
    detail=True,
    help="The points are one row of recorded attention, key by key on a logarithmic scale: the keys that the run could "
    "see, the ideal set of the same size, and where the two differ. S marks sinks, the first four positions; H marks "
    "heavy hitters, the keys that received the most attention in this head over the whole sequence.",
)
def inspector(source: ReportInput) -> JsonDict | None:
    """Return as many rows as fit: those that missed an evicted key most, then evenly spaced steps of every head."""
    left = source.limits.row_bytes
    parts: JsonDict = {}
    shown = total = 0
    for part in source.parts.values():
        if part.identity not in source.traces:
            continue
        rows: list[JsonDict] = []
        for row, size in _rows(source, part):
            left -= size
            if left < 0:
                break
            rows.append(row)
        heavy = {str(layer): _heavy(source, part, layer) for layer in source.readable[part.name]}
        parts[part.name] = {"rows": rows, "heavy": heavy}
        shown += len(rows)
        trace = source.traces[part.identity]
        total += sum(trace.heads_of(layer).heads for layer in source.layers_of(part)) * part.length
    if not parts:
        return None
    notes = [f"The page contains {shown:,} of {total:,} attention rows; the trace has all."]
    return {"parts": parts, "sinks": SINKS, "notes": notes}


def _rows(source: ReportInput, part: Part) -> Iterator[tuple[JsonDict, int]]:
    """Yield selected rows as the trace holds them, with the mass that a learned sink takes of each, and their size."""
    trace = source.traces[part.identity]
    sinks = trace.header.learned_sinks

    @lru_cache(maxsize=1)
    def block(layer: int, step: int) -> np.ndarray:
        return trace.attention(part.number, layer, step, step + 1)[:, 0]  # [H, step + 1]

    for layer, head, step in dict.fromkeys(_selected(source, part)):
        weights = packed_halves(block(layer, step)[head])
        missing = rounded(max(0.0, 1.0 - float(trace.row_sums(part.number, layer)[head, step]))) if sinks else 0
        row: JsonDict = {"layer": layer, "head": head, "step": step, "missing": missing, "weights": weights}
        yield row, packed_bytes(weights)


def _selected(source: ReportInput, part: Part) -> Iterator[RowIndex]:
    """Yield layer, query head and step of rows, the most informative first."""
    trace = source.traces[part.identity]
    worst = source.worst(part)
    for place in range(WORST):
        for run in source.runs_of(part):
            for each in worst[run.id][place : place + 1]:
                own = trace.heads_of(each.layer)
                group = own.heads // own.kv_heads
                yield from ((each.layer, each.head * group + query, each.missed) for query in range(group))
    steps = bins(min(part.prompt, part.length - 1), part.length, STEPS)[1:] - 1
    for step in spread(steps.tolist()):
        for layer in spread(source.layers_of(part)):
            yield from ((layer, head, step) for head in range(trace.heads_of(layer).heads))


def _heavy(source: ReportInput, part: Part, layer: int) -> list[list[int]]:
    """Return for each key/value head the keys, sinks aside, that received the most attention in total."""
    received = source.attended(part, layer).received.copy()  # [G, T]
    received[:, :SINKS] = -1
    return [np.sort(np.argsort(-row, kind="stable")[:HEAVY]).tolist() for row in received]
