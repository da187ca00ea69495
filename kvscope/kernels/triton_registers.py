"""Steps a block of rows with the state of a cache in registers: for sequences that fit."""


# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from kvscope.kernels.triton_common import (
    IS_MAX,
    IS_MEAN,
    IS_NONE,
    NEVER,
    finite,
    ordered,
    reduced,
    rounded_quotient,
    upper_and_lower,
)


@triton.jit
def _lowest(score, candidate, count, BITS: tl.constexpr):
    """Return which `count` candidates have the lowest scores ``[N]``, the oldest first of equal ones.

    The count-th lowest score is found bit by bit, from the highest down.
    """
    key = ordered(score)
    bit = tl.full([1], 1, key.dtype) << (BITS - 1)
    limit = tl.full([1], 0, key.dtype)
    for _ in range(BITS):
        trial = limit | bit
        below = tl.sum((candidate & (key < trial)).to(tl.int32), 0)
        limit = tl.where(below < count, trial, limit)
        bit = bit >> 1
    lower = candidate & (key < limit)
    equal = candidate & (key == limit)
    room = count - tl.sum(lower.to(tl.int32), 0)
    return lower | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room))


@triton.jit
def _weights(
    rows, missing, factor, held, together, head_stride, length,
    REDUCE: tl.constexpr, HAS_MISSING: tl.constexpr, QB: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Return the weights ``[N]`` of one step in double: live rows of a group of query heads, made one."""
    j = tl.arange(0, N)
    q = tl.arange(0, QB)
    weight = tl.zeros([N], tl.float64)
    for h in range(0, together, QB):
        here = h + q < together
        place = rows + (h + q)[:, None] * head_stride + j[None, :]
        row = tl.load(place, mask=here[:, None] & held[None, :], other=0.0)  # [QB, N]
        upper, lower = upper_and_lower(row)
        total = tl.sum(upper, 1) + tl.sum(lower, 1)
        if HAS_MISSING:
            total += tl.load(missing + (h + q) * length, mask=here, other=0.0)
        norm = tl.where(total > 0, total.to(row.dtype), 1.0).to(row.dtype)
        live = rounded_quotient(row, norm[:, None]) * factor[None, :]
        one = reduced(live, REDUCE)
        weight = tl.maximum(weight, one) if REDUCE == IS_MAX else weight + one
    if REDUCE == IS_MEAN:
        weight = weight / together
    return weight


@triton.jit
def _evicted(score, candidate, count, BITS: tl.constexpr, N: tl.constexpr):
    """Return which `count` candidates are evicted, bool ``[N]``: the lowest scores, the oldest of equal ones."""
    ranked = finite(score)
    if count == 1:
        j = tl.arange(0, N)
        low = tl.min(tl.where(candidate, ranked, float("inf")), 0)
        goes = j == tl.min(tl.where(candidate & (ranked == low), j, N), 0)
    else:
        goes = _lowest(ranked, candidate, count, BITS)
    return goes


@triton.jit
def step_in_registers(
    rows, missing, scale, fixed, alive, score, leave, count, evictions, budget, sinks, recent, windows, evicts, decay,
    bad, start, steps, length, layers, heads, together, row_runs, missing_runs, scale_runs, fixed_runs,
    run_stride, layer_stride, head_stride, step_stride,
    REDUCE: tl.constexpr, HAS_MISSING: tl.constexpr, HAS_SCALE: tl.constexpr,
    QB: tl.constexpr, N: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Step one cache through a block of rows; arguments as `step_block_triton.step_block` gives them."""
    unit = tl.program_id(0).to(tl.int64)
    r, layer, s = unit // (layers * heads), unit // heads % layers, unit % heads
    j = tl.arange(0, N)
    inside = j < length
    held = tl.load(alive + unit * length + j, mask=inside, other=0) != 0
    points = tl.load(score + unit * length + j, mask=inside, other=0.0)
    gone_at = tl.load(leave + unit * length + j, mask=inside, other=0)
    size, most = tl.load(count + unit), tl.load(budget + unit)
    first, newest, window = tl.load(sinks + r), tl.load(recent + r), tl.load(windows + layer)
    evicted, wrong, left = tl.load(evictions + unit), tl.load(bad + unit).to(tl.int32), tl.load(decay)
    own = rows + tl.minimum(r, row_runs - 1) * run_stride + layer * layer_stride + s * together * head_stride
    lost = missing + ((tl.minimum(r, missing_runs - 1) * layers + layer) * heads + s) * together * length
    factor = tl.full([N], 1, rows.dtype.element_ty)
    if HAS_SCALE:
        place = ((tl.minimum(r, scale_runs - 1) * layers + layer) * heads + s) * length
        factor = tl.load(scale + place + j, mask=inside, other=0.0).to(rows.dtype.element_ty)
    arriving = fixed + ((tl.minimum(r, fixed_runs - 1) * layers + layer) * heads + s) * steps
    for i in range(steps):
        t = start + i
        held = held | (j == t)
        size += 1
        if window > 0:
            forgotten = held & (j == t - window)
            gone_at = tl.where(forgotten & (gone_at == NEVER), t - 1, gone_at)
            size -= tl.sum(forgotten.to(tl.int32), 0)
            held = held & (j != t - window)
        if REDUCE == IS_NONE:
            points = tl.where(j == t, tl.load(arriving + i).to(points.dtype), points)
        else:
            weight = _weights(
                own + i * step_stride, lost + t, factor, held, together, head_stride, length, REDUCE, HAS_MISSING, QB, N
            )
            points = weight.to(points.dtype) + left * points
        surplus = (size - most).to(tl.int32)
        if (tl.load(evicts + i) != 0) & (surplus > 0):
            wrong |= tl.max((held & (points != points)).to(tl.int32), 0)
            candidate = held & (j >= first) & (j < t + 1 - newest)
            goes = _evicted(points, candidate, surplus, BITS, N)
            went = tl.sum(goes.to(tl.int32), 0)
            held = held & (goes == 0)
            gone_at = tl.where(goes, t, gone_at)
            size -= went
            evicted += went
    tl.store(alive + unit * length + j, held.to(tl.uint8), mask=inside)
    tl.store(score + unit * length + j, points, mask=inside)
    tl.store(leave + unit * length + j, gone_at, mask=inside)
    tl.store(count + unit, size)
    tl.store(evictions + unit, evicted)
    tl.store(bad + unit, (wrong != 0).to(tl.uint8))
