"""Sums over the masked keys of rows, compiled; the fallback is in `kvscope.metrics.moments`."""

from __future__ import annotations

import numpy as np

from kvscope.kernels import spread
from kvscope.kernels.arrays import Array


def masked_sums(rows: Array, mask: Array, other: Array | None, steps: Array, skip: int) -> Array:
    """Return sums over the keys of each row for which `mask` is true, and `other` as well if it is given.

    Parameters
    ----------
    rows : ndarray
        ``[R or 1, L, H, b, n]``.
    mask : ndarray
        bool ``[R, L, G, b, n]``: one mask for each group of query heads; ``G`` may be ``H``.
    other : ndarray or None
        bool ``[R, L, H, b, n]``.
    steps : ndarray
        int ``[b]``: position of each query; later keys are ignored.
    skip : int
        Number of first positions that the second sum excludes.

    Returns
    -------
    ndarray
        float64 ``[R, L, H, b, 4]``: mass, mass without the first positions, sum of squares, number of keys. The order
        of summation is not defined.
    """
    from kvscope.kernels.moments_loop import sum_rows

    runs, layers, _, count, _ = mask.shape
    heads = rows.shape[2]
    sums = np.zeros((runs, layers, heads, count, 4))
    rows, mask = np.ascontiguousarray(rows), np.ascontiguousarray(mask).view(np.uint8)
    other = None if other is None else np.ascontiguousarray(other).view(np.uint8)
    spread(lambda first, last: sum_rows(first, last, rows, mask, other, steps, skip, sums), runs * layers * heads)
    return sums
