"""Steps caches through a block of rows, compiled: the decisions of `TorchStepper`, for scores that are a recurrence."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvscope.kernels import spread

Array = NDArray[Any]


class KernelState(NamedTuple):
    """State of the caches, changed in place down to `evictions`: ``R`` runs, ``L`` layers, ``S`` deciding heads.

    Attributes
    ----------
    alive, score, leave : ndarray
        bool, float and int32 ``[R, L, S, T]``: whether a key is in the cache, its score, and when it was evicted.
    n_alive, evictions : ndarray
        int64 ``[R, L, S]``: keys in the cache, and keys evicted so far.
    budget : ndarray
        int64 ``[R, L, S]``: keys that each head may hold.
    sinks, recent : ndarray
        int64 ``[R]``: how many first and how many newest keys are protected.
    windows : ndarray
        int64 ``[L]``: how many newest keys each layer of the model can see, 0 for all.
    """

    alive: Array
    score: Array
    leave: Array
    n_alive: Array
    evictions: Array
    budget: Array
    sinks: Array
    recent: Array
    windows: Array


class KernelRows(NamedTuple):
    """A block of rows, and what is done with them.

    Attributes
    ----------
    full : ndarray
        Full rows ``[R or 1, L, H, b, n]`` of steps `start` to ``start + b - 1``.
    start : int
        First step.
    evicts : ndarray
        bool ``[b]``: whether keys are evicted at the end of each step.
    missing : ndarray
        ``[R or 1, L, H, T]``: what a learned sink takes from each row; ``T`` is 0 where there is none.
    scale : ndarray
        ``[R or 1, L, S, T]``: what each weight is multiplied by; ``T`` is 0 where it is by nothing.
    """

    full: Array
    start: int
    evicts: Array
    missing: Array
    scale: Array


def step_block(
    reduce: str,
    decay: float,
    state: KernelState,
    rows: Array,
    start: int,
    evicts: Array,
    *,
    missing: Array | None = None,
    scale: Array | None = None,
) -> bool:
    """Step caches through a block of rows, and return whether a score was not a number.

    Parameters
    ----------
    reduce, decay
        How keys are scored: `Recurrence.weights` and `Recurrence.decay`.
    state : KernelState
        Changed in place.
    rows, start, evicts, missing, scale
        As in `KernelRows`; None for what there is not.
    """
    from kvscope.kernels.step_block_loop import MAX, MEAN, NONE, SUM, step_heads

    heads = state.n_alive.size
    nan_scores = np.zeros(heads, np.bool_)
    missing = np.zeros((1, *rows.shape[1:3], 0), rows.dtype) if missing is None else missing
    scale = np.zeros((1, *state.n_alive.shape[1:], 0), rows.dtype) if scale is None else scale
    block = KernelRows(rows, start, evicts, missing, scale)
    reduction = {"none": NONE, "mean": MEAN, "max": MAX, "sum": SUM}[reduce]
    retained = state.score.dtype.type(decay)

    def work(first: int, last: int) -> None:
        step_heads(first, last, block, state, reduction, retained, nan_scores)

    spread(work, heads)
    return bool(nan_scores.any())
