"""Which rows of a summary table are printed, and in which order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvscope.core.records import MetricRecord
    from kvscope.core.summary_records import RunSummary

USUAL = "retained_mass"  # what rows are sorted by unless a metric is named


def arranged(
    runs: Sequence[RunSummary], declared: Mapping[str, MetricRecord], sort: str | None, top: int | None
) -> list[RunSummary]:
    """Return the runs by budget, within a budget the best by `sort` first, each closed run after its open run.

    The order of policies is that of their closed runs if these have the metric, else of their open runs. Without a
    better direction the largest is first. Runs without a value are last, in the order in which they were replayed.
    """
    name = metric_of(sort)
    lower = name in declared and declared[name].direction == "lower"
    policies: dict[int, list[RunSummary]] = defaultdict(list)  # of each open run: itself and its closed run
    for run in runs:
        policies[run.run if run.open_run is None else run.open_run].append(run)
    budgets = {budget: place for place, budget in enumerate(dict.fromkeys(run.budget for run in runs))}

    def place(group: list[RunSummary]) -> tuple[int, bool, float]:
        values = [mean for run in group if (mean := run.mean(name)) is not None]
        value = values[-1] if values else 0.0
        return budgets[group[0].budget], not values, value if lower else -value

    ordered = sorted((sorted(group, key=_is_closed) for group in policies.values()), key=place)
    return [run for group in _first(ordered, top) for run in group]


def metric_of(sort: str | None) -> str:
    """Return the name of the metric to sort by, with underscores."""
    return (sort or USUAL).replace("-", "_").replace(" ", "_")


def require_metric(sort: str | None, metrics: Iterable[str]) -> None:
    """Raise UsageError unless the replay will have the metric to sort by."""
    from kvscope.core.errors import UsageError
    from kvscope.core.registry import nearest

    known = list(metrics)
    if sort is not None and metric_of(sort) not in known:
        raise UsageError(f"the replay has no metric {sort!r} to sort by", nearest(metric_of(sort), known))


def _is_closed(run: RunSummary) -> bool:
    return run.open_run is not None


def _first(groups: Sequence[list[RunSummary]], top: int | None) -> list[list[RunSummary]]:
    """Return the first `top` policies of each budget; all if it is None."""
    seen: dict[str | None, int] = defaultdict(int)
    kept = []
    for group in groups:
        seen[group[0].budget] += 1
        if top is None or seen[group[0].budget] <= top:
            kept.append(group)
    return kept
