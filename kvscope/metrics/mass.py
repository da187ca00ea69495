"""How much of the full-cache attention is still in reach."""

from __future__ import annotations

import torch
from torch import Tensor

from kvscope.metrics.base import Rows, metric

SINKS = 4  # positions that are left out where a metric says "no sinks" (StreamingLLM, arXiv:2309.17453)


@metric("retained_mass", direction="higher", range=(0.0, 1.0), when_nothing_evicted=1.0)
def retained_mass(rows: Rows) -> Tensor:
    """Share of the full row that falls on visible keys; ``KL(live || full) = -ln(retained_mass)``.

    Rows are recorded in 16 bit, so the sum is divided by the sum of the full row.
    """
    return _share(rows.full * rows.seen, rows.full)


@metric("retained_mass_no_sinks", direction="higher", range=(0.0, 1.0), when_nothing_evicted=1.0)
def retained_mass_no_sinks(rows: Rows) -> Tensor:
    """The same without the first 4 positions, where surplus attention gathers: share of the rest that is visible.

    A row with no mass beyond those positions has no value.
    """
    rest = rows.full[..., SINKS:]
    share = _share(rest * rows.seen[..., SINKS:], rest)
    return torch.where(rest.sum(-1) > 0, share, torch.nan)


@metric("ideal_mass", direction="none", range=(0.0, 1.0), when_nothing_evicted=1.0)
def ideal_mass(rows: Rows) -> Tensor:
    """Retained mass of the ideal set, chosen anew each step: no policy that holds as many keys retains more."""
    return _share(rows.full * rows.ideal_mask, rows.full)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    total = whole.sum(-1)
    return part.sum(-1) / torch.where(total > 0, total, 1)
