"""Figures of maps, by the name of their panel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvscope.core.errors import ResultError, UsageError
from kvscope.core.registry import nearest
from kvscope.report.colours import EVICTED, KEPT
from kvscope.report.encoding import unpacked
from kvscope.report.figure_choice import Choice, Draw, empty, needed
from kvscope.report.panels.agreement import agreement as agreement_data
from kvscope.report.panels.over_time import bins
from kvscope.report.panels.spans import KEPT as NEVER_LOST
from kvscope.report.panels.spans import NO_HEAD, lost_by, spans_of
from kvscope.report.source import ReportInput

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MOST = 1000  # rows and columns of a map of residency: more are not visible in print


def _head_map(source: ReportInput, choice: Choice) -> Figure:
    """Return the mean over steps and sequences of every query head."""
    run, metric = choice.run, choice.metric
    means = source.means(run.replay)
    figure = empty(f"{metric.title}, {source.name_of(run)}", "query head", "layer")
    if metric.name in means.by_head:
        values = means.by_head[metric.name][means.runs[run.number]]  # [L, H]
        if not np.isnan(values).all():
            layers = [str(layer) for layer in run.replay.info.trace.layers]
            figure.add_heatmap(z=values, y=layers, colorscale="Cividis", colorbar={"title": metric.title})
            figure.update_yaxes(autorange="reversed", type="category")
    return figure


def _residency(source: ReportInput, choice: Choice) -> Figure:
    """Return the share of key/value heads that hold each token after each step, or whether one head does."""
    run, part = choice.run, choice.part(source)
    found = source.residency(part, choice.layer).get(run.id)
    if found is None:
        raise ResultError(f"{source.name_of(run)} has no residency in layer {choice.layer}", "Choose another run.")
    start = max(0, min(part.prompt, part.length) - 1) if run.protocol[2] == "full" else 0
    steps, keys = bins(start, part.length, MOST), bins(0, part.length, MOST)
    shares = np.full((len(keys) - 1, len(steps) - 1), np.nan)
    for column, step in enumerate(steps[1:] - 1):
        shares[:, column] = _held(found.held_after(int(step)).reshape(found.heads, -1), keys, int(step), choice)
    heads = (
        f"key/value head {choice.kv_head(choice.head)}" if choice.head is not None else f"{found.heads} key/value heads"
    )
    figure = empty(f"{source.name_of(run)}, layer {choice.layer}, {heads}", "step", "token")
    scale = [[0, EVICTED], [1, KEPT]]
    bar = {"title": "held" if choice.head is not None else "share of heads that hold it"}
    figure.add_heatmap(z=shares, x=steps[:-1], y=keys[:-1], colorscale=scale, zmin=0, zmax=1, colorbar=bar)
    figure.update_yaxes(autorange="reversed")
    return figure


def _held(held: NDArray[np.bool_], keys: NDArray[np.int64], step: int, choice: Choice) -> NDArray[np.float64]:
    """Return of each bin of tokens the share that is held, ``[K]``; NaN where none exists yet."""
    chosen = held if choice.head is None else held[[choice.kv_head(choice.head)]]
    there = np.arange(held.shape[1]) <= step
    share = np.where(there, chosen.mean(0), 0.0)  # [T]
    sums, counts = np.add.reduceat(share, keys[:-1]), np.add.reduceat(there.astype(np.int64), keys[:-1])
    means = np.full(len(counts), np.nan)
    np.divide(sums, counts, out=means, where=counts > 0)
    return means


def _agreement(source: ReportInput, choice: Choice) -> Figure:
    """Return the share of keys that every two policies both hold, under the budget of the run."""
    data = needed(agreement_data(source), "two policies under one budget", "Replay several policies.")
    group = next((each for each in data["groups"] if choice.run.id in each["runs"]), None)
    group = needed(group, "other run under this budget", "Choose another run.")
    values = np.array(unpacked(group["values"]))
    np.fill_diagonal(values, np.nan)
    runs = {run.id: run for run in source.runs}
    names = [runs[id].label for id in group["runs"]]
    if len(set(names)) < len(names):
        names = [source.title_of(runs[id]) for id in group["runs"]]
    figure = empty(f"Agreement, budget {choice.run.budget}", "", "")
    text = [["" if np.isnan(value) else f"{value:.2f}" for value in row] for row in values]
    bar = {"title": "keys in common"}
    figure.add_heatmap(z=values, x=names, y=names, text=text, colorscale="Cividis", colorbar=bar)
    figure.update_layout(yaxis={"autorange": "reversed", "type": "category"}, xaxis_type="category")
    return figure


def _spans(source: ReportInput, choice: Choice) -> Figure:
    """Return the step at which each key/value head lost half of a span of the first sequence that has one."""
    parts = [part for part in source.parts_of(choice.run.replay) if spans_of(source, part)]
    todo = "Record spans with the prompt: kvscope tasks."
    part = needed(parts[0] if parts else None, "spans", todo)
    named = {one.name: one for one in spans_of(source, part)}
    if choice.span is not None and choice.span not in named:
        raise UsageError(f"no span is called {choice.span!r}", nearest(choice.span, named))
    span = named[choice.span] if choice.span is not None else next(iter(named.values()))
    steps = lost_by(source, part, choice.run, [span])[0, 1].astype(np.float64)  # [L, G]
    steps = np.where(steps == NO_HEAD, np.nan, np.where(steps == NEVER_LOST, part.length, steps))
    text = [["" if np.isnan(one) else "held" if one == part.length else f"{one:.0f}" for one in row] for row in steps]
    figure = empty(f"{span.name}, {source.name_of(choice.run)}", "key/value head", "layer")
    bar = {"title": "step at which half is lost"}
    layers = [str(layer) for layer in source.layers_of(part)]
    figure.add_heatmap(z=steps, y=layers, text=text, colorscale="Cividis", colorbar=bar)
    figure.update_yaxes(autorange="reversed", type="category")
    return figure


MAPS: dict[str, Draw] = {"head_map": _head_map, "residency": _residency, "agreement": _agreement, "spans": _spans}
