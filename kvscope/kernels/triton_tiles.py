"""Steps a block of rows with the state of a cache in global memory, tile by tile: for sequences of any length."""


# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from kvscope.kernels.triton_common import (
    IS_MEAN,
    IS_NONE,
    NEVER,
    finite,
    ordered,
    place_of,
    reduced,
    rounded_quotient,
    rows_of,
    upper_and_lower,
)


@triton.jit
def _ordered_tile(score, alive, key, n, first, end):
    """Return scores of some keys as ordered integers, and which of the keys may be evicted."""
    held = tl.load(alive + key, mask=key < n, other=0) != 0
    points = tl.load(score + key, mask=key < n, other=0.0)
    return ordered(finite(points)), held & (key >= first) & (key < end)


@triton.jit
def _limit_in_tiles(score, alive, count, n, first, end, BITS: tl.constexpr, N: tl.constexpr):
    """Return the count-th lowest score of the candidates, as an ordered integer; see `_lowest`."""
    j = tl.arange(0, N)
    if BITS == 64:
        limit = tl.full([1], 0, tl.uint64)
        bit = tl.full([1], 1, tl.uint64) << 63
    else:
        limit = tl.full([1], 0, tl.uint32)
        bit = tl.full([1], 1, tl.uint32) << 31
    for _ in range(BITS):
        trial = limit | bit
        below = tl.full([1], 0, tl.int32)
        for edge in range(0, n, N):
            bits, candidate = _ordered_tile(score, alive, edge + j, n, first, end)
            below += tl.sum((candidate & (bits < trial)).to(tl.int32), 0)
        limit = tl.where(below < count, trial, limit)
        bit = bit >> 1
    return limit


@triton.jit
def _forget(alive, leave, key, step):
    """Drop a key that the layer's own window no longer reaches; returns 1 if it was in the cache, 0 otherwise."""
    there = (tl.load(alive + key) != 0).to(tl.int32)
    tl.store(leave + key, step, mask=(there != 0) & (tl.load(leave + key) == NEVER))
    tl.debug_barrier()
    tl.store(alive + key, 0)
    return there


@triton.jit
def _norms(rows, alive, missing, n, here, HAS_MISSING: tl.constexpr, QB: tl.constexpr, N: tl.constexpr):
    """Return what the row of each query head of the group is divided by, ``[QB]``."""
    j = tl.arange(0, N)
    total = tl.zeros([QB], tl.float64)
    rest = tl.zeros([QB], tl.float64)
    for edge in range(0, n, N):
        held = tl.load(alive + edge + j, mask=edge + j < n, other=0) != 0
        seen = here[:, None] & held[None, :]
        upper, lower = upper_and_lower(tl.load(rows + edge + j[None, :], mask=seen, other=0.0))
        total += tl.sum(upper, 1)
        rest += tl.sum(lower, 1)
    total += rest
    if HAS_MISSING:
        total += tl.load(missing, mask=here, other=0.0)
    kind = rows.dtype.element_ty
    return tl.where(total > 0, total.to(kind), 1.0).to(kind)


@triton.jit
def _weights(
    rows, factors, norm, held, key, here, together, REDUCE: tl.constexpr, HAS_SCALE: tl.constexpr
):  # fmt: skip
    """Return the weights of one tile of keys in double, ``[N]``: live rows of a group of query heads, made one."""
    seen = here[:, None] & held[None, :]
    live = rounded_quotient(tl.load(rows + key[None, :], mask=seen, other=0.0), norm[:, None])
    if HAS_SCALE:
        live = live * tl.load(factors + key, mask=held, other=0.0).to(live.dtype)[None, :]
    weight = reduced(live, REDUCE)
    if REDUCE == IS_MEAN:
        weight = weight / together
    return weight


@triton.jit
def _evict_in_tiles(score, alive, leave, lowest, count, t, first, end, BITS: tl.constexpr, N: tl.constexpr):
    """Evict the `count` lowest scores after step `t`, the oldest of equal ones; `lowest` is the first of them."""
    if count == 1:
        key = tl.max(lowest, 0)
        tl.store(alive + key, 0)
        tl.store(leave + key, t)
    else:
        _evict_several(score, alive, leave, count, t, first, end, BITS, N)


@triton.jit
def _evict_several(score, alive, leave, count, t, first, end, BITS: tl.constexpr, N: tl.constexpr):
    j = tl.arange(0, N)
    n = t + 1
    limit = _limit_in_tiles(score, alive, count, n, first, end, BITS, N)
    room = count.to(tl.int32)
    for edge in range(0, n, N):
        bits, candidate = _ordered_tile(score, alive, edge + j, n, first, end)
        room -= tl.sum((candidate & (bits < limit)).to(tl.int32), 0)
    tl.debug_barrier()
    for edge in range(0, n, N):
        bits, candidate = _ordered_tile(score, alive, edge + j, n, first, end)
        equal = (candidate & (bits == limit)).to(tl.int32)
        goes = (candidate & (bits < limit)) | ((equal != 0) & (tl.cumsum(equal, 0) <= room))
        room -= tl.sum(equal, 0)
        tl.store(alive + edge + j, 0, mask=goes)
        tl.store(leave + edge + j, t, mask=goes)


@triton.jit
def step_in_tiles(
    rows, missing, scale, fixed, alive, score, leave, count, evictions, budget, sinks, recent, windows, evicts, decay,
    bad, start, steps, length, layers, heads, together, row_runs, missing_runs, scale_runs, fixed_runs,
    run_stride, layer_stride, head_stride, step_stride,
    REDUCE: tl.constexpr, HAS_MISSING: tl.constexpr, HAS_SCALE: tl.constexpr,
    QB: tl.constexpr, N: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """As `step_in_registers`, for any length: `QB` is all query heads of the group, `N` the keys of a tile."""
    unit = tl.program_id(0).to(tl.int64)
    r, layer = unit // (layers * heads), unit // heads % layers
    j, q = tl.arange(0, N), tl.arange(0, QB)
    alive, score, leave = alive + unit * length, score + unit * length, leave + unit * length
    size, most = tl.load(count + unit), tl.load(budget + unit)
    first, newest, window = tl.load(sinks + r), tl.load(recent + r), tl.load(windows + layer)
    evicted, wrong, left = tl.load(evictions + unit), tl.load(bad + unit).to(tl.int32), tl.load(decay)
    own = rows_of(rows, unit, layers, heads, together, row_runs, run_stride, layer_stride, head_stride)
    lost = missing + place_of(unit, missing_runs, layers * heads) * together * length
    factors = scale + place_of(unit, scale_runs, layers * heads) * length
    arriving = fixed + place_of(unit, fixed_runs, layers * heads) * steps
    for i in range(steps):
        t = start + i
        n = t + 1
        tl.store(alive + t, 1)
        size += 1
        if (window > 0) & (t >= window):
            size -= _forget(alive, leave, t - window, t - 1)
        tl.debug_barrier()  # between what one thread writes and another one reads
        place = own + q[:, None] * head_stride + i * step_stride
        norm = tl.full([QB], 1, rows.dtype.element_ty)
        if REDUCE != IS_NONE:
            norm = _norms(place, alive, lost + q * length + t, n, q < together, HAS_MISSING, QB, N)
        low = tl.full([1], float("inf"), score.dtype.element_ty)
        lowest = tl.full([1], length, tl.int32)
        for edge in range(0, n, N):
            key = edge + j
            held = tl.load(alive + key, mask=key < n, other=0) != 0
            points = tl.load(score + key, mask=key < n, other=0.0)
            if REDUCE == IS_NONE:
                points = tl.where(key == t, tl.load(arriving + i).to(points.dtype), points)
            else:
                weight = _weights(place, factors, norm, held, key, q < together, together, REDUCE, HAS_SCALE)
                points = weight.to(points.dtype) + left * points
            tl.store(score + key, points, mask=key < n)
            ranked = finite(points)
            candidate = held & (key >= first) & (key < n - newest)
            wrong |= tl.max((held & (points != points)).to(tl.int32), 0) & (tl.load(evicts + i) & (size > most))
            least = tl.min(tl.where(candidate, ranked, float("inf")), 0)
            oldest = tl.min(tl.where(candidate & (ranked == least), key, length), 0)
            lowest = tl.where(least < low, oldest, lowest)  # an equal score in a later tile is that of a newer key
            low = tl.where(least < low, least, low)
        surplus = (size - most).to(tl.int32)
        if (tl.load(evicts + i) != 0) & (surplus > 0):
            tl.debug_barrier()
            _evict_in_tiles(score, alive, leave, lowest, surplus, t, first, n - newest, BITS, N)
            size -= surplus
            evicted += surplus
        tl.debug_barrier()
    tl.store(count + unit, size)
    tl.store(evictions + unit, evicted)
    tl.store(bad + unit, (wrong != 0).to(tl.uint8))
