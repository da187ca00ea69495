"""Sums over the keys of a row that a mask shows, compiled; the fallback is in `kvscope.metrics.moments`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvscope.kernels import spread

Array = NDArray[Any]


def masked_sums(rows: Array, mask: Array, other: Array | None, steps: Array, skip: int) -> Array:
    """Return sums over the keys of each row that `mask` shows, and `other` too.

    Parameters
    ----------
    rows : ndarray
        ``[R or 1, L, H, b, n]``.
    mask : ndarray
        bool ``[R, L, G, b, n]``, of groups of query heads; ``G`` may be ``H``.
    other : ndarray or None
        bool ``[R, L, H, b, n]``.
    steps : ndarray
        int ``[b]``: position of each query; later keys are not looked at.
    skip : int
        First positions that the second of the sums leaves out.

    Returns
    -------
    ndarray
        float64 ``[R, L, H, b, 4]``, made in any order: mass, mass without the first positions, squares, keys.
    """
    from kvscope.kernels.moments_loop import sum_rows

    runs, layers, _, count, _ = mask.shape
    heads = rows.shape[2]
    sums = np.zeros((runs, layers, heads, count, 4))
    rows, shown = np.ascontiguousarray(rows), np.ascontiguousarray(mask).view(np.uint8)
    also = None if other is None else np.ascontiguousarray(other).view(np.uint8)
    spread(lambda first, last: sum_rows(first, last, rows, shown, also, steps, skip, sums), runs * layers * heads)
    return sums
