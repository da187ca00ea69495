"""Plotly figures for notebooks, made from the data of the page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from kvscope.core.errors import ResultError, UsageError
from kvscope.core.registry import nearest
from kvscope.report.page import report_input
from kvscope.report.panels.budget_curve import SIZE, curve_lines
from kvscope.report.runs import MetricFacts, RunView
from kvscope.report.source import ReportInput
from kvscope.results.store import Replay
from kvscope.trace.reader import Trace

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def plot(
    replays: Replay | Sequence[Replay],
    name: str = "budget_curve",
    *,
    metric: str | None = None,
    run: int | None = None,
    traces: Mapping[str, Trace] | None = None,
) -> Figure:
    """Return a Plotly figure of a replay, or of several.

    Parameters
    ----------
    replays : Replay or sequence of Replay
        What to show.
    name : str
        ``budget_curve`` (a metric over the keys held, one line per policy), ``head_map`` (a metric of one run
        by layer and query head), or ``over_time`` (a metric of every run of one budget by step).
    metric : str, optional
        By default the first metric with a better direction.
    run : int, optional
        Number of a run of the first replay: the run of ``head_map``, and the one whose budget ``over_time`` shows. By
        default the run that the page shows first.
    traces : mapping of str to Trace, optional
        As for `report`.

    Raises
    ------
    UsageError
        Unknown figure, metric or run.
    ResultError
        If the metric has no value to show.
    """
    if name not in _FIGURES:
        raise UsageError(f"no figure is called {name!r}", nearest(name, _FIGURES))
    source = report_input([replays] if isinstance(replays, Replay) else replays, traces or {})
    metrics = {each.name: each for each in source.metric_facts()}
    usual = next((each.name for each in metrics.values() if each.direction != "none"), next(iter(metrics)))
    if (metric or usual) not in metrics:
        raise UsageError(f"none of the replays has metric {metric!r}", nearest(str(metric), metrics))
    figure = _FIGURES[name](source, metrics[metric or usual], _run(source, run))
    if not figure.data:
        raise ResultError(f"{metric or usual} has no value to show", "Choose another metric or run.")
    return figure


def _run(source: ReportInput, number: int | None) -> RunView:
    if number is None:
        return source.first
    found = [run for run in source.runs if run.replay is source.replays[0] and run.number == number]
    if not found:
        raise UsageError(f"replay {source.replays[0].path} has no run {number}", "Name a run of its run.json.")
    return found[0]


def _budget_curve(source: ReportInput, metric: MetricFacts, _: RunView) -> Figure:
    """Return one line per policy; those that the page does not show at first are hidden in the legend.

    Where caches were quantised, the lines are over the bytes of a key/value head's cache instead of the keys held.
    """
    lines = curve_lines(source)
    sized = any(run.info.cache is not None for line in lines for run in line.runs)
    what, title = (SIZE, "bytes of a head's cache") if sized else ("held_keys", "keys held")
    figure = _figure(metric.title, f"{title}, mean over the steps", _axis(metric))
    for line in [line for line in lines if sized or not line.sizes][: source.limits.rows]:
        points = [(run.mean(what), run.mean(metric.name), run.budget) for run in line.runs]
        if any(value is not None for _, value, _ in points):
            keys, values, budgets = zip(*points, strict=True)
            figure.add_scatter(
                x=keys,
                y=values,
                text=budgets,
                name=line.name,
                mode="lines+markers",
                line={"dash": "dash" if line.kind == "bound" else "solid"},
                visible=True if line.usual else "legendonly",
                hovertemplate="budget %{text}: %{y:.4f}",
            )
    return figure


def _head_map(source: ReportInput, metric: MetricFacts, run: RunView) -> Figure:
    """Return the mean over steps and sequences of every query head."""
    means = source.means(run.replay)
    figure = _figure(f"{metric.title}, {source.name_of(run)}", "query head", "layer")
    if metric.name in means.by_head:
        values = means.by_head[metric.name][means.runs[run.number]]  # [L, H]
        if not np.isnan(values).all():
            layers = [str(layer) for layer in run.replay.info.trace.layers]
            figure.add_heatmap(z=values, y=layers, colorscale="Cividis", colorbar={"title": metric.title})
            figure.update_yaxes(autorange="reversed", type="category")
    return figure


def _over_time(source: ReportInput, metric: MetricFacts, run: RunView) -> Figure:
    """Return the mean over layers and heads at every step of the first sequence."""
    figure = _figure(f"{metric.title}, budget {run.budget or 'none'}", "step", _axis(metric))
    for each in source.runs:
        if each.replay is run.replay and each.budget == run.budget:
            means = source.means(each.replay)
            steps = means.by_step[source.parts_of(each.replay)[0].number].get(metric.name)
            values = None if steps is None else steps[means.runs[each.number]]
            if values is not None and not np.isnan(values).all():
                there = np.flatnonzero(~np.isnan(values))
                shown = True if each.label in source.usual else "legendonly"
                figure.add_scatter(x=there, y=values[there], name=source.title_of(each), mode="lines", visible=shown)
    return figure


def _figure(title: str, x: str, y: str) -> Figure:
    from plotly.graph_objects import Figure  # slow to import: only when a figure is made

    figure = Figure()
    figure.update_layout(title=title, xaxis_title=x, yaxis_title=y, template="plotly_white")
    return figure


def _axis(metric: MetricFacts) -> str:
    better = "" if metric.direction == "none" else f" ({metric.direction} is better)"
    return f"{metric.title}{better}"


_FIGURES: dict[str, Callable[[ReportInput, MetricFacts, RunView], Figure]] = {
    "budget_curve": _budget_curve,
    "head_map": _head_map,
    "over_time": _over_time,
}
