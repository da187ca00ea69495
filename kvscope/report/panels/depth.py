"""Keys by depth: the share of keys that each layer holds, for policies that do not give every layer the same."""

from __future__ import annotations

import numpy as np

from kvscope.core.json import JsonDict
from kvscope.report.panel import panel
from kvscope.report.runs import RunView
from kvscope.report.source import ReportInput

HELD = "held_keys"


@panel(
    "depth",
    title="Keys by depth",
    order=24,
    needs=("fidelity",),
    help="Each line is the share of all keys that a run held in each layer, mean over steps and heads; bars reach from "
    "the head that holds least to the one that holds most. Learned gates, thresholds and allocations (under one "
    "budget) determine this share; for comparison, runs with a fixed budget that hold about as many "
    "keys in total are shown.",
)
def depth(source: ReportInput) -> JsonDict | None:
    """Return the held share of each layer for runs that allocate keys themselves, and for runs of similar size."""
    free = [run for run in source.runs if _allocates(run) and run.mean(HELD) is not None]
    closed = {(run.protocol[0], run.protocol[2]) for run in free if run.protocol[1] == "closed"}
    free = [run for run in free if run.protocol[1] == "closed" or (run.protocol[0], run.protocol[2]) not in closed]
    free = [run for run in free if run.budget in (None, source.first.budget) or run.kind == "own size"]
    if not free:
        return None
    shown = {each.id: each for run in free for each in (run, *_beside(source, run))}
    lines = [_line(source, run) for run in list(shown.values())[: source.limits.rows]]
    return {"layers": list(free[0].replay.info.trace.layers), "lines": lines}


def _allocates(run: RunView) -> bool:
    return run.kind == "own size" or run.info.allocate != "uniform"


def _beside(source: ReportInput, run: RunView) -> list[RunView]:
    """Return for every usual policy the run of the same protocol that holds about as many keys as `run`."""
    held = run.mean(HELD)
    assert held is not None, "asked for above"
    nearest: dict[str, RunView] = {}
    for other in source.runs:
        mean = other.mean(HELD)
        if mean is None or other.protocol != run.protocol or other.kind != "every step" or _allocates(other):
            continue
        best = nearest.get(other.label)
        if other.label in source.usual and (best is None or abs(mean - held) < abs((best.mean(HELD) or 0) - held)):
            nearest[other.label] = other
    return list(nearest.values())


def _line(source: ReportInput, run: RunView) -> JsonDict:
    means = source.means(run.replay)
    share = means.by_head[HELD][means.runs[run.number]] / run.full_keys  # [L, H]
    trace = run.replay.info.trace
    for reader, owner in trace.shared_cache.items():  # a layer that reads the cache of another holds its keys
        share[trace.layers.index(int(reader))] = share[trace.layers.index(owner)]
    rounded = np.round([np.nanmean(share, 1), np.nanmin(share, 1), np.nanmax(share, 1)], 4).tolist()
    return dict(zip(("run", "mean", "low", "high"), (run.id, *rounded), strict=True))
