"""Outcome: the effect of eviction on the predictions of the model, and how well cheap metrics predict it."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pandas as pd

from kvscope.core.json import JsonDict
from kvscope.report.encoding import rounded
from kvscope.report.panel import panel
from kvscope.report.runs import RunView
from kvscope.report.source import ReportInput

OUTCOME = "perplexity_ratio"
COSTLY = (
    OUTCOME,
    "perplexity",
    "perplexity_full",
    "perplexity_delta",
    "token_kl",
    "top1_agreement",
    "held_overlap",
    "answer_score",
    "answer_first",
    "answer_loss",
)
FEWEST = 3  # runs for a rank agreement


@panel(
    "outcome",
    title="Outcome",
    order=25,
    needs=("outcome",),
    help="Each point is one run of the closed loop: a metric that needs no second run of the model against the "
    "perplexity relative to the full cache, where 1 means none. The rank agreement (Spearman, from -1 to 1) measures "
    "how well the metric alone orders these runs. Over all budgets it favours any metric that grows with the budget, "
    "so read the agreement within a budget first.",
)
def outcome(source: ReportInput) -> JsonDict | None:
    """Return the runs with an outcome, the metrics to compare it with, and the rank agreement of each."""
    runs = [run for run in source.ranking if run.mean(OUTCOME) is not None]
    if not runs:
        return None
    groups: dict[tuple[str, ...], list[RunView]] = defaultdict(list)
    for run in runs:
        groups[run.protocol].append(run)
    cheap = [name for name in source.metrics if name not in COSTLY]
    # a metric is cheap in the open loop; without an open run, the value of the closed run is used
    opened = {_same(run): run for run in source.runs if run.protocol[1] == "open"}
    made: list[JsonDict] = []
    for group in groups.values():
        values = {name: [_value(run, opened.get(_same(run)), name) for run in group] for name in cheap}
        used = {name: found for name, found in values.items() if any(value is not None for value in found)}
        made.append(
            {
                "runs": [run.id for run in group],
                "values": used,
                "agreement": {name: _agreement(found, group) for name, found in used.items()},
            }
        )
    alone = sum(_same(run) not in opened for run in runs)
    notes = [f"{alone} of {len(runs)} runs have no open loop: their metrics are those of the closed loop."]
    return {"groups": made, "notes": notes if alone else []}


def _same(run: RunView) -> tuple[str | None, ...]:
    return (run.label, run.budget, run.protocol[0], run.protocol[2])


def _value(run: RunView, counterpart: RunView | None, metric: str) -> float | None:
    return rounded(run.mean(metric) if counterpart is None else counterpart.mean(metric))


def _agreement(values: list[float | None], runs: list[RunView]) -> JsonDict:
    """Return the rank agreement of a metric with the outcome over all runs, and its mean within a budget and kind.

    Over all runs, any number that grows with the budget agrees; only the agreement within a budget is informative.
    """
    budgets: dict[tuple[str, ...] | None, list[tuple[float, float]]] = defaultdict(list)
    for value, run in zip(values, runs, strict=True):
        outcome = run.mean(OUTCOME)
        if value is not None and outcome is not None:
            budgets[run.comparable].append((value, outcome))
    pairs = [pair for found in budgets.values() for pair in found]
    within = [rank for key, found in budgets.items() if key is not None and (rank := _spearman(found)) is not None]
    return {
        "rank": rounded(_spearman(pairs), 3),
        "runs": len(pairs),
        "within": rounded(sum(within) / len(within), 3) if within else None,
        "budgets": len(within),
    }


def _spearman(pairs: list[tuple[float, float]]) -> float | None:
    """Return the rank correlation; None for fewer than three pairs, or where one side is all equal."""
    ranks = pd.DataFrame(pairs, dtype=np.float64).rank()
    if len(pairs) < FEWEST or (ranks.nunique() < 2).any():
        return None
    return float(np.corrcoef(ranks.to_numpy().T)[0, 1])
