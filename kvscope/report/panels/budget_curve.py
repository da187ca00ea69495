"""Fidelity over budget: one line per policy, any metric, with the ideal set as the line that none can cross."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from kvscope.report.encoding import rounded
from kvscope.report.panel import panel
from kvscope.report.source import ReportInput, Run

# Metric -> the metric that bounds it from above for the same number of keys.
REFERENCES = {"retained_mass": "ideal_mass"}


@panel(
    "budget-curve",
    title="Fidelity over budget",
    order=20,
    needs=("summary",),
    help="Each line is one policy, from the smallest budget to the largest; further left is a smaller cache. A line "
    "that stays high while it moves left loses little; the distance to the dashed ideal, where there is one, is "
    "what a better choice of keys could gain.",
)
def budget_curve(source: ReportInput) -> dict[str, Any]:
    """Return one line per policy and protocol, with a point per budget."""
    lines = _lines(source.runs)
    names = list(lines)
    shown = names[: source.limits.rows]
    notes = []
    if len(shown) < len(names):
        notes.append(f"The plot shows {len(shown)} of {len(names)} lines; the others are in the summary table's files.")
    without = list(dict.fromkeys(run.label for run in source.runs if run.budget_keys is None))
    if without:
        notes.append(f"Without a budget, and so without a line: {', '.join(without)}.")
    if names and all(len(runs) == 1 for runs in lines.values()):
        notes.append("Only one budget was replayed: lines need two or more, for instance --budget 10%,20%,40%.")
    metrics = source.metric_list()
    return {
        "metrics": metrics,
        "lines": [_line(source, lines[name], metrics) for name in shown],
        "references": {
            name: _reference(source.runs, bound)
            for name, bound in REFERENCES.items()
            if name in source.metrics and bound in source.metrics
        },
        "notes": notes,
    }


def _lines(runs: Sequence[Run]) -> dict[tuple[str, ...], list[Run]]:
    lines: dict[tuple[str, ...], list[Run]] = defaultdict(list)
    for run in runs:
        if run.budget_keys is not None:
            lines[(run.label, run.source, *run.protocol)].append(run)
    return {name: sorted(line, key=lambda run: run.budget_keys or 0.0) for name, line in lines.items()}


def _line(source: ReportInput, runs: Sequence[Run], metrics: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first = runs[0]
    name = first.label if len(source.replays) == 1 else f"{first.label} · {first.source}"
    return {
        "name": name,
        "label": first.label,
        "replay": source.names.index(first.source),
        "loop": first.protocol[1],
        "prefill": first.protocol[2],
        "budgets": [run.budget for run in runs],
        "keys": [rounded(run.budget_keys) for run in runs],
        "values": {
            metric["name"]: [
                [rounded(run.metrics.get(metric["name"], {}).get(end)) for end in ("mean", "low", "high")]
                for run in runs
            ]
            for metric in metrics
        },
    }


def _reference(runs: Sequence[Run], bound: str) -> list[dict[str, Any]]:
    """Return the bound's points, one line per protocol; it depends on the budget and not on the policy."""
    points: dict[tuple[str, str, str], dict[float, float]] = defaultdict(dict)
    for run in runs:
        keys, value = run.budget_keys, rounded(run.mean(bound))
        if keys is not None and value is not None:
            points[run.protocol].setdefault(keys, value)
    return [
        {
            "name": f"ideal ({prefill} prefill)" if len(points) > 1 else "ideal",
            "keys": [rounded(keys) for keys in sorted(found)],
            "values": [found[keys] for keys in sorted(found)],
        }
        for (_, _, prefill), found in points.items()
    ]
