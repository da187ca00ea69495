"""How many of the ideal keys are visible."""

from __future__ import annotations

from torch import Tensor

from kvscope.metrics.base import Rows, metric


@metric("mask_cosine", direction="higher", range=(0.0, 1.0), when_nothing_evicted=None)
def mask_cosine(rows: Rows) -> Tensor:
    """Cosine of the visible and the ideal set as vectors of 0 and 1."""
    return rows.both.keys / (rows.kept.keys * rows.best.keys).sqrt()


@metric("ideal_recall", direction="higher", range=(0.0, 1.0), when_nothing_evicted=1.0)
def ideal_recall(rows: Rows) -> Tensor:
    """Share of the ideal set that is visible."""
    return rows.both.keys / rows.best.keys
