"""Convert arrays to columns of a trace, and check that attention weights are valid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvscope.core.errors import TraceError

Array: TypeAlias = NDArray[Any]  # of any dtype


def places(layer: int, sequence: int, heads: int, position: Array, head: str = "head") -> dict[str, Array]:
    """Return the columns that identify a row: sequence, layer, head and position, ordered by head, then position."""
    count = heads * len(position)
    return {
        "sequence": np.full(count, sequence, np.int32),
        "layer": np.full(count, layer, np.int32),
        head: np.repeat(np.arange(heads, dtype=np.int32), len(position)),
        "position": np.tile(position, heads),
    }


def tokens_from(layer: int, sequence: int, first: int, count: int) -> dict[str, Array]:
    """Return the columns that identify a token: sequence, layer and position, of `count` tokens from `first` on."""
    return {
        "sequence": np.full(count, sequence, np.int32),
        "layer": np.full(count, layer, np.int32),
        "position": np.arange(first, first + count, dtype=np.int32),
    }


def own(position: Array, rows: Array) -> Array:
    """Return the causal mask, True where a key is not later than the query, ``[q, n]``."""
    return np.arange(rows.shape[-1]) <= position[:, None]


def not_finite(layer: int, first: int, count: int, what: str) -> TraceError:
    """Return the error for numbers that are infinite or NaN, in `count` positions from `first` on."""
    return TraceError(
        f"layer {layer}, positions {first} to {first + count - 1}: {what} are not finite",
        "Use a dtype with a larger range: try --dtype float32.",
    )


def bad_weight(layer: int, position: Array, weights: Array) -> TraceError:
    """Return the error for the first invalid weight of packed rows ``[H, total]`` of queries at these positions."""
    head, index = (int(axis[0]) for axis in np.nonzero(~(np.isfinite(weights) & (weights >= 0))))
    ends = np.cumsum(position + 1)
    query = int(np.searchsorted(ends, index, "right"))
    key = index - int(ends[query] - position[query] - 1)
    return TraceError(
        f"layer {layer}, head {head}, position {position[query]}: weight {weights[head, index]} on key {key}",
        "Weights must be finite and not negative: try --dtype float32.",
    )


def lower(rows: Array, lengths: Array) -> Array:
    """Return the first ``lengths[i]`` numbers of each row ``[heads, q, n]``, flattened, head by head."""
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
        return True  # as integers, negative, infinite and NaN float16 are above every finite weight
    return bool((np.isfinite(flat) & (flat >= 0)).all())


def norm_column(norms: Array | None, size: int) -> Array:
    """Return norms ``[G, n]`` as one column of float32; NaN where there are none."""
    return np.full(size, np.nan, np.float32) if norms is None else norms.ravel().astype(np.float32)


def norm_columns(layer: int, sequence: int, first: int, **norms: Array) -> dict[str, Array]:
    """Return columns of norms ``[G, n]`` of keys from position `first` on, with the keys that they are of."""
    heads, count = next(iter(norms.values())).shape
    place = places(layer, sequence, heads, np.arange(first, first + count, dtype=np.int32), "kv_head")
    return {**place, **{name: norm_column(norm, heads * count) for name, norm in norms.items()}}


def token_columns(
    sequence: int, token_id: Sequence[int] | Array, is_prompt: Sequence[bool] | Array, *scores: Sequence[float] | Array
) -> dict[str, Array]:
    """Return the columns with numbers of the tokens of a sequence; `scores` are log-probabilities and entropies."""
    logprob, entropy = (np.asarray(score, np.float32) for score in scores)
    return {
        "sequence": np.full(len(token_id), sequence, np.int32),
        "position": np.arange(len(token_id), dtype=np.int32),
        "token_id": np.asarray(token_id, np.int64),
        "is_prompt": np.asarray(is_prompt, bool),
        "logprob": logprob,
        "entropy": entropy,
    }
