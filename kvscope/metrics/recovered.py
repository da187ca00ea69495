"""How much later queries attend to the keys of the prompt's last query (Recycled Attention's motivating study)."""

from __future__ import annotations

import torch
from torch import Tensor

from kvscope.metrics.base import Rows, metric
from kvscope.metrics.mass import share, share_of_rest
from kvscope.metrics.moments import Moments, moments

_NEEDS = {"prompt_rank"}


@metric("recovered_mass", direction="none", range=(0.0, 1.0), when_nothing_evicted=None, needs=_NEEDS)
def recovered_mass(rows: Rows) -> Tensor:
    """Share of the full row's mass on the ``B`` heaviest keys of the last prompt query, a set that never changes.

    It measures how long the prompt's last query predicts what later queries attend to. It depends on the model, the
    text and the budget, not on the policy. Each query head has its own set; of equal weights the newer key is selected.
    Steps of the prompt have no value. Recycled Attention (arXiv:2411.05787) is motivated by such a study, but does not
    say over what it averages.
    """
    return rows.once("recovered", lambda: torch.where(_known(rows), share(_recovered(rows), rows.all), torch.nan))


@metric("recovered_mass_no_sinks", direction="none", range=(0.0, 1.0), when_nothing_evicted=None, needs=_NEEDS)
def recovered_mass_no_sinks(rows: Rows) -> Tensor:
    """Share of the mass beyond the first 4 positions on the ``B`` heaviest keys of the last prompt query.

    The set is that of `recovered_mass`. Steps of the prompt, and rows with no mass beyond those positions, have no
    value.
    """
    return rows.once(
        "recovered rest", lambda: torch.where(_known(rows), share_of_rest(_recovered(rows), rows.all), torch.nan)
    )


def _recovered(rows: Rows) -> Moments:
    def found() -> Moments:
        return moments(rows.full, rows.signals["prompt_rank"] < rows.budget[:, None, None, None, None], rows.steps)

    return rows.once("recovered keys", found)


def _known(rows: Rows) -> Tensor:
    return (rows.signals["prompt_rank"] == 0).any(-1)
