"""What the Triton kernels that step share: where rows are, weights of query heads, and scores as ordered integers."""


# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from kvscope.kernels.totals import SPLIT

NONE, MEAN, MAX, SUM = range(4)  # how the query heads of a group become one
IS_NONE, IS_MEAN, IS_MAX = tl.constexpr(NONE), tl.constexpr(MEAN), tl.constexpr(MAX)
NEVER = tl.constexpr(2**31 - 1)
SPLIT_AT = tl.constexpr(SPLIT)


@triton.jit
def place_of(unit, runs, of_run):
    """Return where a unit is in a tensor of some runs, or of one for all, in units; `of_run` of them are one run."""
    return tl.minimum(unit // of_run, runs - 1) * of_run + unit % of_run


@triton.jit
def rows_of(rows, unit, layers, heads, together, runs, run_stride, layer_stride, head_stride):
    """Return where the rows of a deciding head begin; `runs` is 1 where all runs have the same rows."""
    r, layer, s = unit // (layers * heads), unit // heads % layers, unit % heads
    return rows + tl.minimum(r, runs - 1) * run_stride + layer * layer_stride + s * together * head_stride


@triton.jit
def ordered(score):
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
def finite(score):
    """Return scores with infinity replaced by the largest number, so that no candidate looks like a protected key."""
    if score.dtype == tl.float64:
        return tl.where(score == float("inf"), 1.7976931348623157e308, score)
    return tl.where(score == float("inf"), 3.4028234663852886e38, score)


@triton.jit
def upper_and_lower(row):
    """Return a row in two parts in double, whose sums are added: see `kvscope.kernels.totals`."""
    wide = row.to(tl.float64)
    upper = wide
    if row.dtype == tl.float64:
        upper = (wide + SPLIT_AT) - SPLIT_AT
    return upper, wide - upper


@triton.jit
def rounded_quotient(row, norm):
    """Return a row divided by its sum, rounded as a CPU rounds."""
    if row.dtype == tl.float32:
        return tl.div_rn(row, tl.broadcast_to(norm, row.shape))
    return row / norm


@triton.jit
def reduced(live, REDUCE: tl.constexpr):
    """Return weights of query heads ``[QB, N]`` as one for each key, in double; a mean is left a sum."""
    if REDUCE == IS_MAX:
        return tl.max(live.to(tl.float64), 0)
    return tl.sum(live.to(tl.float64), 0)
