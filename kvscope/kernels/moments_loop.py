"""Loops that numba compiles, imported by `moments` alone, when it is called."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvscope.kernels.compiled import summing


@summing
def sum_rows(first: int, last: int, rows: Any, mask: Any, other: Any, steps: Any, skip: int, sums: Any) -> None:
    """Sum rows of query heads `first` to `last` - 1, counted through runs and layers, into ``[R, L, H, b, 4]``."""
    _, layers, heads, count, _ = sums.shape
    together = heads // mask.shape[2]
    for unit in range(first, last):
        r, layer, h = unit // (layers * heads), unit // heads % layers, unit % heads
        own = min(r, rows.shape[0] - 1)
        for i in range(count):
            n = steps[i] + 1
            edge = min(skip, n)
            row, shown = rows[own, layer, h, i, :n], mask[r, layer, h // together, i, :n]
            if other is None:
                early = _sum(row[:edge], shown[:edge])
                rest = _sum(row[edge:], shown[edge:])
            else:
                also = other[r, layer, h, i, :n]
                early = _sum_both(row[:edge], shown[:edge], also[:edge])
                rest = _sum_both(row[edge:], shown[edge:], also[edge:])
            into = sums[r, layer, h, i]
            into[0], into[1], into[2], into[3] = early[0] + rest[0], rest[0], early[1] + rest[1], early[2] + rest[2]


@summing
def _sum(row: Any, mask: Any) -> tuple[float, float, int]:
    """Return the mass, the squares and the number of the keys that a mask shows."""
    mass = squares = 0.0
    keys = 0
    for j in range(len(row)):
        part = np.float64(row[j]) * mask[j]
        mass += part
        squares += part * part
        keys += mask[j]
    return mass, squares, keys


@summing
def _sum_both(row: Any, mask: Any, other: Any) -> tuple[float, float, int]:
    """Do the same for the keys that both masks show."""
    mass = squares = 0.0
    keys = 0
    for j in range(len(row)):
        both = mask[j] & other[j]
        part = np.float64(row[j]) * both
        mass += part
        squares += part * part
        keys += both
    return mass, squares, keys
