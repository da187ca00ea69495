"""Figures of a replay, for notebooks and papers: Plotly figures made from the data of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from kvscope.core.errors import ResultError, UsageError
from kvscope.core.registry import nearest
from kvscope.report.figure_choice import Choice
from kvscope.report.figure_lines import LINES
from kvscope.report.figure_maps import MAPS
from kvscope.report.page import report_input
from kvscope.report.parts import spread
from kvscope.report.runs import RunView
from kvscope.report.source import ReportInput
from kvscope.results.store import Replay
from kvscope.trace.reader import Trace

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

FIGURES = {**LINES, **MAPS}


def plot(
    replays: Replay | Sequence[Replay],
    name: str = "budget_curve",
    *,
    metric: str | None = None,
    run: int | None = None,
    traces: Mapping[str, Trace] | None = None,
    policies: Sequence[str] = (),
    against: str = "held",
    layer: int | None = None,
    head: int | None = None,
    step: int | None = None,
    span: str | None = None,
) -> Figure:
    """Return one panel of the report as a Plotly figure, of a replay or of several.

    Parameters
    ----------
    replays : Replay or sequence of Replay
        The replays to show.
    name : str
        A panel of the page. Lines: ``budget_curve``, ``over_time``, ``depth``, ``outcome``, ``answers``, ``sweep``,
        ``queries``, ``norms``, ``inspector``. Maps: ``head_map``, ``residency``, ``agreement``, ``spans``.
    metric : str, optional
        Name of the metric to show; by default the first one with a better direction.
    run : int, optional
        Number of a run of the first replay: the one that maps show, and the one whose budget ``over_time`` and
        ``agreement`` show. By default the run that the page shows first.
    traces : mapping of str to Trace, optional
        Traces of the replays by identity, as for `report`.
    policies : sequence of str
        Labels of the policies whose lines are shown. By default those that the page shows first; others are hidden in
        the legend.
    against : str
        Horizontal axis of ``budget_curve``: ``held``, ``share`` (of the keys held), ``read``, ``budget`` or ``bytes``.
    layer, head, step, span : optional
        Layer, query head, step and name of a span of figures that show one; by default the middle layer, all heads (or
        the first), the last step, and the first span.

    Raises
    ------
    UsageError
        If the figure, metric, run, axis, layer or span is unknown.
    ResultError
        If the metric has no value to show.
    """
    name = name.replace("-", "_")
    if name not in FIGURES:
        raise UsageError(f"no figure is called {name!r}", nearest(name, FIGURES))
    source = report_input([replays] if isinstance(replays, Replay) else replays, traces or {})
    choice = replace(
        _choice(source, metric, run, layer), policies=tuple(policies), against=against, head=head, step=step, span=span
    )
    figure = FIGURES[name](source, choice)
    if not figure.data:
        what = choice.metric.name if metric else name
        raise ResultError(f"{what} has no value to show", "Choose another metric, run or layer.")
    return figure


def _choice(source: ReportInput, metric: str | None, run: int | None, layer: int | None) -> Choice:
    metrics = {each.name: each for each in source.metric_facts()}
    usual = next((each.name for each in metrics.values() if each.direction != "none"), next(iter(metrics)))
    if (metric or usual) not in metrics:
        raise UsageError(f"none of the replays has metric {metric!r}", nearest(str(metric), metrics))
    chosen = _run(source, run)
    layers = [int(each) for each in chosen.replay.info.trace.layers]
    if layer is not None and layer not in layers:
        raise UsageError(f"the replay has no layer {layer}", f"Its layers: {', '.join(map(str, layers))}.")
    return Choice(metrics[metric or usual], metric is not None, chosen, spread(layers)[0] if layer is None else layer)


def _run(source: ReportInput, number: int | None) -> RunView:
    if number is None:
        return source.first
    found = [run for run in source.runs if run.replay is source.replays[0] and run.number == number]
    if not found:
        raise UsageError(f"replay {source.replays[0].path} has no run {number}", "Name a run of its run.json.")
    return found[0]
