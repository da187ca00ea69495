"""Rows of attention, made in one pass on a GPU, in Triton: the numbers of `Call.rows`, whole or below the diagonal.

One program makes some rows of one query head. It goes through the keys twice: for the largest logit and the sum of
exponentials, and to write weights: in float32 side by side, or in float16 where they belong in the packed rows. Vectors
of 16 bit are multiplied as they are, since a product of two is exact in 32 bit, where it is summed.
"""


# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

NO_MASK, BOOL, ADDED = range(3)  # what says which keys are seen: the positions, a mask of flags, one that is added
IS_NONE, IS_BOOL, IS_ADDED = tl.constexpr(NO_MASK), tl.constexpr(BOOL), tl.constexpr(ADDED)
SMALLEST = 16  # least size that a product of tiles has
# Arguments that differ from block to block: the kernel is not compiled again for some of their values.
VARYING = ("start", "count", "position", "offset", "keys", "last", "window", "total", "mask_head", "mask_row")


class RowsOf(NamedTuple):
    """What rows are made of.

    Attributes
    ----------
    query : Tensor
        ``[H, q, D]``.
    key : Tensor
        ``[G, k, D]``; ``G`` divides ``H``.
    mask : Tensor or None
        bool (True is visible) or added to the logits, ``[1 or H, q, >= k]``; None: causal within the window.
    sinks : Tensor or None
        Learned sink logits ``[H]``.
    scaling, softcap, window
        Factor and cap of the logits, and most keys that a query sees without a mask; None for no cap and for all.
    """

    query: Tensor
    key: Tensor
    mask: Tensor | None
    sinks: Tensor | None
    scaling: float
    softcap: float | None
    window: int | None


class RowRange(NamedTuple):
    """Which rows are made; the fields are the arguments of `pack_rows`."""

    first: int
    start: int
    stop: int
    stride: int


def pack_rows(of: RowsOf, first: int, start: int, stop: int, stride: int = 1) -> tuple[Tensor, Tensor]:
    """Return the sums of rows in float32, ``[H, n]``, and the rows in float16, ``[H, total]``; waits for nothing.

    Parameters
    ----------
    of : RowsOf
        In float32, float16 or bfloat16.
    first : int
        Position of the query of index 0; its own key is the last but ``q - 1``. Older keys than the first one have
        weight 0.
    start, stop, stride : int
        Indices of the queries: ``range(start, stop, stride)``. The row of position ``t`` has ``t + 1`` weights.
    """
    heads = of.query.shape[0]
    position, count = first + start, len(range(start, stop, stride))
    total = count * (position + 1) + stride * count * (count - 1) // 2
    weights = torch.empty((heads, total), dtype=torch.float16, device=of.query.device)
    sums = torch.empty((heads, count), dtype=torch.float32, device=of.query.device)
    _launch(of, weights, sums, RowRange(first, start, stop, stride), total, whole=False)
    return sums, weights


def _launch(of: RowsOf, weights: Tensor, sums: Tensor, rows: RowRange, total: int, whole: bool) -> None:
    """Run the kernel; `total` is the number of packed weights of a head."""
    (heads, queries, size), keys = of.query.shape, of.key.shape[1]
    first, start, stop, stride = rows
    count = len(range(start, stop, stride))
    narrow = of.query.dtype == of.key.dtype and of.key.dtype in _narrow_types()
    height, columns, depth = _sizes(size, narrow)
    mask, kind, mask_head, mask_row = _mask(of)
    with torch.cuda.device_of(of.query):
        _make_rows[(triton.cdiv(count, height), heads)](
            of.query, of.key, mask, of.query if of.sinks is None else of.sinks, weights, sums,
            start, count, first + start, first + queries - keys, keys, first + stop, of.window or 0, total,
            stride, heads // of.key.shape[0], size, of.scaling, of.softcap or 1.0,
            *of.query.stride(), *of.key.stride(), mask_head, mask_row,
            MASK=kind, HAS_SINKS=of.sinks is not None, HAS_SOFTCAP=of.softcap is not None, NARROW=narrow, WHOLE=whole,
            M=height, N=columns, D=depth, num_warps=4,
        )  # fmt: skip


def whole_rows(of: RowsOf, out: Tensor, start: int) -> None:
    """Write the rows of queries from `start` on to `out`, float32 ``[H, b, start + b]``; waits for nothing.

    The queries must not see later keys than their own, and query and key of an index have the same position.
    """
    _launch(of, out, out, RowRange(0, start, start + out.shape[1], 1), 0, whole=True)


def _narrow_types() -> tuple[torch.dtype, ...]:
    """Return the types that are multiplied as they are; Triton's interpreter takes bfloat16 for integers."""
    return (torch.float16, torch.bfloat16) if isinstance(_make_rows, triton.JITFunction) else (torch.float16,)


def _mask(of: RowsOf) -> tuple[Tensor, int, int, int]:
    """Return the mask as the kernel reads it, what it is, and how far its heads and its rows are apart."""
    if of.mask is None:
        return of.query, NO_MASK, 0, 0
    mask = of.mask if of.mask.stride(-1) == 1 else of.mask.contiguous()
    is_bool = mask.dtype == torch.bool
    head = mask.stride(0) if len(mask) > 1 else 0
    return mask.view(torch.uint8) if is_bool else mask, BOOL if is_bool else ADDED, head, mask.stride(1)


def _sizes(size: int, narrow: bool) -> tuple[int, int, int]:
    """Return queries and keys of a tile, and numbers of a vector; the tiles fit in shared memory."""
    depth = max(SMALLEST, triton.next_power_of_2(size))
    width = depth * (2 if narrow else 4)  # bytes of a vector
    side = 64 if width <= 256 else 32 if width <= 512 else SMALLEST
    return side, side, depth


@triton.jit
def _logits(
    q, key, mask, at, i, j, keys, offset, window, size, scaling, softcap, key_row, key_column,
    inside, MASK: tl.constexpr, HAS_SOFTCAP: tl.constexpr, NARROW: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Return the logits ``[M, N]`` of queries with keys ``j``; minus infinity where a query does not see the key."""
    d = tl.arange(0, D)
    there = j < keys
    place = key + d[:, None] * key_column + j[None, :].to(tl.int64) * key_row
    k = tl.load(place, mask=(d < size)[:, None] & there[None, :], other=0.0)
    k = k if NARROW else k.to(tl.float32)
    logits = tl.dot(q, k, input_precision="ieee") * scaling
    if HAS_SOFTCAP:
        decay = tl.exp(-2 * tl.abs(logits / softcap))  # the hyperbolic tangent of x is (1 - decay) / (1 + decay)
        logits = tl.where(logits < 0, -softcap, softcap) * ((1 - decay) / (1 + decay))
    seen = inside[:, None] & there[None, :]
    if MASK == IS_ADDED:
        logits += tl.load(mask + i[:, None] + j[None, :], mask=seen, other=0.0).to(tl.float32)
    elif MASK == IS_BOOL:
        seen = seen & (tl.load(mask + i[:, None] + j[None, :], mask=seen, other=0) != 0)
    else:
        seen = seen & (j[None, :] + offset <= at[:, None])
        seen = seen & ((window == 0) | (j[None, :] + offset > at[:, None] - window))
    return tl.where(seen, logits, float("-inf"))


@triton.jit
def _base_and_mass(
    q, key, mask, sink, at, i, low, high, keys, offset, window, size, scaling, softcap, key_row, key_column,
    inside, MASK: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, NARROW: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Return the largest logit of each row, or 0 where none is finite, and the sum of exponentials relative to it."""
    peak = tl.full([M], float("-inf"), tl.float32)
    mass = tl.zeros([M], tl.float32)
    if HAS_SINKS:
        peak = tl.zeros([M], tl.float32) + tl.load(sink).to(tl.float32)
        mass += 1
    for first in range(low, high, N):
        j = first + tl.arange(0, N)
        logits = _logits(
            q, key, mask, at, i, j, keys, offset, window, size, scaling, softcap, key_row, key_column,
            inside, MASK, HAS_SOFTCAP, NARROW, D,
        )  # fmt: skip
        higher = tl.maximum(peak, tl.max(logits, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # no key was seen yet
        mass = mass * tl.exp(peak - base) + tl.sum(tl.exp(logits - base[:, None]), 1)
        peak = higher
    return tl.where(peak == float("-inf"), 0.0, peak), tl.where(inside, mass, 1)


@triton.jit
def _fill(own, start, stop, inside, kind: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Write zeros to rows, to the keys from `start` to `stop` - 1."""
    for first in range(start, stop, N):
        t = first + tl.arange(0, N)
        tl.store(own[:, None] + t[None, :], tl.zeros([M, N], kind), mask=inside[:, None] & (t < stop)[None, :])


@triton.jit(do_not_specialize=VARYING)
def _make_rows(
    query, key, mask, sinks, weights, sums,
    start, count, position, offset, keys, last, window, total,
    stride, group, size, scaling, softcap,
    query_head, query_row, query_column, key_head, key_row, key_column, mask_head, mask_row,
    MASK: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, NARROW: tl.constexpr, WHOLE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Make `M` rows of one head, whole or packed.

    `offset` is the position of the first key, and `last` that after the block, which is the width of whole rows.
    """
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * M + tl.arange(0, M)
    inside = row < count
    i, at, d = (start + stride * row).to(tl.int64), position + stride * row, tl.arange(0, D)
    place = query + head * query_head + i[:, None] * query_row + d[None, :] * query_column
    q = tl.load(place, mask=inside[:, None] & (d < size)[None, :], other=0.0)
    q = q if NARROW else q.to(tl.float32)
    key += (head // group) * key_head
    mask += head * mask_head
    i *= mask_row
    if MASK == IS_NONE:
        end = tl.max(tl.where(inside, at, 0), 0) - offset + 1
        high = end
        low = tl.where(window > 0, tl.maximum(0, tl.min(at, 0) - offset - window + 1), 0)
    else:  # a query may see any key
        low, high, end = keys * 0, keys, last - offset
    base, mass = _base_and_mass(
        q, key, mask, sinks + head, at, i, low, high, keys, offset, window, size, scaling, softcap, key_row, key_column,
        inside, MASK, HAS_SINKS, HAS_SOFTCAP, NARROW, M, N, D,
    )  # fmt: skip
    kind = weights.dtype.element_ty
    own = row.to(tl.int64)
    if WHOLE:
        own = weights + (head * count + own) * last
    else:  # where each row begins
        own = weights + head * total + own * (position + 1) + stride * (own * (own - 1) // 2)
    _fill(own, 0, low + offset, inside, kind, M, N)
    added = tl.zeros([M], tl.float32)
    for first in range(low, end, N):
        j = first + tl.arange(0, N)
        logits = _logits(
            q, key, mask, at, i, j, keys, offset, window, size, scaling, softcap, key_row, key_column,
            inside, MASK, HAS_SOFTCAP, NARROW, D,
        )  # fmt: skip
        weight = tl.exp(logits - base[:, None]) / mass[:, None]
        added += tl.sum(tl.where((j < end)[None, :], weight, 0.0), 1)
        t = (j + offset)[None, :]
        part = t < last if WHOLE else t <= at[:, None]
        tl.store(own[:, None] + t, weight.to(kind), mask=inside[:, None] & part)
    if WHOLE:
        _fill(own, low + (end - low + N - 1) // N * N, last, inside, kind, M, N)
    else:
        tl.store(sums + head * count + row, added, mask=inside)
