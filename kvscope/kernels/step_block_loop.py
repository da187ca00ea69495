"""The compiled loops of `step_block`, which imports this module when it is called.

Arrays have the axes of `KernelState`: ``R`` runs, ``L`` layers, ``S`` deciding heads, ``T`` keys. While a head is
stepped, the first `m` entries of ``slots`` are the positions of the keys that it holds, oldest first, and those of
``kept`` are their scores.
"""

from __future__ import annotations

import numpy as np

from kvscope.core.residency import NEVER
from kvscope.kernels.arrays import Array, KernelRows, KernelState
from kvscope.kernels.compiled import compiled
from kvscope.kernels.totals import SPLIT

NONE, MEAN, MAX, SUM = range(4)  # how the weights of a group of query heads are reduced


@compiled
def step_heads(
    first: int, last: int, block: KernelRows, state: KernelState, reduce: int, decay: float, nan_scores: Array
) -> None:
    """Step heads `first` to `last` - 1, numbered through all runs and layers, through a block of rows."""
    rows, missing, scale, start = block.full, block.missing, block.scale, block.start
    _, layers, heads, length = state.leave.shape
    group = rows.shape[2] // heads
    slots = np.empty(length, np.uint32)  # unsigned, so that numba need not handle negative indices
    kept = np.empty(length, state.score.dtype)
    weight = np.empty(length, np.float64)
    for unit in range(first, last):
        r, layer, s = unit // (layers * heads), unit // heads % layers, unit % heads
        alive, score, leave = state.alive[r, layer, s], state.score[r, layer, s], state.leave[r, layer, s]
        budget, window = state.budget[r, layer, s], state.windows[layer]
        m = _gather(alive[:start], score, slots, kept)
        rows_run, sink_run = min(r, rows.shape[0] - 1), min(r, missing.shape[0] - 1)
        scale_row = scale[min(r, scale.shape[0] - 1), layer, s]
        fixed = block.fixed[min(r, block.fixed.shape[0] - 1), layer, s]
        for i in range(rows.shape[3]):
            t = start + i
            slots[m], kept[m] = t, 0
            m += 1
            if 0 < window <= t:
                m = _slide_out(t - window, t - 1, leave, slots, kept, m)
            if reduce == NONE:
                kept[m - 1] = fixed[i]
            else:
                queries = slice(s * group, (s + 1) * group)
                full, sink = rows[rows_run, layer, queries, i], missing[sink_run, layer, queries]
                _weigh(full, sink, scale_row, t, reduce, slots, m, weight)
                divisor = group if reduce == MEAN else 1
                for k in range(m):
                    kept[k] = state.score.dtype.type(weight[k] / divisor) + decay * kept[k]
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
def _gather(alive: Array, score: Array, slots: Array, kept: Array) -> int:
    """Fill the slots with the keys in the cache, and return their number."""
    m = 0
    for j in range(len(alive)):
        if alive[j]:
            slots[m], kept[m] = j, score[j]
            m += 1
    return m


@compiled
def _slide_out(key: int, step: int, leave: Array, slots: Array, kept: Array, m: int) -> int:
    """Remove the key that has slid out of a sliding-window layer, and return how many keys remain."""
    if leave[key] == NEVER:
        leave[key] = step
    return _remove(slots, kept, 0, m) if slots[0] == key else m


@compiled
def _weigh(rows: Array, missing: Array, scale: Array, t: int, reduce: int, slots: Array, m: int, weight: Array) -> None:
    """Write the reduced live weight of a group of query heads for each slot to `weight`; for a mean, the sum."""
    weight[:m] = 0
    for h in range(rows.shape[0]):
        row = rows[h]
        of_row = _total_of_double(row, slots, m) if row.itemsize == 8 else _total(row, slots, m)
        total = of_row + (missing[h, t] if missing.shape[1] else 0)
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
def _total(row: Array, slots: Array, m: int) -> float:
    """Return the sum of a row in 32 bit over `m` slots in float64; four partial sums, so that additions can overlap."""
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
def _total_of_double(row: Array, slots: Array, m: int) -> float:
    """Return the sum of a row in double over `m` slots, as `kvscope.kernels.totals` has it."""
    upper = lower = 0.0
    for k in range(m):
        weight = row[slots[k]]
        multiple = weight + SPLIT - SPLIT
        upper += multiple
        lower += weight - multiple
    return upper + lower


@compiled
def _evict(surplus: int, t: int, low: int, high: int, leave: Array, slots: Array, kept: Array, m: int) -> int:
    """Evict the `surplus` lowest scores of the slots `low` to `high` - 1, and return how many keys remain."""
    if surplus == 1:
        lowest = low
        for k in range(low + 1, high):
            if kept[k] < kept[lowest]:  # strict, so that the oldest of equal scores is evicted
                lowest = k
        leave[slots[lowest]] = t
        return _remove(slots, kept, lowest, m)
    order = np.argsort(kept[low:high], kind="mergesort")  # stable: the same rule for ties
    for k in order[:surplus]:
        leave[slots[low + k]] = t
    remaining = 0
    for k in range(m):
        if leave[slots[k]] != t:
            slots[remaining], kept[remaining] = slots[k], kept[k]
            remaining += 1
    return remaining


@compiled
def _remove(slots: Array, kept: Array, place: int, m: int) -> int:
    """Remove the slot at `place`, and return how many keys remain."""
    for k in range(place, m - 1):
        slots[k], kept[k] = slots[k + 1], kept[k + 1]
    return m - 1
