"""Loops that numba compiles. Imported by `step_block` alone, when it is called.

Arrays have the axes of `KernelState`: ``R`` runs, ``L`` layers, ``S`` deciding heads, ``T`` keys. The keys that a head
holds lie in ``slots``, by position, oldest first, and their scores beside them in ``kept``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kvscope.core.residency import NEVER
from kvscope.kernels.compiled import compiled

NONE, MEAN, MAX, SUM = range(4)  # how query heads become one


@compiled
def step_heads(first: int, last: int, block: Any, state: Any, reduce: int, decay: Any, nan_scores: Any) -> None:
    """Step heads `first` to `last` - 1, counted through runs, layers and deciding heads, through a block of rows."""
    rows, missing, scale, start = block.full, block.missing, block.scale, block.start
    _, layers, heads, length = state.leave.shape
    together = rows.shape[2] // heads
    slots = np.empty(length, np.uint32)  # unsigned, so that no index counts from the end
    kept = np.empty(length, state.score.dtype)
    weight = np.empty(length, np.float64)
    for unit in range(first, last):
        r, layer, s = unit // (layers * heads), unit // heads % layers, unit % heads
        alive, score, leave = state.alive[r, layer, s], state.score[r, layer, s], state.leave[r, layer, s]
        budget, window = state.budget[r, layer, s], state.windows[layer]
        m = _gather(alive[:start], score, slots, kept)
        own, lost, scaled = min(r, rows.shape[0] - 1), min(r, missing.shape[0] - 1), min(r, scale.shape[0] - 1)
        for i in range(rows.shape[3]):
            t = start + i
            slots[m], kept[m] = t, 0
            m += 1
            if 0 < window <= t:
                m = _forget(t - window, t - 1, leave, slots, kept, m)
            if reduce == NONE:
                kept[m - 1] = t
            else:
                of = slice(s * together, (s + 1) * together)
                by, full = scale[scaled, layer, s], rows[own, layer, of, i]
                _weigh(full, missing[lost, layer, of], by, t, reduce, slots, m, weight)
                share = together if reduce == MEAN else 1
                for k in range(m):
                    kept[k] = state.score.dtype.type(weight[k] / share) + decay * kept[k]
            surplus = m - budget
            if block.evicts[i] and surplus > 0:
                nan_scores[unit] |= np.isnan(kept[:m]).any()
                low = np.searchsorted(slots[:m], state.sinks[r])
                high = np.searchsorted(slots[:m], t + 1 - state.recent[r])
                m = _evict(surplus, t, low, high, leave, slots, kept, m)
                state.evictions[r, layer, s] += surplus
        alive[: start + rows.shape[3]] = False
        for k in range(m):
            alive[slots[k]] = True
            score[slots[k]] = kept[k]
        state.n_alive[r, layer, s] = m


@compiled
def _gather(alive: Any, score: Any, slots: Any, kept: Any) -> int:
    """Fill the slots with the keys that are alive, and return how many there are."""
    m = 0
    for j in range(len(alive)):
        if alive[j]:
            slots[m], kept[m] = j, score[j]
            m += 1
    return m


@compiled
def _forget(key: int, step: int, leave: Any, slots: Any, kept: Any, m: int) -> int:
    """Drop a key that a sliding-window layer can no longer see, and return how many remain."""
    if leave[key] == NEVER:
        leave[key] = step
    return _remove(slots, kept, 0, m) if slots[0] == key else m


@compiled
def _weigh(rows: Any, missing: Any, scale: Any, t: int, reduce: int, slots: Any, m: int, weight: Any) -> None:
    """Reduce the live rows of a group of query heads to one weight for each slot; a mean is not yet divided."""
    weight[:m] = 0
    for h in range(rows.shape[0]):
        row = rows[h]
        total = _total(row, slots, m) + (missing[h, t] if missing.shape[1] else 0)
        if np.isnan(total):
            weight[:m] = np.nan
            return
        norm = row.dtype.type(total) if total > 0 else row.dtype.type(1)
        if len(scale):
            for k in range(m):
                w = row[slots[k]] / norm * scale[slots[k]]
                weight[k] = max(weight[k], w) if reduce == MAX else weight[k] + w
        elif reduce == MAX:
            for k in range(m):
                weight[k] = max(weight[k], row[slots[k]] / norm)
        else:
            for k in range(m):
                weight[k] += row[slots[k]] / norm


@compiled
def _total(row: Any, slots: Any, m: int) -> float:
    """Return the sum of a row over `m` slots, in double; in four parts, which do not wait for each other."""
    a = b = c = d = 0.0
    whole = m - m % 4
    for k in range(0, whole, 4):
        a += row[slots[k]]
        b += row[slots[k + 1]]
        c += row[slots[k + 2]]
        d += row[slots[k + 3]]
    for k in range(whole, m):
        a += row[slots[k]]
    return (a + b) + (c + d)


@compiled
def _evict(surplus: int, t: int, low: int, high: int, leave: Any, slots: Any, kept: Any, m: int) -> int:
    """Drop the `surplus` lowest of the slots `low` to `high` - 1, and return how many remain."""
    if surplus == 1:
        gone = low
        for k in range(low + 1, high):
            if kept[k] < kept[gone]:  # so the oldest of equal scores goes
                gone = k
        leave[slots[gone]] = t
        return _remove(slots, kept, gone, m)
    order = np.argsort(kept[low:high], kind="mergesort")  # stable, for the same rule
    for k in order[:surplus]:
        leave[slots[low + k]] = t
    remaining = 0
    for k in range(m):
        if leave[slots[k]] != t:
            slots[remaining], kept[remaining] = slots[k], kept[k]
            remaining += 1
    return remaining


@compiled
def _remove(slots: Any, kept: Any, place: int, m: int) -> int:
    """Close the gap at `place`, and return how many remain."""
    for k in range(place, m - 1):
        slots[k], kept[k] = slots[k + 1], kept[k + 1]
    return m - 1
