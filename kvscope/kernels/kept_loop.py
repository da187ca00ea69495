"""Loops that numba compiles, imported by `kept` alone, when it is called."""

from __future__ import annotations

from typing import Any

from kvscope.kernels.compiled import summing


@summing
def keep_rows(first: int, last: int, rows: Any, leave: Any, start: int, kept: Any, total: Any) -> None:
    """Do it for query heads `first` to `last` - 1, counted through runs."""
    _, heads, count, n = rows.shape
    together = heads // leave.shape[1]
    for unit in range(first, last):
        r, h = unit // heads, unit % heads
        left = leave[r, h // together]
        for i in range(count):
            row, into, t, mass = rows[r, h, i], kept[r, h, i], start + i, 0.0
            for j in range(n):
                weight = row[j] if left[j] >= t else row.dtype.type(0)
                into[j] = weight
                mass += weight
            total[r, h, i] = mass
