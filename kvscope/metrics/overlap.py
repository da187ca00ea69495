"""How many of the ideal keys are visible."""

from __future__ import annotations

from torch import Tensor

from kvscope.metrics.base import Rows, metric


@metric("mask_cosine", direction="higher", range=(0.0, 1.0), when_nothing_evicted=None)
def mask_cosine(rows: Rows) -> Tensor:
    """Cosine of the visible and the ideal set of keys, each as a vector of zeros and ones.

    That is the number of keys in both, divided by the root of the product of their sizes. The ideal set is the current
    key and the ``B`` heaviest others.
    """
    return rows.both.keys / (rows.kept.keys * rows.best.keys).sqrt()


@metric("ideal_recall", direction="higher", range=(0.0, 1.0), when_nothing_evicted=1.0)
def ideal_recall(rows: Rows) -> Tensor:
    """Share of the keys of the ideal set that are visible.

    The ideal set is the current key and the ``B`` heaviest others.
    """
    return rows.both.keys / rows.best.keys
