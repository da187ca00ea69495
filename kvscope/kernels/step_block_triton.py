"""Steps caches through a block of rows on a GPU, in Triton: the decisions of `step_block`.

One program steps one deciding head of one run through a whole block of queries. Which keys are held, their scores and
when they were evicted lie in registers up to `MOST_KEYS` keys; beyond that in global memory, walked through in tiles.

Sums over a row and over the query heads of a group are made in double and rounded once, and a product is rounded before
it is added to, so that decisions are those of a CPU.
"""


# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_KEYS = 8192  # keys whose state is held in registers
WEIGHTS_AT_ONCE = 16384  # weights, of query heads times keys, that are in registers at once
NONE, MEAN, MAX, SUM = range(4)  # how the query heads of a group become one
REDUCTIONS = {"none": NONE, "mean": MEAN, "max": MAX, "sum": SUM}
_NONE, _MEAN, _MAX = tl.constexpr(NONE), tl.constexpr(MEAN), tl.constexpr(MAX)
_NEVER = tl.constexpr(2**31 - 1)


@triton.jit
def _ordered(score):
    """Return scores as unsigned integers in the same order; -0 is +0."""
    positive = score + 0.0
    if score.dtype == tl.float64:
        bits = positive.to(tl.uint64, bitcast=True)
        sign = tl.full([1], 1, tl.uint64) << 63
    else:
        bits = positive.to(tl.uint32, bitcast=True)
        sign = tl.full([1], 1, tl.uint32) << 31
    every = sign | (sign - 1)
    return tl.where((bits & sign) != 0, bits ^ every, bits | sign)


@triton.jit
def _finite(score):
    """Return scores with infinity replaced by the largest number, so that no candidate looks like a protected key."""
    if score.dtype == tl.float64:
        return tl.where(score == float("inf"), 1.7976931348623157e308, score)
    return tl.where(score == float("inf"), 3.4028234663852886e38, score)


@triton.jit
def _rounded_quotient(row, norm):
    if row.dtype == tl.float32:
        return tl.div_rn(row, tl.broadcast_to(norm, row.shape))
    return row / norm


@triton.jit
def _reduced(live, REDUCE: tl.constexpr):
    """Return weights of query heads ``[QB, N]`` as one for each key, in double; a mean is left a sum."""
    if REDUCE == _MAX:
        return tl.max(live.to(tl.float64), 0)
    return tl.sum(live.to(tl.float64), 0)


@triton.jit
def _lowest(score, candidate, count, BITS: tl.constexpr):
    """Return which `count` candidates have the lowest scores ``[N]``, the oldest first of equal ones.

    The count-th lowest score is found bit by bit, from the highest down.
    """
    key = _ordered(score)
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
def _step_in_registers(
    rows, missing, scale, alive, score, leave, count, evictions, budget, sinks, recent, windows, evicts, decay, bad,
    start, steps, length, layers, heads, together, row_runs, missing_runs, scale_runs,
    run_stride, layer_stride, head_stride, step_stride,
    REDUCE: tl.constexpr, HAS_MISSING: tl.constexpr, HAS_SCALE: tl.constexpr,
    QB: tl.constexpr, N: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(0).to(tl.int64)
    r, layer, s = unit // (layers * heads), unit // heads % layers, unit % heads
    j = tl.arange(0, N)
    inside = j < length
    q = tl.arange(0, QB)
    held = tl.load(alive + unit * length + j, mask=inside, other=0) != 0
    points = tl.load(score + unit * length + j, mask=inside, other=0.0)
    gone_at = tl.load(leave + unit * length + j, mask=inside, other=0)
    size, most = tl.load(count + unit), tl.load(budget + unit)
    first, newest, window = tl.load(sinks + r), tl.load(recent + r), tl.load(windows + layer)
    evicted, wrong = tl.load(evictions + unit), tl.load(bad + unit).to(tl.int32)
    left = tl.load(decay)
    own = rows + tl.minimum(r, row_runs - 1) * run_stride + layer * layer_stride + s * together * head_stride
    lost = missing + ((tl.minimum(r, missing_runs - 1) * layers + layer) * heads + s) * together * length
    factor = tl.full([N], 1, rows.dtype.element_ty)
    if HAS_SCALE:
        place = ((tl.minimum(r, scale_runs - 1) * layers + layer) * heads + s) * length
        factor = tl.load(scale + place + j, mask=inside, other=0.0).to(rows.dtype.element_ty)
    for i in range(steps):
        t = start + i
        held = held | (j == t)
        size += 1
        if window > 0:
            forgotten = held & (j == t - window)
            gone_at = tl.where(forgotten & (gone_at == _NEVER), t - 1, gone_at)
            size -= tl.sum(forgotten.to(tl.int32), 0)
            held = held & (j != t - window)
        if REDUCE == _NONE:
            points = tl.where(j == t, t.to(points.dtype), points)
        else:
            weight = tl.zeros([N], tl.float64)
            for h in range(0, together, QB):
                here = (h + q < together)[:, None]
                place = own + (h + q)[:, None] * head_stride + i * step_stride + j[None, :]
                row = tl.load(place, mask=here & held[None, :], other=0.0)  # [QB, N]
                total = tl.sum(row.to(tl.float64), 1)
                if HAS_MISSING:
                    total += tl.load(lost + (h + q) * length + t, mask=h + q < together, other=0.0)
                norm = tl.where(total > 0, total.to(row.dtype), 1.0).to(row.dtype)
                live = _rounded_quotient(row, norm[:, None]) * factor[None, :]
                reduced = _reduced(live, REDUCE)
                weight = tl.maximum(weight, reduced) if REDUCE == _MAX else weight + reduced
            if REDUCE == _MEAN:
                weight = weight / together
            points = weight.to(points.dtype) + left * points
        surplus = (size - most).to(tl.int32)
        if (tl.load(evicts + i) != 0) & (surplus > 0):
            wrong |= tl.max((held & (points != points)).to(tl.int32), 0)
            candidate = held & (j >= first) & (j < t + 1 - newest)
            ranked = _finite(points)
            if surplus == 1:
                low = tl.min(tl.where(candidate, ranked, float("inf")), 0)
                goes = j == tl.min(tl.where(candidate & (ranked == low), j, N), 0)
            else:
                goes = _lowest(ranked, candidate, surplus, BITS)
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


@triton.jit
def _step_in_tiles(
    rows, missing, scale, alive, score, leave, count, evictions, budget, sinks, recent, windows, evicts, decay, bad,
    start, steps, length, layers, heads, together, row_runs, missing_runs, scale_runs,
    run_stride, layer_stride, head_stride, step_stride,
    REDUCE: tl.constexpr, HAS_MISSING: tl.constexpr, HAS_SCALE: tl.constexpr,
    QB: tl.constexpr, N: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """As `_step_in_registers`, for any length: `QB` is all query heads of the group, `N` the keys of a tile.

    A barrier parts what one thread writes from what another one reads.
    """
    unit = tl.program_id(0).to(tl.int64)
    r, layer, s = unit // (layers * heads), unit // heads % layers, unit % heads
    j = tl.arange(0, N)
    q = tl.arange(0, QB)
    alive += unit * length
    score += unit * length
    leave += unit * length
    size, most = tl.load(count + unit), tl.load(budget + unit)
    first, newest, window = tl.load(sinks + r), tl.load(recent + r), tl.load(windows + layer)
    evicted, wrong = tl.load(evictions + unit), tl.load(bad + unit).to(tl.int32)
    left = tl.load(decay)
    own = rows + tl.minimum(r, row_runs - 1) * run_stride + layer * layer_stride + s * together * head_stride
    lost = missing + ((tl.minimum(r, missing_runs - 1) * layers + layer) * heads + s) * together * length
    factors = scale + ((tl.minimum(r, scale_runs - 1) * layers + layer) * heads + s) * length
    for i in range(steps):
        t = start + i
        n = t + 1
        tl.store(alive + t, 1)
        size += 1
        if (window > 0) & (t >= window):
            if tl.load(alive + t - window) != 0:
                size -= 1
                if tl.load(leave + t - window) == _NEVER:
                    tl.store(leave + t - window, t - 1)
            tl.debug_barrier()
            tl.store(alive + t - window, 0)
        tl.debug_barrier()
        place = own + q[:, None] * head_stride + i * step_stride
        total = tl.zeros([QB], tl.float64)
        if REDUCE != _NONE:
            for edge in range(0, n, N):
                held = tl.load(alive + edge + j, mask=edge + j < n, other=0) != 0
                seen = (q < together)[:, None] & held[None, :]
                total += tl.sum(tl.load(place + edge + j[None, :], mask=seen, other=0.0).to(tl.float64), 1)
            if HAS_MISSING:
                total += tl.load(lost + q * length + t, mask=q < together, other=0.0)
        norm = tl.where(total > 0, total.to(rows.dtype.element_ty), 1.0).to(rows.dtype.element_ty)
        low = tl.full([1], float("inf"), score.dtype.element_ty)
        lowest = tl.full([1], length, tl.int32)
        for edge in range(0, n, N):
            key = edge + j
            held = tl.load(alive + key, mask=key < n, other=0) != 0
            points = tl.load(score + key, mask=key < n, other=0.0)
            if REDUCE == _NONE:
                points = tl.where(key == t, t.to(points.dtype), points)
            else:
                seen = (q < together)[:, None] & held[None, :]
                live = _rounded_quotient(tl.load(place + key[None, :], mask=seen, other=0.0), norm[:, None])
                if HAS_SCALE:
                    live = live * tl.load(factors + key, mask=key < n, other=0.0).to(live.dtype)[None, :]
                weight = _reduced(live, REDUCE)
                if REDUCE == _MEAN:
                    weight = weight / together
                points = weight.to(points.dtype) + left * points
            tl.store(score + key, points, mask=key < n)
            ranked = _finite(points)
            candidate = held & (key >= first) & (key < n - newest)
            wrong |= tl.max((held & (points != points)).to(tl.int32), 0) & (tl.load(evicts + i) & (size > most))
            least = tl.min(tl.where(candidate, ranked, float("inf")), 0)
            oldest = tl.min(tl.where(candidate & (ranked == least), key, length), 0)
            lowest = tl.where(least < low, oldest, lowest)  # an equal score in a later tile is that of a newer key
            low = tl.where(least < low, least, low)
        surplus = (size - most).to(tl.int32)
        if (tl.load(evicts + i) != 0) & (surplus > 0):
            tl.debug_barrier()
            if surplus == 1:
                gone = tl.max(lowest, 0)
                tl.store(alive + gone, 0)
                tl.store(leave + gone, t)
            else:
                limit = _limit_in_tiles(score, alive, surplus, n, first, n - newest, BITS, N)
                room = surplus.to(tl.int32)
                for edge in range(0, n, N):
                    bits, candidate = _ordered_tile(score, alive, edge + j, n, first, n - newest)
                    room -= tl.sum((candidate & (bits < limit)).to(tl.int32), 0)
                tl.debug_barrier()
                for edge in range(0, n, N):
                    bits, candidate = _ordered_tile(score, alive, edge + j, n, first, n - newest)
                    equal = (candidate & (bits == limit)).to(tl.int32)
                    goes = (candidate & (bits < limit)) | ((equal != 0) & (tl.cumsum(equal, 0) <= room))
                    room -= tl.sum(equal, 0)
                    tl.store(alive + edge + j, 0, mask=goes)
                    tl.store(leave + edge + j, t, mask=goes)
            size -= surplus
            evicted += surplus
        tl.debug_barrier()
    tl.store(count + unit, size)
    tl.store(evictions + unit, evicted)
    tl.store(bad + unit, (wrong != 0).to(tl.uint8))


@triton.jit
def _ordered_tile(score, alive, key, n, first, end):
    """Return scores of some keys as ordered integers, and which of the keys may be evicted."""
    held = tl.load(alive + key, mask=key < n, other=0) != 0
    points = tl.load(score + key, mask=key < n, other=0.0)
    return _ordered(_finite(points)), held & (key >= first) & (key < end)


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


class TritonState(NamedTuple):
    """State of the caches on a GPU; the fields are those of `KernelState`, `windows` a tensor too."""

    alive: Tensor
    score: Tensor
    leave: Tensor
    n_alive: Tensor
    evictions: Tensor
    budget: Tensor
    sinks: Tensor
    recent: Tensor
    windows: Tensor


def step_block(
    reduce: str,
    decay: Tensor,
    state: TritonState,
    rows: Tensor,
    start: int,
    evicts: Tensor,
    *,
    missing: Tensor | None = None,
    scale: Tensor | None = None,
    most_keys: int = MOST_KEYS,
) -> Tensor:
    """Step caches through a block of rows, and return which heads had a score that is not a number.

    Nothing waits for the device.

    Parameters
    ----------
    reduce : {"none", "mean", "max", "sum"}
        How the query heads of a group become one; ``none``: the score of a key is its position.
    decay : Tensor
        ``[1]``, in the precision of the scores: what is left of the score of the step before.
    state : TritonState
        Changed in place.
    rows : Tensor
        Full rows ``[R or 1, L, H, b, n]`` of steps `start` to ``start + b - 1``.
    start : int
        First step.
    evicts : Tensor
        uint8 ``[b]``: whether keys are evicted at the end of each step.
    missing : Tensor or None
        ``[R or 1, L, H, T]``: mass that a learned sink takes from each row.
    scale : Tensor or None
        ``[R or 1, L, S, T]``: what each weight is multiplied by.
    most_keys : int
        Keys whose state may be held in registers.

    Returns
    -------
    Tensor
        uint8 ``[R, L, S]``.
    """
    runs, layers, heads, length = state.leave.shape
    together = rows.shape[2] // heads
    bad = torch.zeros((runs, layers, heads), dtype=torch.uint8, device=rows.device)
    keys = triton.next_power_of_2(length)
    registers = keys <= most_keys
    group = triton.next_power_of_2(together)
    if registers:
        block_heads = min(group, max(1, WEIGHTS_AT_ONCE // keys))
    else:
        block_heads, keys = group, max(16, min(most_keys, WEIGHTS_AT_ONCE // group))
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    run_stride, layer_stride, head_stride, step_stride, _ = rows.stride()
    kernel = _step_in_registers if registers else _step_in_tiles
    kernel[(runs * layers * heads,)](
        rows, rows if missing is None else missing.contiguous(), rows if scale is None else scale.contiguous(),
        state.alive.view(torch.uint8), state.score, state.leave, state.n_alive, state.evictions, state.budget,
        state.sinks, state.recent, state.windows, evicts, decay, bad,
        start, rows.shape[3], length, layers, heads, together, rows.shape[0],
        1 if missing is None else missing.shape[0], 1 if scale is None else scale.shape[0],
        run_stride, layer_stride, head_stride, step_stride,
        REDUCE=REDUCTIONS[reduce], HAS_MISSING=missing is not None, HAS_SCALE=scale is not None,
        QB=block_heads, N=keys, BITS=8 * state.score.element_size(),
        num_warps=_warps(keys), enable_fp_fusion=False,
    )  # fmt: skip
    return bad


def _warps(keys: int) -> int:
    """Return how many warps share the keys of a program: four keys a thread, up to the most that a block holds."""
    return max(1, min(16, keys // 128))
