"""Attention on keys that were not attended to for long: a small share of the mass, which recalling a fact needs."""

from __future__ import annotations

import torch
from torch import Tensor

from kvscope.metrics.base import Rows, metric
from kvscope.metrics.moments import moments

LONG = 64  # steps
LEAST = 0.1  # share of a row


@metric("late_mass_retained", direction="higher", range=(0.0, 1.0), when_nothing_evicted=1.0, needs={"last_attended"})
def late_mass_retained(rows: Rows) -> Tensor:
    """Visible share of the mass on keys that the head had not attended to for more than 64 steps.

    A head attends to a key at the step of its arrival, and at each step at which its weight is above ``1/n`` in a row
    of ``n`` keys. Sinks are attended to at nearly every step, so they are not counted. A row with at most a tenth of
    its mass on such keys has no value. LazyEviction, arXiv:2506.15969, describes tokens that are attended to again
    after hundreds of steps.
    """
    late, all_late = rows.once("late", lambda: _late(rows))
    kept = moments(late, rows.visible, rows.steps).mass
    share = kept / torch.where(all_late > 0, all_late, 1)
    return torch.where(all_late > LEAST * rows.all.mass, share.clamp(max=1.0), torch.nan)


def _late(rows: Rows) -> tuple[Tensor, Tensor]:
    """Return the rows on keys that were not attended to for long, zero elsewhere, and their mass."""
    late = rows.full * (rows.steps[:, None] - rows.signals["last_attended"] > LONG)
    return late, late.sum(-1, dtype=torch.float64)
