"""The engine's step, compiled: the same decisions as `Scan.step`, for scores that are a recurrence."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvscope.kernels import spread

Array = NDArray[Any]


def step_block(
    reduce: str,
    decay: float,
    state: tuple[Array, ...],
    limits: tuple[Array, ...],
    rows: Array,
    start: int,
    evicts: Array,
    *,
    missing: Array | None = None,
    scale: Array | None = None,
) -> bool:
    """Step a scan through a block of rows, and return whether a score was not a number.

    Parameters
    ----------
    reduce, decay
        How keys are scored: `Recurrence.weights` and `Recurrence.decay`.
    state : tuple of ndarray
        Of the scan, changed in place: alive, score and leave ``[R, L, S, T]``, count and evictions ``[R, L, S]``.
    limits : tuple of ndarray
        Budget ``[R, L, S]``, first and newest keys that stay ``[R]``, and how many keys each layer sees ``[L]``, 0 for
        all.
    rows : ndarray
        Full rows ``[R or 1, L, H, b, n]`` of steps `start` to ``start + b - 1``.
    start : int
        First step.
    evicts : ndarray
        bool ``[b]``: whether keys go at the end of each step.
    missing : ndarray or None
        ``[R or 1, L, H, T]``: what a learned sink takes from each row.
    scale : ndarray or None
        ``[R or 1, L, S, T]``: what each weight is multiplied by.
    """
    from kvscope.kernels.scan_loop import MAX, MEAN, NONE, SUM, scan_units

    leave, score = state[2], state[1]
    units = leave[..., 0].size
    bad = np.zeros(units, np.bool_)
    missing = np.zeros((1, leave.shape[1], rows.shape[2], 0), rows.dtype) if missing is None else missing
    scale = np.zeros((1, *leave.shape[1:3], 0), rows.dtype) if scale is None else scale
    how = {"none": NONE, "mean": MEAN, "max": MAX, "sum": SUM}[reduce]
    left = score.dtype.type(decay)

    def work(first: int, last: int) -> None:
        scan_units(first, last, rows, missing, scale, how, left, start, evicts, state, limits, bad)

    spread(work, units)
    return bool(bad.any())
