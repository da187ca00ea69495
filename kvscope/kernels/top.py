"""Masks of the largest weights of rows, compiled; the fallback is in `kvscope.metrics.heaviest`."""

from __future__ import annotations

import numpy as np

from kvscope.kernels import spread
from kvscope.kernels.arrays import Array


def top_masks(rows: Array, least: Array, budgets: Array) -> Array:
    """Return masks of the largest weights of rows: all above `least`, and of those equal to it the newest.

    Parameters
    ----------
    rows : ndarray
        ``[..., n]``; a key that is not considered has weight -1.
    least : ndarray
        ``[K, ...]``: for each budget and row the smallest weight that is included, or -1 to include all.
    budgets : ndarray
        int ``[K]``: number of keys to include.

    Returns
    -------
    ndarray
        bool ``[K, ..., n]``.
    """
    from kvscope.kernels.top_loop import mark_rows

    flat = np.ascontiguousarray(rows).reshape(-1, rows.shape[-1])
    marks = np.empty((len(budgets), *flat.shape), np.bool_)
    edges = np.ascontiguousarray(least).reshape(len(budgets), -1)
    spread(lambda first, last: mark_rows(first, last, flat, edges, budgets, marks), len(flat))
    return marks.reshape(len(budgets), *rows.shape)
