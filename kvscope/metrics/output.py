"""The error of the output of attention: its distance from the output over all keys."""

from __future__ import annotations

import torch
from torch import Tensor

from kvscope.metrics.base import Rows, metric


@metric("output_error", direction="lower", range=(0.0, None), when_nothing_evicted=0.0, needs={"values"})
def output_error(rows: Rows) -> Tensor:
    """Relative error of a head's output, ``||o_live - o_full|| / ||o_full||``; ``o`` is the row times the values.

    Attention mass measures how much attention is lost; this metric measures how much that changes the output. The two
    differ because values differ in size, and because visible values may have the direction of an evicted one. Full rows
    are divided by their sum, as live rows are. A head whose full output is zero has no value. A live row without mass
    gives 1.
    """
    values = rows.signals["values"]  # [., L, G, n, D]
    full = rows.once("output", lambda: _output(rows.whole, values))
    size = full.norm(dim=-1)
    if rows.coded is not None:
        live = rows.coded.output.to(full.dtype)
    else:
        live = _output(rows.full * rows.seen, values) / rows.norm(rows.kept)[..., None].to(full.dtype)
    error = (live - full).norm(dim=-1) / torch.where(size > 0, size, 1)
    return torch.where(size > 0, error, torch.nan)


def _output(rows: Tensor, values: Tensor) -> Tensor:
    """Return rows ``[., L, H, b, n]`` times values ``[., L, G, n, D]``: ``[., L, H, b, D]``."""
    *lead, heads, count, n = rows.shape
    groups = values.shape[-3]
    of_group = rows.reshape(*lead, groups, heads // groups * count, n)
    return (of_group @ values.to(rows.dtype)).reshape(*lead, heads, count, -1)
