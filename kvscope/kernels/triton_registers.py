"""Steps a block of rows with the state of a cache in registers: for sequences that fit."""


# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from kvscope.kernels.triton_common import (
    IS_MAX,
    IS_MEAN,
    IS_NONE,
    finite,
    ordered,
    place_of,
    reduced,
    rounded_quotient,
    rows_of,
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
def _sum_of_row(row, axis: tl.constexpr):
    """Return the sum of rows in double along an axis; rows in double are added as `kvscope.kernels.totals` does."""
    if row.dtype == tl.float64:
        upper, lower = upper_and_lower(row)
        return tl.sum(upper, axis) + tl.sum(lower, axis)
    return tl.sum(row.to(tl.float64), axis)


@triton.jit
def _row(own, i, t, steps, N: tl.constexpr):
    """Return the row of step `i` of a block, at position `t`, ``[N]``; zeros beyond the block."""
    j = tl.arange(0, N)
    return tl.load(own + j, mask=(j <= t) & (i < steps), other=0.0)


@triton.jit
def _rows(own, h, i, t, steps, together, head_stride, QB: tl.constexpr, N: tl.constexpr):
    """Return the rows ``[QB, N]`` of query heads from `h` on, of step `i` at position `t`; zeros beyond the block."""
    j, q = tl.arange(0, N), h + tl.arange(0, QB)
    place = own + q[:, None] * head_stride + j[None, :]
    return tl.load(place, mask=(q < together)[:, None] & (j <= t)[None, :] & (i < steps), other=0.0)


@triton.jit
def _first(own, t, steps, together, head_stride, QB: tl.constexpr, N: tl.constexpr):
    """Return the first rows of a block: ``[N]`` of one query head, ``[QB, N]`` of a group."""
    if QB == 1:
        return _row(own, 0, t, steps, N)
    else:
        return _rows(own, 0, 0, t, steps, together, head_stride, QB, N)


@triton.jit
def _with_key(held, size, leave, t, window, N: tl.constexpr):
    """Return the held keys and their number with key `t`, without the one that the layer's window no longer reaches."""
    j = tl.arange(0, N)
    held = held | (j == t)
    size += 1
    if window > 0:
        there = tl.sum((held & (j == t - window)).to(tl.int32), 0)
        tl.store(leave + t - window, t - 1, mask=there > 0)
        size -= there
        held = held & (j != t - window)
    return held, size


@triton.jit
def _factor(scale, rows, inside, HAS_SCALE: tl.constexpr, N: tl.constexpr):
    """Return what each weight is multiplied by ``[N]``, in the precision of the rows."""
    if HAS_SCALE:
        return tl.load(scale + tl.arange(0, N), mask=inside, other=0.0).to(rows.dtype.element_ty)
    else:
        return tl.full([N], 1, rows.dtype.element_ty)


@triton.jit
def _live_of_one(row, missing, factor, HAS_MISSING: tl.constexpr, HAS_SCALE: tl.constexpr):
    """Return the live row ``[N]`` of the only query head: `row` is zero at keys that are not held."""
    total = _sum_of_row(row, 0)
    if HAS_MISSING:
        total += tl.load(missing)
    norm = tl.where(total > 0, total.to(row.dtype), 1.0).to(row.dtype)
    live = rounded_quotient(row, norm)
    if HAS_SCALE:
        live = live * factor
    return live


@triton.jit
def live_of_group(
    rows, missing, factor, h, together, length, REDUCE: tl.constexpr, HAS_MISSING: tl.constexpr,
    HAS_SCALE: tl.constexpr, QB: tl.constexpr,
):  # fmt: skip
    """Return the live rows of query heads from `h` on, made one, in double ``[N]``: `rows` as in `_live_of_one`."""
    q = h + tl.arange(0, QB)
    total = _sum_of_row(rows, 1)
    if HAS_MISSING:
        total += tl.load(missing + q * length, mask=q < together, other=0.0)
    norm = tl.where(total > 0, total.to(rows.dtype), 1.0).to(rows.dtype)
    live = rounded_quotient(rows, norm[:, None])
    if HAS_SCALE:
        live = live * factor[None, :]
    return reduced(live, REDUCE)


@triton.jit
def _weights(
    ahead, own, held, missing, factor, i, t, steps, together, head_stride, step_stride, length,
    REDUCE: tl.constexpr, HAS_MISSING: tl.constexpr, HAS_SCALE: tl.constexpr, QB: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Return the weights of one step ``[N]``, and the first rows of the next step.

    `ahead` is the first rows of this step. Rows are loaded before those at hand are used: which of their weights count
    is known only once the step before has evicted, and memory would be waited for in every step. One query head is a
    case of its own: its weights need no second axis and no second precision.
    """
    if QB == 1:
        row = tl.where(held, ahead, 0.0)
        following = _row(own + (i + 1) * step_stride, i + 1, t + 1, steps, N)
        return _live_of_one(row, missing, factor, HAS_MISSING, HAS_SCALE), following
    else:
        weight = tl.zeros([N], tl.float64)
        for h in range(0, together, QB):
            rows = tl.where(held[None, :], ahead, 0.0)
            last = (h + QB >= together).to(tl.int32)  # the next rows are those of the next step
            place = own + (i + last) * step_stride
            ahead = _rows(place, (h + QB) * (1 - last), i + last, t + last, steps, together, head_stride, QB, N)
            one = live_of_group(rows, missing, factor, h, together, length, REDUCE, HAS_MISSING, HAS_SCALE, QB)
            weight = tl.maximum(weight, one) if REDUCE == IS_MAX else weight + one
        if REDUCE == IS_MEAN:
            weight = weight / together
        return weight, ahead


@triton.jit
def evicted_keys(points, candidate, count, leave, t, BITS: tl.constexpr, N: tl.constexpr):
    """Return which `count` candidates are evicted, bool ``[N]``, and how many: the lowest scores, the oldest of equal
    ones. When they leave is stored.
    """
    j = tl.arange(0, N)
    ranked = finite(points)
    if count == 1:
        low, key = tl.min(tl.where(candidate, ranked, float("inf")), 0, return_indices=True)
        went = tl.where(low < float("inf"), 1, 0).to(tl.int32)
        goes = (j == key) & (went > 0)
        tl.store(leave + key, t, mask=went > 0)
    else:
        goes = _lowest(ranked, candidate, count, BITS)
        went = tl.sum(goes.to(tl.int32), 0)
        tl.store(leave + j, tl.zeros([N], tl.int32) + t, mask=goes)
    return goes, went


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
    r, layer = unit // (layers * heads), unit // heads % layers
    j = tl.arange(0, N)
    inside = j < length
    leave = leave + unit * length
    held = tl.load(alive + unit * length + j, mask=inside, other=0) != 0
    points = tl.load(score + unit * length + j, mask=inside, other=0.0)
    size, most = tl.load(count + unit), tl.load(budget + unit)
    first, newest, window = tl.load(sinks + r), tl.load(recent + r), tl.load(windows + layer)
    evicted, wrong, left = tl.load(evictions + unit), tl.zeros([N], tl.int32), tl.load(decay)
    own = rows_of(rows, unit, layers, heads, together, row_runs, run_stride, layer_stride, head_stride)
    lost = missing + place_of(unit, missing_runs, layers * heads) * together * length
    arriving = fixed + place_of(unit, fixed_runs, layers * heads) * steps
    factor = _factor(scale + place_of(unit, scale_runs, layers * heads) * length, rows, inside, HAS_SCALE, N)
    if REDUCE != IS_NONE:
        ahead = _first(own, start, steps, together, head_stride, QB, N)
    for i in range(steps):
        t = start + i
        held, size = _with_key(held, size, leave, t, window, N)
        if REDUCE == IS_NONE:
            points = tl.where(j == t, tl.load(arriving + i).to(points.dtype), points)
        else:
            weight, ahead = _weights(
                ahead, own, held, lost + t, factor, i, t, steps, together, head_stride, step_stride, length,
                REDUCE, HAS_MISSING, HAS_SCALE, QB, N,
            )  # fmt: skip
            points = weight.to(points.dtype) + left * points
        surplus = (size - most).to(tl.int32)
        if (tl.load(evicts + i) != 0) & (surplus > 0):
            wrong |= (held & (points != points)).to(tl.int32)
            candidate = held & (j >= first) & (j < t + 1 - newest)
            goes, went = evicted_keys(points, candidate, surplus, leave, t, BITS, N)
            held = held & (goes == 0)
            size -= went
            evicted += went
    tl.store(alive + unit * length + j, held.to(tl.uint8), mask=inside)
    tl.store(score + unit * length + j, points, mask=inside)
    tl.store(count + unit, size)
    tl.store(evictions + unit, evicted)
    tl.store(bad + unit, tl.max(wrong, 0).to(tl.uint8))
