"""Query similarity: for how many steps a full step is representative (figure of Recycled Attention)."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from kvscope.core.json import JsonDict
from kvscope.report.encoding import packed_floats
from kvscope.report.panel import panel
from kvscope.report.panels.over_time import bins
from kvscope.report.source import ReportInput

LAGS = (1, 5, 50)  # neighbours, Recycled Attention's comparison, and its usual stride


@panel(
    "queries",
    title="Query similarity",
    order=85,
    needs=("trace",),
    detail=True,
    help="Each line is the cosine of a layer's mean query with that of some steps before: high where successive "
    "queries attend to the same keys. A policy that reuses the keys of an earlier full step, as Recycled Attention "
    "(arXiv:2411.05787) does, is safe where the line of its stride is high, and should refresh where it drops.",
)
def queries(source: ReportInput) -> JsonDict | None:
    """Return for each sequence and layer the cosine of mean queries at some lags, in even bins of steps."""
    parts: JsonDict = {}
    for part in source.parts.values():
        trace = source.traces.get(part.identity)
        if trace is None or "queries" not in trace.stored or part.length <= LAGS[0] + 1:
            continue
        edges = bins(LAGS[0], part.length, source.limits.bins * 2)
        lines = {}
        for layer in source.layers_of(part):
            unit = trace.mean_queries(part.number, layer).astype(np.float64)  # [T, D]
            unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-30)
            lines[str(layer)] = packed_floats(np.stack([_similarity(unit, lag, edges) for lag in LAGS]))
        parts[part.name] = {"edges": edges.tolist(), "layers": lines}
    return {"parts": parts, "lags": list(LAGS)} if parts else None


def _similarity(unit: NDArray[np.float64], lag: int, edges: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the mean cosine of each bin of steps; NaN where no step has an earlier one at this lag."""
    cosine = np.full(len(unit), np.nan)
    if lag < len(unit):
        cosine[lag:] = (unit[lag:] * unit[:-lag]).sum(1)
    parts = [cosine[start:stop] for start, stop in pairwise(edges)]
    return np.array([np.nan if np.isnan(each).all() else np.nanmean(each) for each in parts])
