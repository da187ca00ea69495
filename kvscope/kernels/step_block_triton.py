"""Steps caches through a block of rows on a GPU, in Triton: the decisions of `step_block`.

One program steps one deciding head of one run through a whole block of queries. Which keys are held, their scores and
when they were evicted lie in registers up to `MOST_KEYS` keys; beyond that in global memory, walked through in tiles.

Sums over a row and over the query heads of a group are made in double and rounded once, and a product is rounded before
it is added to, so that decisions are those of a CPU.
"""


# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from kvscope.kernels.triton_bounds import bound_scores, step_by_bounds
from kvscope.kernels.triton_common import MAX, MEAN, NONE, SUM
from kvscope.kernels.triton_registers import step_in_registers
from kvscope.kernels.triton_tiles import step_in_tiles

MOST_KEYS = 8192  # keys whose state is held in registers
FEWEST_HEADS = 8  # query heads that decide together, from which bounds are less work than all scores
STEPS_BY_BOUNDS = 64  # steps for which bounds are computed at once; they are lower, the more keys leave within them
WEIGHTS_AT_ONCE = 16384  # weights, of query heads times keys, that are in registers at once
REDUCTIONS = {"none": NONE, "mean": MEAN, "max": MAX, "sum": SUM}


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


class _Work(NamedTuple):
    """A block to step through: arguments of `step_block`, the reduction as a number, and sizes of the kernel."""

    reduce: int
    decay: Tensor
    state: TritonState
    rows: Tensor
    start: int
    evicts: Tensor
    missing: Tensor | None
    bad: Tensor
    block_heads: int
    keys: int


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
    fixed: Tensor | None = None,
    one_by_one: int | None = None,
    most_keys: int = MOST_KEYS,
) -> Tensor:
    """Step caches through a block of rows; return which had a score that is not a number, uint8 ``[R, L, S]``.

    Nothing waits for the device.

    Parameters
    ----------
    reduce : {"none", "mean", "max", "sum"}
        How the query heads of a group become one; ``none``: the score of a key is `fixed`.
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
    fixed : Tensor or None
        ``[R or 1, L, S, b]``, in the precision of the scores: the scores of the keys of these steps.
    one_by_one : int or None
        Given where scores are unscaled weights of the newest row alone and no window drops keys: from this step on, at
        most one key is evicted at a time. Where many query heads decide together, `triton_bounds` computes few scores.
    most_keys : int
        Keys whose state may be held in registers.
    """
    together = rows.shape[2] // state.n_alive.shape[2]
    bad = torch.zeros(state.n_alive.shape, dtype=torch.uint8, device=rows.device)
    kernel, block_heads, keys = _kernel(start + rows.shape[3], together, most_keys)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    work = _Work(REDUCTIONS[reduce], decay, state, rows, start, evicts, missing, bad, block_heads, keys)
    with torch.cuda.device_of(rows):
        if one_by_one is not None and kernel is step_in_registers and _bounds_pay(rows, state, together):
            _step_by_bounds(work, _edges(rows.shape[3], one_by_one - start))
        else:
            _step_by_scores(work, kernel, scale, fixed)
    return bad


def _bounds_pay(rows: Tensor, state: TritonState, together: int) -> bool:
    """Return whether bounds are less work than all scores; they are made in 32 bit."""
    return together >= FEWEST_HEADS and rows.dtype == state.score.dtype == torch.float32


def _edges(steps: int, one_by_one: int) -> list[int]:
    """Return the first steps of parts of a block, and its end.

    A part begins at `one_by_one`: bounds decide as long as all keys of their part were evicted one at a time.
    """
    cut = min(max(one_by_one, 0), steps)
    return [*range(0, cut, STEPS_BY_BOUNDS), *range(cut, steps, STEPS_BY_BOUNDS), steps]


def _step_by_scores(
    work: _Work, kernel: triton.JITFunction[..., None], scale: Tensor | None, fixed: Tensor | None
) -> None:
    """Compute the scores of all keys at every step."""
    reduce, decay, state, rows, start, evicts, missing, bad, block_heads, keys = work
    runs, layers, heads, length = state.leave.shape
    together = rows.shape[2] // heads
    given = [rows[:1] if part is None else part.contiguous() for part in (missing, scale, fixed)]
    kernel[(runs * layers * heads,)](
        rows, *given,
        state.alive.view(torch.uint8), state.score, state.leave, state.n_alive, state.evictions, state.budget,
        state.sinks, state.recent, state.windows, evicts, decay, bad,
        start, rows.shape[3], length, layers, heads, together, rows.shape[0], *(part.shape[0] for part in given),
        *rows.stride()[:4],
        REDUCE=reduce, HAS_MISSING=missing is not None, HAS_SCALE=scale is not None,
        QB=block_heads, N=keys, BITS=8 * state.score.element_size(),
        num_warps=_warps(keys, block_heads), enable_fp_fusion=False,
    )  # fmt: skip


def _step_by_bounds(work: _Work, edges: list[int]) -> None:
    """Compute few scores, part by part between `edges`; those of the last step are all computed."""
    reduce, decay, state, rows, start, evicts, missing, bad, block_heads, keys = work
    runs, layers, heads, length = state.leave.shape
    units, together = runs * layers * heads, rows.shape[2] // heads
    most = min(STEPS_BY_BOUNDS, edges[-1])
    bounds = rows.new_empty((units, most, keys))
    totals = rows.new_empty((units, most, together), dtype=torch.float64)
    lost = rows[:1] if missing is None else missing.contiguous()
    how = {"REDUCE": reduce, "HAS_MISSING": missing is not None, "N": keys, "enable_fp_fusion": False}
    for first, stop in pairwise(edges):
        count, part = stop - first, rows[:, :, :, first:stop]
        sizes = (length, layers, heads, together, rows.shape[0], lost.shape[0], *rows.stride()[:4])
        bound_scores[(units * count,)](
            part, lost, state.alive.view(torch.uint8), bounds, totals, start + first, count, *sizes,
            QB=min(block_heads, 4), num_warps=_warps(keys, min(block_heads, 4)), **how,
        )  # fmt: skip
        step_by_bounds[(units,)](
            part, lost, bounds, totals, state.alive.view(torch.uint8), state.score, state.leave, state.n_alive,
            state.evictions, state.budget, state.sinks, state.recent, evicts[first:], decay, bad,
            start + first, count, min(count, edges[-1] - first - 1), *sizes,
            QB=min(block_heads, 4), H=triton.next_power_of_2(together), MOST=triton.next_power_of_2(most),
            BITS=8 * state.score.element_size(), num_warps=_warps(keys, 1), **how,
        )  # fmt: skip


def _kernel(length: int, together: int, most_keys: int) -> tuple[triton.JITFunction[..., None], int, int]:
    """Return the kernel for a length and a size of groups, and how many query heads and keys it has at once.

    One query head at once is a group of one, which the kernel treats as such.
    """
    keys, group = triton.next_power_of_2(length), triton.next_power_of_2(together)
    if keys <= most_keys:
        return step_in_registers, min(group, max(2, WEIGHTS_AT_ONCE // keys)), keys
    return step_in_tiles, group, max(16, min(most_keys, WEIGHTS_AT_ONCE // group))


def _warps(keys: int, block_heads: int) -> int:
    """Return how many warps a program has: four keys a thread, and twice as many for groups while registers do."""
    most = 16 if block_heads == 1 or keys > 2048 else 32
    return max(1, min(most, keys * block_heads // 128))
