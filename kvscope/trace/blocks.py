"""From arrays to columns: the lower triangle of rows, the places of rows, and what is no weight."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvscope.core.errors import TraceError

Array = NDArray[Any]


def places(layer: int, sequence: int, heads: int, position: Array, head: str = "head") -> dict[str, Array]:
    """Return the columns that say of what a row is, for each head the positions in turn."""
    count = heads * len(position)
    return {
        "sequence": np.full(count, sequence, np.int32),
        "layer": np.full(count, layer, np.int32),
        head: np.repeat(np.arange(heads, dtype=np.int32), len(position)),
        "position": np.tile(position, heads),
    }


def own(position: Array, rows: Array) -> Array:
    """Return where a key is not later than its query, ``[q, n]``."""
    return np.arange(rows.shape[-1]) <= position[:, None]


def not_finite(layer: int, first: int, count: int, what: str) -> TraceError:
    """Return the error for numbers of some positions that are infinite or NaN."""
    return TraceError(
        f"layer {layer}, positions {first} to {first + count - 1}: {what} are not finite",
        "They exceed the model's precision: try --dtype float32.",
    )


def lower(rows: Array, lengths: Array) -> Array:
    """Return the first so many numbers of each row, head by head."""
    heads = len(rows)
    flat = np.empty((heads, int(lengths.sum())), rows.dtype)
    stop = 0
    for row, length in enumerate(lengths.tolist()):
        start, stop = stop, stop + length
        flat[:, start:stop] = rows[:, row, :length]
    return flat.ravel()


def are_weights(flat: Array) -> bool:
    """Return whether all numbers are finite and none is negative."""
    if flat.dtype == np.float16 and flat.size and flat.view(np.uint16).max() < np.float16(np.inf).view(np.uint16):
        return True  # in 16 bits, what is negative, infinite or no number comes after every finite number
    return bool((np.isfinite(flat) & (flat >= 0)).all())
