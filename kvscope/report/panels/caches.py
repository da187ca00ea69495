"""Quantised caches: bytes of the whole cache against perplexity and right answers, policy by policy."""

from __future__ import annotations

from collections import defaultdict

from kvscope.core.cache_scheme import parse_cache
from kvscope.core.json import Json, JsonDict
from kvscope.core.merge_scheme import parse_merge
from kvscope.report.encoding import rounded
from kvscope.report.panel import panel
from kvscope.report.panels.budget_curve import SIZE
from kvscope.report.runs import RunView
from kvscope.report.source import ReportInput

FULL_PRECISION = "16bit"
OUTCOMES = ("perplexity_ratio", "answer_score")


@panel(
    "caches",
    title="Quantised caches",
    order=18,
    help="Each row is one policy under one budget, each column a format of the cache. A cell has the size of the whole "
    "cache, mean over the steps, the perplexity relative to the full cache in 16 bit, and the share of right answers. "
    "Compare cells of one size: to evict keys, to store all of them in fewer bits, or both.",
)
def caches(source: ReportInput) -> JsonDict | None:
    """Return a row for each policy and budget, with size and outcomes in every cache; None for a single cache.

    Runs of several replays with the same policy, budget and cache are in one cell: one may have perplexity, another
    answers. Where one of them was run in the closed loop, that is shown.
    """
    sized = [run for run in source.ranking if run.mean(SIZE) is not None]
    named = list(dict.fromkeys(run.info.cache or FULL_PRECISION for run in sized))
    if len(named) < 2:
        return None
    closed = any(run.protocol[1] == "closed" for run in sized)
    rows: dict[tuple[str, str | None], dict[str, list[RunView]]] = defaultdict(lambda: defaultdict(list))
    for run in sized:
        if (run.protocol[1] == "closed") == closed:
            rows[_policy(run), run.budget][run.info.cache or FULL_PRECISION].append(run)
    order = sorted(
        named, key=lambda cache: -max(_bytes(run) for run in sized if (run.info.cache or FULL_PRECISION) == cache)
    )
    metrics = [name for name in OUTCOMES if any(run.mean(name) is not None for run in sized)]
    made: list[Json] = [
        {"policy": policy, "budget": budget, "cells": [_cell(cells.get(cache, []), metrics) for cache in order]}
        for (policy, budget), cells in sorted(
            rows.items(), key=lambda row: (row[0][1] is not None, row[0][0], _keys(row[1]))
        )
    ]
    return {"caches": list(order), "metrics": list(metrics), "rows": made[: source.limits.rows]}


def _policy(run: RunView) -> str:
    """Return the label without the cache, which is its last part but for a merging rule."""
    if run.info.cache is None:
        return run.label
    rule = "" if run.info.merge is None else f" + {parse_merge(run.info.merge)}"
    return run.label.removesuffix(rule).removesuffix(f" + {parse_cache(run.info.cache)}") + rule


def _bytes(run: RunView) -> float:
    """Return the bytes of all layers and key/value heads."""
    trace = run.replay.info.trace
    return (run.mean(SIZE) or 0.0) * len(trace.layers) * trace.kv_heads


def _keys(cells: dict[str, list[RunView]]) -> float:
    return min(run.budget_keys or 0.0 for runs in cells.values() for run in runs)


def _cell(runs: list[RunView], metrics: list[str]) -> JsonDict | None:
    if not runs:
        return None
    values: JsonDict = {}
    for name in metrics:
        known = [run for run in runs if run.mean(name) is not None]
        values[name] = rounded(known[0].mean(name)) if known else None
    return {"run": runs[0].id, "bytes": rounded(_bytes(runs[0])), "values": values}
