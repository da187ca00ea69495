"""Axes of the signals that policies read, and what of a signal exists at a step."""

from __future__ import annotations

from torch import Tensor

VECTORS = ("keys", "values", "queries")  # signals [L, heads, T, D]; all others are [L, ., T] or [L, T, D]
PER_QUERY = ("queries", "mean_query")  # of which the current query alone is shown


def time_axis(name: str) -> int:
    """Return which axis of a signal is the position: -2 where each token has a vector, otherwise -1."""
    return -2 if name in (*VECTORS, "mean_query") else -1


def with_run_axis(name: str, signal: Tensor) -> Tensor:
    """Return a signal with its leading axis of runs: 1 where all runs share it."""
    own = 4 if name in VECTORS else 3
    return signal if signal.ndim > own else signal[None]


def up_to(name: str, signal: Tensor, t: int) -> Tensor:
    """Return the part of a signal that a policy may see at step `t`."""
    if name in PER_QUERY:
        return signal[..., t, :]
    return signal[..., : t + 1, :] if name in VECTORS else signal[..., : t + 1]
