"""Masks of the heaviest weights of rows, compiled; the fallback is in `kvscope.metrics.heaviest`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvscope.kernels import spread

Array = NDArray[Any]


def top_masks(rows: Array, least: Array, budgets: Array) -> Array:
    """Return where the heaviest weights of rows are: all above `least`, and of those equal to it the newest.

    Parameters
    ----------
    rows : ndarray
        ``[..., n]``; a key that does not count has weight -1.
    least : ndarray
        ``[K, ...]``: for each budget and row the lightest weight that is still in, or -1.
    budgets : ndarray
        int ``[K]``.

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
