"""The compiled loop of `kept`, which imports this module when it is called."""

from __future__ import annotations

from kvscope.kernels.arrays import Array
from kvscope.kernels.compiled import summing


@summing
def keep_rows(first: int, last: int, rows: Array, leave: Array, start: int, kept: Array, total: Array) -> None:
    """Fill `kept` and `total` for query heads `first` to `last` - 1, numbered through all runs."""
    _, heads, count, n = rows.shape
    group = heads // leave.shape[1]
    for unit in range(first, last):
        r, h = unit // heads, unit % heads
        evicted_at = leave[r, h // group]
        for i in range(count):
            row, result, t, mass = rows[r, h, i], kept[r, h, i], start + i, 0.0
            for j in range(n):
                weight = row[j] if evicted_at[j] >= t else row.dtype.type(0)
                result[j] = weight
                mass += weight
            total[r, h, i] = mass
