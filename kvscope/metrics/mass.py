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
    return share(rows.full, rows.seen)


@metric("retained_mass_no_sinks", direction="higher", range=(0.0, 1.0), when_nothing_evicted=1.0)
def retained_mass_no_sinks(rows: Rows) -> Tensor:
    """The same without the first 4 positions, where surplus attention gathers: share of the rest that is visible.

    A row with no mass beyond those positions has no value.
    """
    return share_of_rest(rows.full, rows.seen)


@metric("ideal_mass", direction="none", range=(0.0, 1.0), when_nothing_evicted=1.0)
def ideal_mass(rows: Rows) -> Tensor:
    """Retained mass of the ideal set, chosen anew each step: no policy that holds as many keys retains more."""
    return rows.once("ideal mass", lambda: share(rows.full, rows.ideal_mask))


@metric("ideal_mass_no_sinks", direction="none", range=(0.0, 1.0), when_nothing_evicted=1.0)
def ideal_mass_no_sinks(rows: Rows) -> Tensor:
    """The same without the first 4 positions: the set is chosen among the rest, for the mass of the rest.

    A row with no mass beyond those positions has no value.
    """
    return rows.once("ideal rest", lambda: share_of_rest(rows.full, rows.heaviest(SINKS) | rows.current))


def share(full: Tensor, keys: Tensor) -> Tensor:
    """Return the share of rows that falls on `keys`, over the last axis; 0 of a row without mass."""
    total = full.sum(-1)
    part = (full * keys).sum(-1) / torch.where(total > 0, total, 1)
    return part.clamp(max=1.0)  # rounding alone can pass 1


def share_of_rest(full: Tensor, keys: Tensor) -> Tensor:
    """Return the same of what lies beyond the first 4 positions; NaN where nothing does."""
    rest = full[..., SINKS:]
    return torch.where(rest.sum(-1) > 0, share(rest, keys[..., SINKS:]), torch.nan)
