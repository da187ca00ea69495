"""How much of the full-cache attention falls on visible keys."""

from __future__ import annotations

import torch
from torch import Tensor

from kvscope.metrics.base import Rows, metric
from kvscope.metrics.moments import SINKS, Moments, moments


@metric("retained_mass", direction="higher", range=(0.0, 1.0), when_nothing_evicted=1.0)
def retained_mass(rows: Rows) -> Tensor:
    """Share of the full row that falls on visible keys; ``KL(live || full) = -ln(retained_mass)``.

    Rows are recorded in 16 bit, so the sum is divided by the sum of the full row.
    """
    return share(rows.kept, rows.all)


@metric("retained_mass_no_sinks", direction="higher", range=(0.0, 1.0), when_nothing_evicted=1.0)
def retained_mass_no_sinks(rows: Rows) -> Tensor:
    """The same without the first 4 positions, where surplus attention gathers: share of the rest that is visible.

    A row with no mass beyond those positions has no value.
    """
    return share_of_rest(rows.kept, rows.all)


@metric("ideal_mass", direction="none", range=(0.0, 1.0), when_nothing_evicted=1.0)
def ideal_mass(rows: Rows) -> Tensor:
    """Retained mass of the ideal set, chosen anew each step: no policy that holds as many keys retains more."""
    return rows.once("ideal mass", lambda: share(rows.best, rows.all))


@metric("ideal_mass_no_sinks", direction="none", range=(0.0, 1.0), when_nothing_evicted=1.0)
def ideal_mass_no_sinks(rows: Rows) -> Tensor:
    """The same without the first 4 positions: the set is chosen among the rest, for the mass of the rest.

    A row with no mass beyond those positions has no value.
    """

    def of_rest() -> Tensor:
        return share_of_rest(moments(rows.full, rows.heaviest(SINKS) | rows.current, rows.steps), rows.all)

    return rows.once("ideal rest", of_rest)


def share(part: Moments, whole: Moments) -> Tensor:
    """Return the share of rows' mass that falls on some keys; 0 of a row without mass."""
    found = part.mass / torch.where(whole.mass > 0, whole.mass, 1)
    return found.clamp(max=1.0)  # rounding alone can pass 1


def share_of_rest(part: Moments, whole: Moments) -> Tensor:
    """Return the same of what lies beyond the first 4 positions; NaN where nothing does."""
    found = part.rest / torch.where(whole.rest > 0, whole.rest, torch.nan)
    return found.clamp(max=1.0)
