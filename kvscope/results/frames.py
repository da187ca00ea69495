"""Tables of a replay for reading in Python: named policies and budgets in place of numbers of runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import pandas as pd

from kvscope.core.errors import UsageError
from kvscope.core.records import RunRecord
from kvscope.core.registry import nearest
from kvscope.core.summary_records import RunSummary, SummaryRecord

Table = Literal["summary", "fidelity", "residency", "tokens", "answers"]
Per = Literal["row", "step", "head", "layer", "sequence", "run"]
NAMED = ("policy", "budget", "loop")
# Columns that stay when the others are averaged away.
KEPT: dict[str, tuple[str, ...]] = {
    "step": ("sequence", "step"),
    "head": ("sequence", "layer", "head"),
    "layer": ("sequence", "layer"),
    "sequence": ("sequence",),
    "run": (),
}


def summary_frame(summary: SummaryRecord) -> pd.DataFrame:
    """Return one row for each run: policy, budget, loop, prefill, and the mean of each metric."""
    return pd.DataFrame([_summary_row(run) for run in summary.runs])


def _summary_row(run: RunSummary) -> dict[str, object]:
    means = {name: value.mean for name, value in run.metrics.items()}
    return {
        "policy": run.label,
        "budget": run.budget or "",
        "loop": str(run.loop),
        "prefill": str(run.prefill),
        **means,
    }


def with_names(frame: pd.DataFrame, runs: Sequence[RunRecord]) -> pd.DataFrame:
    """Return a table with the columns `policy`, `budget` and `loop` in place of `run`."""
    by_number = {run.run: (run.label, run.budget or "", str(run.loop)) for run in runs}
    named = pd.DataFrame([by_number[number] for number in frame["run"]], columns=list(NAMED), index=frame.index)
    return pd.concat([named, frame.drop(columns="run")], axis=1)


def averaged(frame: pd.DataFrame, per: Per) -> pd.DataFrame:
    """Return the means of the metrics of `fidelity` over everything but the named columns and those of `per`.

    Raises
    ------
    UsageError
        If `per` is none of those above.
    """
    if per not in get_args(Per):
        raise UsageError(f"fidelity cannot be averaged per {per!r}", nearest(str(per), get_args(Per)))
    if per == "row":
        return frame
    kept = [*NAMED, *KEPT[per]]
    places = {"sequence", "layer", "head", "step"}
    metrics = [name for name in frame.columns if name not in places and name not in NAMED]
    return frame.groupby(kept, sort=False, dropna=False)[metrics].mean().reset_index()
