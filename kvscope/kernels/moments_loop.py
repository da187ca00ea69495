"""The compiled loops of `moments`, which imports this module when it is called."""

from __future__ import annotations

import numpy as np

from kvscope.kernels.arrays import Array
from kvscope.kernels.compiled import summing


@summing
def sum_rows(
    first: int, last: int, rows: Array, mask: Array, other: Array | None, steps: Array, skip: int, sums: Array
) -> None:
    """Fill `sums` for query heads `first` to `last` - 1, numbered through all runs and layers."""
    _, layers, heads, count, _ = sums.shape
    group = heads // mask.shape[2]
    for unit in range(first, last):
        r, layer, h = unit // (layers * heads), unit // heads % layers, unit % heads
        rows_run = min(r, rows.shape[0] - 1)
        for i in range(count):
            n = steps[i] + 1
            edge = min(skip, n)
            row, mask_row = rows[rows_run, layer, h, i, :n], mask[r, layer, h // group, i, :n]
            if other is None:
                early = _sum(row[:edge], mask_row[:edge])
                rest = _sum(row[edge:], mask_row[edge:])
            else:
                other_row = other[r, layer, h, i, :n]
                early = _sum_both(row[:edge], mask_row[:edge], other_row[:edge])
                rest = _sum_both(row[edge:], mask_row[edge:], other_row[edge:])
            result = sums[r, layer, h, i]
            result[0], result[1] = early[0] + rest[0], rest[0]
            result[2], result[3] = early[1] + rest[1], early[2] + rest[2]


@summing
def _sum(row: Array, mask: Array) -> tuple[float, float, int]:
    """Return mass, sum of squares and number of the keys for which `mask` is 1."""
    mass = squares = 0.0
    keys = 0
    for j in range(len(row)):
        part = np.float64(row[j]) * mask[j]
        mass += part
        squares += part * part
        keys += mask[j]
    return mass, squares, keys


@summing
def _sum_both(row: Array, mask: Array, other: Array) -> tuple[float, float, int]:
    """Return mass, sum of squares and number of the keys for which both masks are 1."""
    mass = squares = 0.0
    keys = 0
    for j in range(len(row)):
        both = mask[j] & other[j]
        part = np.float64(row[j]) * both
        mass += part
        squares += part * part
        keys += both
    return mass, squares, keys
