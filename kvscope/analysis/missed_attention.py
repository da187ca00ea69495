"""Full-cache attention on keys that were not visible: how much, at which steps, and how long after their eviction.

It is the mean over the query heads of a key's group. Where eviction is final, the steps without a key are all those
after its eviction; for a sparse reader, which may read a key again, those at which it was not read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvscope.core.residency import ResidencyIntervals

Rows = NDArray[np.float32] | NDArray[np.float64]
MOST = 3  # largest missed weights that are recorded of each key
BINS = 32  # of lags: bin b is 2**b to 2**(b+1) - 1 steps


@dataclass(frozen=True)
class MissedAttention:
    """Full-cache attention on keys that the queries of a run could not see, in one layer of one sequence.

    Attributes
    ----------
    mass : array
        Regret of each key, ``[G, T]``.
    step, weight, evicted_at : array
        ``[MOST, G, T]``: steps of the largest weights on the key while it was not visible, these weights in descending
        order, and the step at which the key had been evicted; -1, 0, -1 where there is none. Of equal weights the
        earlier step comes first.
    lags : array
        Missed mass by the number of steps since the key was evicted, ``[BINS]``.
    """

    mass: NDArray[np.float64]
    step: NDArray[np.int64]
    weight: NDArray[np.float64]
    evicted_at: NDArray[np.int64]
    lags: NDArray[np.float64]


class MissedAttentionCounter:
    """Sums the attention that a run missed, over blocks of rows in order of their steps.

    Parameters
    ----------
    intervals : ResidencyIntervals
        Residency intervals of the layer.
    """

    def __init__(self, intervals: ResidencyIntervals) -> None:
        self._intervals = intervals
        heads, length = intervals.heads, intervals.length
        self._evicted_at_step = np.full((heads, length), -1, np.int64)  # last step at which each key was evicted
        self._mass = np.zeros((heads, length))
        self._best = np.zeros((3, MOST, heads, length))  # weight, step, evicted_at
        self._best[1:] = -1
        self._lags = np.zeros(BINS)

    def add(self, start: int, rows: Rows) -> None:
        """Add full rows of the steps from `start` on, mean over each group, ``[G, b, n]`` with ``n = start + b``."""
        count, n = rows.shape[1:]
        step, key = np.arange(start, start + count)[:, None], np.arange(n)
        held = self._intervals.held(start - 1, start + count - 1)[..., :n]
        evicted_at = self._latest_evictions(start, count, n)  # [G, b, n]
        lost = np.where(~held & (key < step), rows, 0).astype(np.float64)
        if not lost.any():
            return
        self._mass[:, :n] += lost.sum(1)
        there = lost > 0
        lag = (step - evicted_at)[there]
        self._lags += np.bincount(np.frexp(lag)[1] - 1, lost[there], BINS)
        self._keep_best(start, lost, evicted_at)

    def result(self) -> MissedAttention:
        """Return what the run missed in all blocks."""
        weight, step, evicted_at = self._best
        return MissedAttention(self._mass, step.astype(np.int64), weight, evicted_at.astype(np.int64), self._lags)

    def _latest_evictions(self, start: int, count: int, n: int) -> NDArray[np.int64]:
        """Return the last step before each query at which each key was evicted, ``[G, b, n]``; -1 for none."""
        own = self._intervals
        these = (own.leave >= max(start - 1, 0)) & (own.leave < start + count - 1)
        evicted_at = np.full((own.heads, count, n), -1, np.int64)
        evicted_at[own.kv_head[these], own.leave[these] + 1 - start, own.key[these]] = own.leave[these]
        evicted_at[:, 0] = np.maximum(evicted_at[:, 0], self._evicted_at_step[:, :n])
        evicted_at = np.maximum.accumulate(evicted_at, axis=1)
        self._evicted_at_step[:, :n] = evicted_at[:, -1]
        return evicted_at

    def _keep_best(self, start: int, lost: NDArray[np.float64], evicted_at: NDArray[np.int64]) -> None:
        n = lost.shape[-1]
        found = [self._best[..., :n]]
        for _ in range(MOST):
            at = lost.argmax(1)[:, None]  # [G, 1, n]: the first of equal weights
            weight = np.take_along_axis(lost, at, 1)
            of = np.stack([weight, at + start, np.take_along_axis(evicted_at, at, 1)])  # [3, G, 1, n]
            of[1:, weight == 0] = -1
            found.append(of.transpose(0, 2, 1, 3))
            np.put_along_axis(lost, at, 0, 1)
        every = np.concatenate(found, 1)  # [3, 2 * MOST, G, n], earlier steps first
        order = np.argsort(-every[0], axis=0, kind="stable")[:MOST]
        self._best[..., :n] = np.take_along_axis(every, order[None], 1)
