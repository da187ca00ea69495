"""Layer x head map: where in the model a policy loses what it loses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from kvscope.report.encoding import rounded
from kvscope.report.panel import panel
from kvscope.report.source import ReportInput, Run

DIGITS = 4


@panel(
    "head-map",
    title="Layer × head map",
    order=30,
    needs=("fidelity",),
    help="Each cell is one query head of one layer: the mean of the chosen metric over all steps and sequences of the "
    "chosen run. Cells that stand out from their row are heads for which this choice of keys fits better or worse "
    "than for their neighbours; click one to see its raster.",
)
def head_map(source: ReportInput) -> dict[str, Any]:
    """Return the mean of every metric for every run, layer and head, with one scale per metric for all runs."""
    names = [item["name"] for item in source.metric_list()]
    shown, notes = _within_limit(source, len(names))
    maps = []
    for replay in source.replays:
        own = [run for run in shown if run.replay is replay]
        if own:
            maps += _maps(source, own, names)
    return {
        "first": next((run.id for run in source.ranking if run.budget is not None), None),
        "metrics": source.metric_list(),
        "maps": maps,
        "scale": {name: _scale(maps, name) for name in names},
        "notes": notes,
    }


def _within_limit(source: ReportInput, metrics: int) -> tuple[list[Run], list[str]]:
    shown: list[Run] = []
    left = source.limits.map_values
    for run in source.runs:
        trace = run.replay.info["trace"]
        left -= metrics * len(trace["layers"]) * int(trace["heads"])
        if left < 0:
            break
        shown.append(run)
    if len(shown) == len(source.runs):
        return shown, []
    missing = f"{len(source.runs) - len(shown)} of {len(source.runs)} runs"
    return shown, [f"Maps of {missing} are left out to keep the page small; fidelity.parquet has them."]


def _maps(source: ReportInput, runs: Sequence[Run], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the maps of runs of one replay, reading each layer once."""
    replay = runs[0].replay
    trace = replay.info["trace"]
    layers, heads = [int(layer) for layer in trace["layers"]], int(trace["heads"])
    present = [name for name in names if name in replay.info.get("metrics", {})]
    cells = {run.number: {name: np.full((len(layers), heads), np.nan) for name in present} for run in runs}
    for row, layer in enumerate(layers):
        means = _means(replay.fidelity(layer=layer), present)
        places = list(zip(means.index.get_level_values("run"), means.index.get_level_values("head"), strict=True))
        for name in present:
            for (number, head), value in zip(places, means[name], strict=True):
                if number in cells:
                    cells[number][name][row, head] = value
    return [
        {
            "id": run.id,
            "name": source.name_of(run),
            "layers": layers,
            "heads": heads,
            "group": heads // int(trace["kv_heads"]),
            "values": {
                name: [[rounded(x, DIGITS) for x in row] for row in values.tolist()]  # [L][H]
                for name, values in cells[run.number].items()
            },
        }
        for run in runs
    ]


def _means(frame: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Return means over steps, then sequences, indexed by run and head."""
    per_sequence = frame.groupby(["run", "sequence", "head"])[list(names)].mean()
    return per_sequence.groupby(["run", "head"]).mean()


def _scale(maps: Sequence[dict[str, Any]], name: str) -> list[float] | None:
    """Return the smallest and the largest value of a metric over all maps; None where it has none."""
    values = [x for each in maps for row in each["values"].get(name, []) for x in row if x is not None]
    return [min(values), max(values)] if values else None
