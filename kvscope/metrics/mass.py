"""How much of the full-cache attention falls on visible keys."""

from __future__ import annotations

import torch
from torch import Tensor

from kvscope.metrics.base import Rows, metric
from kvscope.metrics.moments import SINKS, Moments, moments


@metric("retained_mass", direction="higher", range=(0.0, 1.0), when_nothing_evicted=1.0)
def retained_mass(rows: Rows) -> Tensor:
    """Share of the full row's attention mass that falls on visible keys.

    The divergence of the live row from the full row follows from it: ``KL(live || full) = -ln(retained_mass)``. Rows
    are recorded in 16 bit and do not sum to exactly one, so the mass on visible keys is divided by the sum of the full
    row. A row without mass has value 0.
    """
    return share(rows.kept, rows.all)


@metric("retained_mass_no_sinks", direction="higher", range=(0.0, 1.0), when_nothing_evicted=1.0)
def retained_mass_no_sinks(rows: Rows) -> Tensor:
    """Share of the attention mass beyond the first 4 positions that falls on visible keys.

    The first positions are the sinks, on which many heads put much mass whatever the text (StreamingLLM,
    arXiv:2309.17453). A row with no mass beyond them has no value.
    """
    return share_of_rest(rows.kept, rows.all)


@metric("ideal_mass", direction="none", range=(0.0, 1.0), when_nothing_evicted=1.0)
def ideal_mass(rows: Rows) -> Tensor:
    """Retained mass of the ideal set, selected anew at each step: no policy that holds as many keys retains more.

    The ideal set is the current key and the ``B`` heaviest others (A2SF, arXiv:2407.20485, section 4.3). A row without
    mass has value 0.
    """
    return rows.once("ideal mass", lambda: share(rows.best, rows.all))


@metric("ideal_mass_no_sinks", direction="none", range=(0.0, 1.0), when_nothing_evicted=1.0)
def ideal_mass_no_sinks(rows: Rows) -> Tensor:
    """Ideal mass beyond the first 4 positions: the ideal set is selected among the keys there, for the mass there.

    The set is the current key and the ``B`` heaviest others beyond the first 4 positions. A row with no mass there has
    no value.
    """

    def of_rest() -> Tensor:
        return share_of_rest(moments(rows.full, rows.heaviest(SINKS) | rows.current, rows.steps), rows.all)

    return rows.once("ideal rest", of_rest)


def share(part: Moments, whole: Moments) -> Tensor:
    """Return the share of rows' mass that falls on some keys; 0 of a row without mass."""
    found = part.mass / torch.where(whole.mass > 0, whole.mass, 1)
    return found.clamp(max=1.0)  # rounding alone can pass 1


def share_of_rest(part: Moments, whole: Moments) -> Tensor:
    """Return the share of rows' mass beyond the first 4 positions that falls on some keys; NaN where there is none."""
    found = part.rest / torch.where(whole.rest > 0, whole.rest, torch.nan)
    return found.clamp(max=1.0)
