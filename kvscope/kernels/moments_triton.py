"""Sums over the masked keys of rows on a GPU, in Triton: what `kvscope.kernels.moments` computes on a CPU."""


# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

KEYS = 1024  # keys that a program reads at a time


def masked_sums(rows: Tensor, mask: Tensor, other: Tensor | None, steps: Tensor, skip: int) -> Tensor:
    """Return sums over the keys of each row for which `mask` is true, and `other` as well if it is given.

    Every weight and every mask is read once, and nothing waits for the device. Arguments may be expanded views.

    Parameters
    ----------
    rows : Tensor
        ``[R or 1, L, H, b, n]``.
    mask : Tensor
        bool ``[R, L, G, b, n]``: one mask for each group of query heads; ``G`` may be ``H``.
    other : Tensor or None
        bool ``[R or 1, L, H, b, n]``.
    steps : Tensor
        int ``[b]``: position of each query; later keys are ignored.
    skip : int
        Number of first positions that the second sum excludes.

    Returns
    -------
    Tensor
        float64 ``[R, L, H, b, 4]``: mass, mass without the first positions, sum of squares, number of keys. The order
        of summation is not defined.
    """
    runs, layers, groups, count, n = mask.shape
    heads = rows.shape[2]
    sums = torch.empty((runs, layers, heads, count, 4), dtype=torch.float64, device=rows.device)
    rows = _along_keys(rows.expand(runs, -1, -1, -1, -1))
    mask = _along_keys(mask).view(torch.uint8)
    also = mask if other is None else _along_keys(other.expand(runs, -1, -1, -1, -1)).view(torch.uint8)
    with torch.cuda.device_of(rows):
        _sum_row[(sums.numel() // 4,)](
            rows, mask, also, steps, sums, layers, heads, heads // groups, count, n,
            *rows.stride()[:4], *mask.stride()[:4], *also.stride()[:4],
            SKIP=skip, HAS_OTHER=other is not None, N=min(KEYS, triton.next_power_of_2(n)), num_warps=4,
        )  # fmt: skip
    return sums


def _along_keys(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@triton.jit
def _sum_row(
    rows, mask, other, steps, sums, layers, heads, together, count, n,
    rows_run, rows_layer, rows_head, rows_step,
    mask_run, mask_layer, mask_group, mask_step,
    other_run, other_layer, other_head, other_step,
    SKIP: tl.constexpr, HAS_OTHER: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Sum the row of one query head at one step of one run."""
    unit = tl.program_id(0).to(tl.int64)
    i, h = unit % count, unit // count % heads
    layer, r = unit // (count * heads) % layers, unit // (count * heads * layers)
    rows += r * rows_run + layer * rows_layer + h * rows_head + i * rows_step
    mask += r * mask_run + layer * mask_layer + h // together * mask_group + i * mask_step
    other += r * other_run + layer * other_layer + h * other_head + i * other_step
    last = tl.minimum(tl.load(steps + i).to(tl.int32) + 1, n)
    mass = tl.zeros([N], tl.float64)
    rest = tl.zeros([N], tl.float64)
    squares = tl.zeros([N], tl.float64)
    keys = tl.zeros([N], tl.int32)
    j = tl.arange(0, N)
    for edge in range(0, last, N):
        key = edge + j
        chosen = tl.load(mask + key, mask=key < last, other=0) != 0
        if HAS_OTHER:
            chosen = chosen & (tl.load(other + key, mask=chosen, other=0) != 0)
        weight = tl.load(rows + key, mask=chosen, other=0.0).to(tl.float64)
        mass += weight
        rest += tl.where(key >= SKIP, weight, 0.0)
        squares += weight * weight
        keys += chosen.to(tl.int32)
    tl.store(sums + unit * 4, tl.sum(mass, 0))
    tl.store(sums + unit * 4 + 1, tl.sum(rest, 0))
    tl.store(sums + unit * 4 + 2, tl.sum(squares, 0))
    tl.store(sums + unit * 4 + 3, tl.sum(keys, 0).to(tl.float64))
