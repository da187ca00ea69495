"""The arrays that kernels are called with."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]  # of any number type: numba compiles a loop for the types of its arguments


class KernelState(NamedTuple):
    """State of the caches of ``R`` runs, ``L`` layers and ``S`` deciding heads.

    The kernel changes the arrays up to `evictions` in place.

    Attributes
    ----------
    alive, score, leave : ndarray
        bool, float and int32 ``[R, L, S, T]``: whether a key is in the cache, its score, and the step at
        whose end it was evicted.
    n_alive, evictions : ndarray
        int64 ``[R, L, S]``: keys in the cache, and keys evicted so far.
    budget : ndarray
        int64 ``[R, L, S]``: keys that each head may hold.
    sinks, recent : ndarray
        int64 ``[R]``: number of first and of newest keys that are protected.
    windows : ndarray
        int64 ``[L]``: how many newest keys each layer of the model can attend to; 0 for all.
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
    """A block of rows, and how they are processed.

    Attributes
    ----------
    full : ndarray
        Full rows ``[R or 1, L, H, b, n]`` of steps `start` to ``start + b - 1``.
    start : int
        First step.
    evicts : ndarray
        bool ``[b]``: whether keys are evicted at the end of each step.
    missing : ndarray
        ``[R or 1, L, H, T]``: attention mass of each row on a learned sink; ``T`` is 0 if there is none.
    scale : ndarray
        ``[R or 1, L, S, T]``: factor of each weight; ``T`` is 0 if weights are not scaled.
    fixed : ndarray
        ``[R or 1, L, S, b]``: the scores of the keys of these steps, if those are fixed; otherwise ``b`` is 0.
    """

    full: Array
    start: int
    evicts: Array
    missing: Array
    scale: Array
    fixed: Array
