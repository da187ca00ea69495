"""Summary table: every policy under every budget, all metrics, the best and the last of each budget marked."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from kvscope.report.encoding import rounded
from kvscope.report.panel import panel
from kvscope.report.source import ReportInput, Run

HEADLINES = ("retained_mass", "ideal_cosine", "output_error")


@panel(
    "summary",
    title="Summary",
    order=10,
    needs=("summary",),
    help="Each row is one policy under one budget; a number is the mean over steps, then heads, layers and sequences, "
    "with its 95 % interval below it where there are five or more sequences. ★ marks the best and ▽ the last of those "
    "with the same budget, trace and protocol; across budgets, compare with the keys read and held.",
)
def summary_table(source: ReportInput) -> dict[str, Any]:
    """Return rows of the summary table, in the order of budget and of the first metric that has a best end."""
    metrics = source.metric_list()
    runs = source.ranking
    shown = runs[: source.limits.rows]
    marks = _marks(runs, metrics)
    notes = []
    if len(shown) < len(runs):
        notes.append(f"The table shows {len(shown)} of {len(runs)} rows; the others are in summary.json.")
    if not any(value.get("low") is not None for run in shown for value in run.metrics.values()):
        notes.append("No intervals: they need five or more sequences.")
    return {
        "metrics": metrics,
        "several": len(source.replays) > 1,
        "rows": [_row(run, marks[run.id]) for run in shown],
        "headlines": _headlines(runs, metrics),
        "notes": notes,
    }


def comparable(run: Run) -> tuple[str, ...] | None:
    """Return what two runs must share for one to be better than the other; None where a run has no budget."""
    return None if run.budget is None else (*run.protocol, run.budget)


def _row(run: Run, marks: dict[str, str]) -> dict[str, Any]:
    _, loop, prefill = run.protocol
    return {
        "id": run.id,
        "replay": run.source,
        "policy": str(run.info["policy"]),
        "label": run.label,
        "budget": run.budget,
        "budget_keys": rounded(run.budget_keys),
        "loop": loop,
        "prefill": prefill,
        "phase": str(run.info.get("phase", "step")),
        "values": {name: _value(value) for name, value in run.metrics.items()},
        "marks": marks,
    }


def _value(value: Any) -> dict[str, Any]:
    return {**{end: rounded(value.get(end)) for end in ("mean", "low", "high")}, "count": value.get("count")}


def _marks(runs: Sequence[Run], metrics: Sequence[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """Return for each run the metrics in which it is the best, or the last, of those it compares with."""
    marks: dict[str, dict[str, str]] = {run.id: {} for run in runs}
    for group in _groups(runs).values():
        for metric in metrics:
            ends = _ends(group, metric)
            if ends is None:
                continue
            for run in group:
                value = rounded(run.mean(metric["name"]))
                if value == ends[0]:
                    marks[run.id][metric["name"]] = "best"
                elif value == ends[1] and len(group) > 2:
                    marks[run.id][metric["name"]] = "last"
    return marks


def _ends(group: Sequence[Run], metric: dict[str, Any]) -> tuple[float, float] | None:
    """Return the best and the last value of a group; None where there is no best, or all are equal."""
    if metric["direction"] == "none":
        return None
    values = [value for run in group if (value := rounded(run.mean(metric["name"]))) is not None]
    if len(values) < 2 or min(values) == max(values):
        return None
    low, high = min(values), max(values)
    return (high, low) if metric["direction"] == "higher" else (low, high)


def _headlines(runs: Sequence[Run], metrics: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the best run of each budget in the metrics that a reader asks for first."""
    wanted = [metric for name in HEADLINES for metric in metrics if metric["name"] == name]
    found = []
    for group in _groups(runs).values():
        best = []
        for metric in wanted:
            ends = _ends(group, metric)
            if ends is not None:
                names = [run.label for run in group if rounded(run.mean(metric["name"])) == ends[0]]
                best.append({"metric": metric["title"], "value": ends[0], "labels": names})
        if best:
            first = group[0]
            found.append(
                {
                    "budget": first.budget,
                    "budget_keys": rounded(first.budget_keys),
                    "protocol": f"{first.protocol[2]} prefill, {first.protocol[1]} loop",
                    "replay": first.source,
                    "of": len(group),
                    "best": best,
                }
            )
    return found


def _groups(runs: Sequence[Run]) -> dict[tuple[str, ...], list[Run]]:
    groups: dict[tuple[str, ...], list[Run]] = defaultdict(list)
    for run in runs:
        key = comparable(run)
        if key is not None:
            groups[key].append(run)
    return groups
