"""Figures of lines and points, by the name of their panel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvscope.core.errors import UsageError
from kvscope.core.registry import nearest
from kvscope.report.colours import BOUND, line_style
from kvscope.report.encoding import unpacked
from kvscope.report.figure_choice import Choice, Draw, axis, bars, empty, needed, style_of
from kvscope.report.panels.answers import answers as answer_data
from kvscope.report.panels.budget_curve import SIZE, CurveLine, curve_lines
from kvscope.report.panels.depth import depth as depth_data
from kvscope.report.panels.outcome import OUTCOME
from kvscope.report.panels.outcome import outcome as outcome_data
from kvscope.report.panels.queries import queries as query_data
from kvscope.report.panels.sweep import sweep as sweep_data
from kvscope.report.runs import MetricFacts, RunView
from kvscope.report.source import ReportInput

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# Axis of the budget curve -> the metric that it shows, and its title.
AXES = {
    "held": ("held_keys", "keys held, mean over the steps"),
    "share": ("held_keys", "share of the keys held, mean over the steps"),
    "read": ("read_keys", "keys read, mean over the steps"),
    "budget": (None, "budget, keys per key/value head"),
    "bytes": (SIZE, "bytes of a head's cache, mean over the steps"),
}


def _budget_curve(source: ReportInput, choice: Choice) -> Figure:
    """Return one line per policy; those that the page does not show at first are hidden in the legend.

    Where caches were quantised, the lines are over the bytes of a key/value head's cache instead of the keys held.
    Policies that hold every key are in a strip beside the axis.
    """
    if choice.against not in AXES:
        raise UsageError(f"no axis is called {choice.against!r}", nearest(choice.against, AXES))
    lines = curve_lines(source)
    sized = any(run.info.cache is not None for line in lines for run in line.runs)
    against = "bytes" if sized and choice.against == "held" else choice.against
    metric, strip = choice.metric, False
    figure = empty(metric.title, AXES[against][1], axis(metric))
    for line in [line for line in lines if against == "bytes" or not line.sizes][: source.limits.rows]:
        means = [run.mean(metric.name) for run in line.runs]
        if all(mean is None for mean in means):
            continue
        apart = line.holds_all and against in ("held", "share", "bytes")
        visible = choice.shows(line.runs[0].label, line.usual)
        strip |= apart and visible is True
        figure.add_scatter(
            x=[run.budget for run in line.runs] if apart else [_place(run, against) for run in line.runs],
            y=means,
            xaxis="x2" if apart else "x",
            text=[run.budget for run in line.runs],
            name=line.name,
            visible=visible,
            error_y=_interval(line, metric.name),
            hovertemplate="budget %{text}: %{y:.4f}",
            **style_of(source, line.runs[0]),
        )
    figure.update_layout(xaxis={"domain": [0, 0.8] if strip else [0, 1], "rangemode": "tozero"})
    if against == "share":
        figure.update_xaxes(tickformat=".0%", selector=0)
    if strip:
        figure.update_layout(xaxis2={"domain": [0.84, 1], "type": "category", "title": "every key held, by budget"})
    return figure


def _interval(line: CurveLine, metric: str) -> dict[str, object] | None:
    found = [run.metrics.get(metric) for run in line.runs]
    return bars(
        [None if one is None else one.low for one in found],
        [None if one is None else one.mean for one in found],
        [None if one is None else one.high for one in found],
    )


def _place(run: RunView, against: str) -> float | None:
    """Return the place of a run on the axis; a bound is at its budget, since the ideal set is chosen from all keys."""
    name = AXES[against][0]
    keys = run.budget_keys if name is None or run.kind == "bound" else run.mean(name)
    return keys / run.full_keys if against == "share" and keys is not None else keys


def _over_time(source: ReportInput, choice: Choice) -> Figure:
    """Return the mean over layers and heads at every step of the first sequence."""
    run, metric = choice.run, choice.metric
    figure = empty(f"{metric.title}, budget {run.budget or 'none'}", "step", axis(metric))
    for each in source.runs:
        if each.replay is run.replay and each.budget == run.budget:
            means = source.means(each.replay)
            steps = means.by_step[source.parts_of(each.replay)[0].number].get(metric.name)
            values = None if steps is None else steps[means.runs[each.number]]
            if values is not None and not np.isnan(values).all():
                there = np.flatnonzero(~np.isnan(values))
                same = each.protocol == run.protocol or each.kind == "bound"
                shown = choice.shows(each.label, each.label in source.usual) if same else "legendonly"
                style = {**style_of(source, each), "mode": "lines"}
                figure.add_scatter(x=there, y=values[there], name=source.title_of(each), visible=shown, **style)
    return figure


def _depth(source: ReportInput, choice: Choice) -> Figure:
    """Return the share of the keys that runs hold in each layer, for policies that do not give every layer the same."""
    data = needed(depth_data(source), "policy that gives layers different shares", "Replay one, such as pyramidkv.")
    figure = empty("Keys by depth", "layer", "share of the keys held")
    runs = {run.id: run for run in source.runs}
    for line in data["lines"]:
        run = runs[line["run"]]
        error = bars(line["low"], line["mean"], line["high"])
        name = source.name_of(run)
        figure.add_scatter(x=data["layers"], y=line["mean"], error_y=error, name=name, **style_of(source, run))
    return figure


def _outcome(source: ReportInput, choice: Choice) -> Figure:
    """Return every run of the closed loop: a metric of the open loop against perplexity."""
    data = needed(outcome_data(source), "closed loop", "Replay again with --perplexity.")
    ratio = MetricFacts.of(OUTCOME, source.metrics[OUTCOME])
    figure = empty(f"{choice.metric.title} against perplexity", axis(choice.metric), axis(ratio))
    runs = {run.id: run for run in source.runs}
    found: dict[str, list[tuple[float, float, RunView]]] = {}
    for group in data["groups"]:
        for id, value in zip(group["runs"], group["values"].get(choice.metric.name, []), strict=False):
            run = runs[id]
            if value is not None and (not choice.policies or run.label in choice.policies):
                found.setdefault(run.label, []).append((value, run.mean(OUTCOME) or 0.0, run))
    shown = [label for label in found if label in (choice.policies or source.usual)]
    others = [point for label, points in found.items() if label not in shown for point in points]
    for label in shown:
        x, y, which = zip(*found[label], strict=True)
        style = {**style_of(source, which[0]), "mode": "markers"}
        figure.add_scatter(x=x, y=y, name=label, text=[run.budget for run in which], **style)
    if others:
        x, y, which = zip(*others, strict=True)
        names = [source.name_of(run) for run in which]
        marker = {"color": BOUND, "symbol": "circle", "size": 5}
        figure.add_scatter(x=x, y=y, name="other policies", text=names, mode="markers", marker=marker)
    ratios = [run.mean(OUTCOME) or 1.0 for points in found.values() for _, _, run in points]
    if ratios and max(ratios) > 10 * min(ratios):  # a policy that breaks the model would flatten all others
        figure.update_layout(yaxis_type="log")
    return figure


def _answers(source: ReportInput, choice: Choice) -> Figure:
    """Return right answers over the budget, one line per policy, over all tasks."""
    data = needed(answer_data(source), "answers", "Replay prompts with answers: kvscope tasks.")
    name = choice.metric.name if choice.named and choice.metric.name in data["metrics"] else data["metrics"][0]
    metric = MetricFacts.of(name, source.metrics[name])
    figure = empty(metric.title, AXES["budget"][1], axis(metric))
    runs = {run.id: run for run in source.runs}
    for line in data["lines"]:
        of_line = [runs[id] for id in line["runs"] if id in data["values"]]
        values = [data["values"][run.id][name][0] or [None] * 4 for run in of_line]
        if of_line and any(value[0] is not None for value in values):
            mean, low, high = ([value[at] for value in values] for at in range(3))
            shown = choice.shows(of_line[0].label, of_line[0].label in source.usual)
            x = [run.budget_keys for run in of_line]
            style = style_of(source, of_line[0])
            figure.add_scatter(x=x, y=mean, error_y=bars(low, mean, high), name=line["name"], visible=shown, **style)
    return figure


def _sweep(source: ReportInput, choice: Choice) -> Figure:
    """Return a metric over the values of the first parameter of which several were replayed."""
    data = needed(sweep_data(source), "sweep of a parameter", "Replay at least three values: --alpha 0.1,0.5,0.9.")
    needed(data["sweeps"] or None, "sweep of a parameter", "Replay at least three values: --alpha 0.1,0.5,0.9.")
    sweep, runs = data["sweeps"][0], {run.id: run for run in source.runs}
    figure = empty(f"{sweep['policy']}: {sweep['parameter']}", sweep["parameter"], axis(choice.metric))
    for place, line in enumerate(sweep["lines"]):
        of_line = [runs[id] for id in line["runs"]]
        y = [run.mean(choice.metric.name) for run in of_line]
        if any(value is not None for value in y):
            loop = f" · {of_line[0].protocol[1]} loop"
            figure.add_scatter(x=line["values"], y=y, name=f"budget {of_line[0].budget}{loop}", **_styled(place))
    return figure


def _queries(source: ReportInput, choice: Choice) -> Figure:
    """Return the cosine of mean queries by step in one layer, one line per lag."""
    todo = "Record queries: kvscope trace --store maps+vectors."
    data = needed(query_data(source), "queries in its trace", todo)
    part = needed(data["parts"].get(choice.part(source).name), "queries in its trace", todo)
    figure = empty(f"Query similarity, layer {choice.layer}", "step", "cosine of mean queries")
    for place, (lag, values) in enumerate(zip(data["lags"], unpacked(part["layers"][str(choice.layer)]), strict=True)):
        there = ~np.isnan(values)
        if there.any():
            style = {**_styled(place), "mode": "lines"}
            figure.add_scatter(x=np.array(part["edges"][:-1])[there], y=values[there], name=f"lag {lag}", **style)
    return figure


def _norms(source: ReportInput, choice: Choice) -> Figure:
    """Return the attention that every key received against the L1 norm of its value, in one key/value head."""
    trace, part = source.trace_of(choice.run.replay), choice.part(source)
    todo = "Make the figure where the trace is stored, with --store maps+vectors."
    trace = needed(trace if trace is not None and "value_l1" in trace.stored else None, "value norms", todo)
    head = choice.kv_head(choice.head or 0)
    received = source.attended(part, choice.layer).received[head]  # [T]
    norm = trace.value_norms(part.number, choice.layer, "l1")[head]  # [T]
    title = f"Layer {choice.layer}, key/value head {head}"
    figure = empty(title, "attention received from later queries", "L1 norm of the value")
    there = (received > 0) & (norm > 0)
    marker = {**_marker(0), "size": 5}
    figure.add_scatter(x=received[there], y=norm[there], name="keys", mode="markers", marker=marker)
    figure.update_layout(xaxis_type="log", yaxis_type="log")
    return figure


def _inspector(source: ReportInput, choice: Choice) -> Figure:
    """Return one row of attention: the keys that the run held before the step, and the others."""
    trace, part = source.trace_of(choice.run.replay), choice.part(source)
    trace = needed(trace, "trace at its recorded path", "Make the figure where the trace is stored.")
    head, step = choice.head or 0, part.length - 1 if choice.step is None else choice.step
    if not 0 <= step < part.length:
        raise UsageError(f"the text has no step {step}", f"Its steps: 0 to {part.length - 1}.")
    weights = np.asarray(trace.attention(part.number, choice.layer, step, step + 1)[head, 0], np.float64)  # [step + 1]
    held = source.residency(part, choice.layer)[choice.run.id].visible(step, step + 1)
    seen = held.reshape(-1, part.length)[choice.kv_head(head), : step + 1]
    title = f"{source.name_of(choice.run)}, layer {choice.layer}, head {head}, step {step}"
    figure = empty(title, "key", "attention")
    for place, (name, which) in enumerate((("seen", seen), ("evicted", ~seen))):
        there = which & (weights > 0)
        marker = {**_marker(place), "size": 5}
        figure.add_scatter(x=np.flatnonzero(there), y=weights[there], name=name, mode="markers", marker=marker)
    figure.update_layout(yaxis_type="log")
    return figure


def _styled(place: int) -> dict[str, object]:
    style = line_style(place)
    line = {"color": style["color"], "dash": style["dash"]}
    return {"line": line, "marker": _marker(place), "mode": "lines+markers"}


def _marker(place: int) -> dict[str, str]:
    style = line_style(place)
    return {"color": style["color"], "symbol": style["symbol"]}


LINES: dict[str, Draw] = {
    "budget_curve": _budget_curve,
    "over_time": _over_time,
    "depth": _depth,
    "outcome": _outcome,
    "answers": _answers,
    "sweep": _sweep,
    "queries": _queries,
    "norms": _norms,
    "inspector": _inspector,
}
