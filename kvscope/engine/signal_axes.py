"""The axes of the signals that policies read, and which part of a signal is available at a step."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

VECTORS = ("keys", "values", "queries")  # signals [L, heads, T, D]; all others are [L, ., T] or [L, T, D]
PER_QUERY = ("queries", "mean_query")  # signals of which a policy gets the current query only
CONSTANT = ("rotary",)  # signals without an axis of positions, [L, 4, D]
BEFOREHAND = (*CONSTANT, "reconstruction")  # signals that are known before a text is decoded
WITHOUT_HEADS = ("mean_query", *CONSTANT)  # signals without an axis of heads


def with_one_number(name: str) -> bool:
    """Return whether a signal has one number for each key/value head and key, ``[., L, G, T]``."""
    return name not in (*VECTORS, *PER_QUERY, *CONSTANT)


def per_token(signals: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the signals of which every token brings its own part."""
    return {name: signal for name, signal in signals.items() if name not in BEFOREHAND}


def time_axis(name: str) -> int:
    """Return which axis of a signal is the position: -2 if each token has a vector, otherwise -1."""
    return -2 if name in (*VECTORS, "mean_query") else -1


def with_run_axis(name: str, signal: Tensor) -> Tensor:
    """Return a signal with a leading axis of runs, of size 1 if all runs share the signal."""
    axes = 4 if name in VECTORS else 3  # without runs
    return signal if signal.ndim > axes else signal[None]


def up_to(name: str, signal: Tensor, t: int) -> Tensor:
    """Return the part of a signal that a policy may see at step `t`."""
    if name in CONSTANT:
        return signal
    if name in PER_QUERY:
        return signal[..., t, :]
    return signal[..., : t + 1, :] if name in VECTORS else signal[..., : t + 1]
