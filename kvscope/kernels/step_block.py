"""Steps of caches through a block of rows, compiled, for scores that are a recurrence; decides as `TorchStepper`."""

from __future__ import annotations

import numpy as np

from kvscope.kernels import spread
from kvscope.kernels.arrays import Array, KernelRows, KernelState


def step_block(
    reduce: str,
    decay: float,
    state: KernelState,
    rows: Array,
    start: int,
    evicts: Array,
    *,
    missing: Array | None = None,
    scale: Array | None = None,
    fixed: Array | None = None,
) -> bool:
    """Step caches through a block of rows, and return whether a score was NaN at a step that evicts.

    Parameters
    ----------
    reduce, decay
        How keys are scored: `Recurrence.weights` and `Recurrence.decay`.
    state : KernelState
        Changed in place.
    rows, start, evicts, missing, scale, fixed
        As in `KernelRows`; None if the model has no learned sinks, the weights are not scaled, or `reduce` is not
        ``none``.
    """
    from kvscope.kernels.step_block_loop import MAX, MEAN, NONE, SUM, step_heads

    heads = state.n_alive.size
    nan_scores = np.zeros(heads, np.bool_)
    missing = np.zeros((1, *rows.shape[1:3], 0), rows.dtype) if missing is None else missing
    scale = np.zeros((1, *state.n_alive.shape[1:], 0), rows.dtype) if scale is None else scale
    fixed = np.zeros((1, *state.n_alive.shape[1:], 0), state.score.dtype) if fixed is None else fixed
    block = KernelRows(rows, start, evicts, missing, scale, fixed)
    reduction = {"none": NONE, "mean": MEAN, "max": MAX, "sum": SUM}[reduce]
    factor = state.score.dtype.type(decay)

    def work(first: int, last: int) -> None:
        step_heads(first, last, block, state, reduction, factor, nan_scores)

    spread(work, heads)
    return bool(nan_scores.any())
