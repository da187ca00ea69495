"""Rows without evicted keys, compiled; the fallback is the product with `CacheSimulation.visible` in torch."""

from __future__ import annotations

import numpy as np

from kvscope.kernels import spread
from kvscope.kernels.arrays import Array


def kept_rows(rows: Array, leave: Array, start: int) -> tuple[Array, Array]:
    """Return rows with zeros at evicted keys, and their sums.

    Parameters
    ----------
    rows : ndarray
        ``[R, H, b, n]`` of steps `start` to ``start + b - 1``; zero beyond the query's position.
    leave : ndarray
        int32 ``[R, S, T]``: step at whose end a key was evicted, as in `CacheState`; ``S`` divides ``H``.
    start : int
        First step.

    Returns
    -------
    tuple of ndarray
        ``[R, H, b, n]``, and ``[R, H, b]`` of the same type, summed in float64.
    """
    from kvscope.kernels.kept_loop import keep_rows

    rows, leave = np.ascontiguousarray(rows), np.ascontiguousarray(leave)
    kept, total = np.empty_like(rows), np.empty_like(rows[..., 0])
    spread(lambda first, last: keep_rows(first, last, rows, leave, start, kept, total), rows.shape[0] * rows.shape[1])
    return kept, total
