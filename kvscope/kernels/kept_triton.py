"""Rows without evicted keys on a GPU, in Triton: what `kvscope.kernels.kept` computes on a CPU."""


# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

KEYS = 1024  # keys that a program reads at a time


def kept_rows(rows: Tensor, leave: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Return rows with zeros at evicted keys, and their sums; every weight is read once, and nothing waits.

    Parameters
    ----------
    rows : Tensor
        ``[R, H, b, n]`` of steps `start` to ``start + b - 1``; zero beyond the query's position.
    leave : Tensor
        int32 ``[R, S, T]``: step at whose end a key was evicted, as in `CacheState`; ``S`` divides ``H``.
    start : int
        First step.

    Returns
    -------
    tuple of Tensor
        ``[R, H, b, n]``, and ``[R, H, b]`` of the same type, summed in float64.
    """
    _, heads, count, n = rows.shape
    rows, leave = rows.contiguous(), leave.contiguous()
    kept, total = torch.empty_like(rows), torch.empty_like(rows[..., 0], memory_format=torch.contiguous_format)
    with torch.cuda.device_of(rows):
        _keep[(total.numel(),)](
            rows, leave, kept, total, start, count, n, leave.shape[2], heads // leave.shape[1],
            N=min(KEYS, triton.next_power_of_2(n)), num_warps=4,
        )  # fmt: skip
    return kept, total


@triton.jit(do_not_specialize=("start",))
def _keep(rows, leave, kept, total, start, count, n, length, group, N: tl.constexpr):
    """Copy the row of one query head at one step; `group` query heads decide together."""
    unit = tl.program_id(0).to(tl.int64)
    t, head = start + unit % count, unit // count
    rows, kept, leave = rows + unit * n, kept + unit * n, leave + head // group * length
    mass = tl.zeros([N], tl.float64)
    for first in range(0, n, N):
        j = first + tl.arange(0, N)
        stays = tl.load(leave + j, mask=j < n, other=0) >= t
        weight = tl.load(rows + j, mask=(j < n) & stays, other=0.0)
        mass += weight.to(tl.float64)
        tl.store(kept + j, weight, mask=j < n)
    tl.store(total + unit, tl.sum(mass, 0))
