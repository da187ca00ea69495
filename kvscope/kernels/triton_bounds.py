"""Steps a block of rows where a score is that of the newest row alone, as TOVA's: most scores are not computed.

To decide for ``H`` query heads together, a step sums the weights of every held key in ``H`` rows. Two kernels do less:

1. `bound_scores`, for all steps at once: the scores if no key left the cache within these steps. A row is divided by
   what it has on held keys. That only decreases when keys leave, so these scores are lower bounds of the true ones.
2. `step_by_bounds`, step by step: the true scores of the keys with the lowest bounds only, one after the other, until
   all other bounds are higher than the lowest true score.

True scores are computed as in `kvscope.kernels.triton_registers`, and decide alone.
"""


# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from kvscope.kernels.triton_common import IS_MAX, IS_MEAN, place_of, reduced, rounded_quotient, rows_of
from kvscope.kernels.triton_registers import evicted_keys, live_of_group

VARYING = ("start", "steps", "bounded")  # the kernels are not compiled again for some of their values
# What a bound is multiplied by: sums of a few hundred weights in 32 bit, each divided without exact rounding, have a
# relative error below 2 ** -15.
LOWER = tl.constexpr(1 - 2.0**-14)
SMALL = tl.constexpr(1e-30)  # below, numbers in 32 bit have fewer digits: a bound of 0 is safe
TRIES = tl.constexpr(32)  # scores that take about as long, one after the other, as those of all keys
# A total less the weights of keys is used while it is this part of the old one: 39 binary digits remain, of 24 used.
LEAST_PART = tl.constexpr(2.0**-14)


@triton.jit
def _norm(total):
    """Return what rows are divided by, from what they have on held keys and what a learned sink takes, in double."""
    return tl.where(total > 0, total.to(tl.float32), 1.0)


@triton.jit(do_not_specialize=VARYING[:2])
def bound_scores(
    rows, missing, alive, bounds, totals, start, steps, length, layers, heads, together, row_runs, missing_runs,
    run_stride, layer_stride, head_stride, step_stride,
    REDUCE: tl.constexpr, HAS_MISSING: tl.constexpr, QB: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Bound the scores of all keys at one step of one deciding head, if none leaves the cache from `start` on.

    It writes `bounds`, float32 ``[R, L, S, steps, N]``, and `totals`, double ``[R, L, S, steps, together]``: what each
    row has on these keys and on a learned sink.
    """
    place = tl.program_id(0).to(tl.int64)
    unit, i = place // steps, place % steps
    t, j = start + i, tl.arange(0, N)
    held = tl.load(alive + unit * length + j, mask=j < start, other=1) != 0
    held = held & (j <= t)
    own = rows_of(rows, unit, layers, heads, together, row_runs, run_stride, layer_stride, head_stride)
    own += i * step_stride
    lost = missing + place_of(unit, missing_runs, layers * heads) * together * length + t
    bound = tl.zeros([N], tl.float32)
    for h in range(0, together, QB):
        q = h + tl.arange(0, QB)
        inside = q < together
        weights = tl.load(own + q[:, None] * head_stride + j[None, :], mask=inside[:, None] & held[None, :], other=0.0)
        total = tl.sum(weights.to(tl.float64), 1)
        if HAS_MISSING:
            total += tl.load(lost + q * length, mask=inside, other=0.0)
        tl.store(totals + place * together + q, total, mask=inside)
        live = weights / _norm(total)[:, None]
        bound = tl.maximum(bound, tl.max(live, 0)) if REDUCE == IS_MAX else bound + tl.sum(live, 0)
    if REDUCE == IS_MEAN:
        bound = bound / together
    bound = tl.where(bound < SMALL, 0.0, bound * LOWER)
    tl.store(bounds + place * N + j, bound, mask=j <= t)


@triton.jit
def _totals_now(own, totals, gone, together, head_stride, H: tl.constexpr):
    """Return what rows have now, double ``[H]``: what they had before the keys in `gone` left.

    Also returns how many times the old total is of the new one, at least, and 1 where enough digits remain or 0.
    """
    q = tl.arange(0, H)
    inside = q < together
    there = inside[:, None] & (gone >= 0)[None, :]
    lost = tl.load(own + q[:, None] * head_stride + gone[None, :], mask=there, other=0.0)
    before = tl.load(totals + q, mask=inside, other=0.0)
    total = before - tl.sum(lost.to(tl.float64), 1)
    growth = tl.where(total > 0, before / tl.where(total > 0, total, 1.0), 1.0)
    growth = tl.min(tl.where(inside, growth, float("inf")), 0)
    return total, growth.to(tl.float32), tl.min((total >= before * LEAST_PART).to(tl.int32), 0)


@triton.jit
def _lowest(
    own, totals, gone, bound, candidate, together, head_stride,
    REDUCE: tl.constexpr, H: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Return the candidate with the lowest score, the oldest of equal ones, or `N` if there is none.

    Also returns 1, or 0 where the scores of `TRIES` keys did not decide or digits are missing.
    """
    j, q = tl.arange(0, N), tl.arange(0, H)
    total, growth, enough = _totals_now(own, totals, gone, together, head_stride, H)
    norm = _norm(total)
    rest = tl.where(candidate, bound * growth, float("inf"))
    low, key = tl.min(rest, 0, return_indices=True)
    best = tl.full([], float("inf"), tl.float32)
    found = tl.full([], N, tl.int32)
    tries = tl.full([], 0, tl.int32)
    # Of equal bounds the oldest key is first, so no later one can be better than a score of 0.
    while (low <= best) & (low < float("inf")) & (best > 0) & (tries < TRIES):
        weights = tl.load(own + q * head_stride + key, mask=q < together, other=0.0)
        score = tl.sum(reduced(rounded_quotient(weights, norm)[:, None], REDUCE), 0)
        if REDUCE == IS_MEAN:
            score = score / together
        points = score.to(tl.float32)
        better = (points < best) | ((points == best) & (key < found))
        found = tl.where(better, key, found)
        best = tl.where(better, points, best)
        rest = tl.where(j == key, float("inf"), rest)
        low, key = tl.min(rest, 0, return_indices=True)
        tries += 1
    decided = (low > best) | (low == float("inf")) | (best == 0)
    return found, enough & decided.to(tl.int32)


@triton.jit
def _all_scores(
    own, held, missing, t, together, head_stride, length,
    REDUCE: tl.constexpr, HAS_MISSING: tl.constexpr, QB: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Return the weights of all held keys at one step, double ``[N]``."""
    j = tl.arange(0, N)
    weight = tl.zeros([N], tl.float64)
    for h in range(0, together, QB):
        q = h + tl.arange(0, QB)
        seen = (q < together)[:, None] & (held & (j <= t))[None, :]
        rows = tl.load(own + q[:, None] * head_stride + j[None, :], mask=seen, other=0.0)
        one = live_of_group(rows, missing, j, h, together, length, REDUCE, HAS_MISSING, False, QB)
        weight = tl.maximum(weight, one) if REDUCE == IS_MAX else weight + one
    if REDUCE == IS_MEAN:
        weight = weight / together
    return weight


@triton.jit(do_not_specialize=VARYING)
def step_by_bounds(
    rows, missing, bounds, totals, alive, score, leave, count, evictions, budget, sinks, recent, evicts, decay,
    bad, start, steps, bounded, length, layers, heads, together, row_runs, missing_runs,
    run_stride, layer_stride, head_stride, step_stride,
    REDUCE: tl.constexpr, HAS_MISSING: tl.constexpr, QB: tl.constexpr, N: tl.constexpr, BITS: tl.constexpr,
    H: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Step one cache through at most `MOST` steps, of which the first `bounded` ones may be decided by bounds.

    All scores are computed at other steps, where several keys are evicted and after that, and once one is not a number.
    """
    unit = tl.program_id(0).to(tl.int64)
    r, leave = unit // (layers * heads), leave + unit * length
    j, slot = tl.arange(0, N), tl.arange(0, MOST)
    inside = j < length
    held = tl.load(alive + unit * length + j, mask=inside, other=0) != 0
    points = tl.load(score + unit * length + j, mask=inside, other=0.0)
    size, most = tl.load(count + unit), tl.load(budget + unit)
    first, newest = tl.load(sinks + r), tl.load(recent + r)
    evicted, wrong, left = tl.load(evictions + unit), tl.load(bad + unit).to(tl.int32), tl.load(decay)
    own = rows_of(rows, unit, layers, heads, together, row_runs, run_stride, layer_stride, head_stride)
    lost = missing + place_of(unit, missing_runs, layers * heads) * together * length
    gone = tl.full([MOST], -1, tl.int32)  # keys that were evicted in these steps
    known = 1 - tl.max((held & (points != points)).to(tl.int32), 0)
    following = tl.load(bounds + unit * steps * N + j, mask=j <= start, other=0.0)
    for i in range(steps):
        t, bound = start + i, following  # the next ones are loaded early, or every step would wait for memory
        ahead = (j <= t + 1) & (i + 1 < steps)
        following = tl.load(bounds + (unit * steps + i + 1) * N + j, mask=ahead, other=0.0)
        held = held | (j == t)
        size += 1
        surplus = tl.where(tl.load(evicts + i) != 0, tl.maximum(size - most, 0), 0).to(tl.int32)
        candidate = held & (j >= first) & (j < t + 1 - newest)
        known = known & (1 - tl.max((held & (bound != bound)).to(tl.int32), 0))
        bounds_do = known & (surplus <= 1).to(tl.int32) & (i < bounded).to(tl.int32)
        went = tl.full([], 0, tl.int32)
        if (bounds_do != 0) & (surplus == 1):
            of_step = totals + (unit * steps + i) * together
            key, bounds_do = _lowest(own, of_step, gone, bound, candidate, together, head_stride, REDUCE, H, N)
            if bounds_do != 0:
                went = (key < N).to(tl.int32)
                tl.store(leave + key, t, mask=went != 0)
                held = held & (j != key)
                gone = tl.where((slot == i) & (went != 0), key, gone)
        if bounds_do == 0:
            weight = _all_scores(own, held, lost + t, t, together, head_stride, length, REDUCE, HAS_MISSING, QB, N)
            points = weight.to(points.dtype) + left * points
            if surplus > 0:
                wrong |= tl.max((held & (points != points)).to(tl.int32), 0)
                goes, went = evicted_keys(points, candidate, surplus, leave, t, BITS, N)
                held = held & (goes == 0)
                gone = tl.where(slot == i, tl.max(tl.where(goes, j, -1), 0), gone)
                known = known & (surplus == 1).to(tl.int32)
        size, evicted = size - went, evicted + went
        own += step_stride
    tl.store(alive + unit * length + j, held.to(tl.uint8), mask=inside)
    tl.store(score + unit * length + j, points, mask=inside)
    tl.store(count + unit, size)
    tl.store(evictions + unit, evicted)
    tl.store(bad + unit, (wrong != 0).to(tl.uint8))
