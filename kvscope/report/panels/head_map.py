"""Layer x head map: the layers and heads in which a policy loses fidelity."""

from __future__ import annotations

import numpy as np

from kvscope.core.json import JsonDict
from kvscope.report.encoding import finite_range, packed_bytes, packed_floats
from kvscope.report.panel import panel
from kvscope.report.source import ReportInput


@panel(
    "head-map",
    title="Heads",
    order=40,
    needs=("fidelity",),
    detail=True,
    help="Each cell is one query head of one layer: the mean of the chosen metric over all steps and sequences of the "
    "chosen run. Cells that differ from their row are heads for which this choice of keys is better or worse than for "
    "the other heads of the layer. Choose a cell to show that head in all panels.",
)
def head_map(source: ReportInput) -> JsonDict:
    """Return the mean of every metric for every run, layer and head, with one scale per metric for all runs."""
    left = source.limits.map_bytes
    maps: JsonDict = {}
    scale: dict[str, list[float]] = {}
    for run in source.detailed:
        means = source.means(run.replay)
        values = {name: by_head[means.runs[run.number]] for name, by_head in means.by_head.items()}  # [L, H]
        made = {name: packed_floats(each) for name, each in values.items() if not np.isnan(each).all()}
        left -= sum(packed_bytes(each) for each in made.values())
        if left < 0:
            break
        maps[run.id] = {"layers": [int(layer) for layer in run.replay.info.trace.layers], "values": made}
        for name in made:
            low, high = finite_range(values[name])
            least, largest = scale.get(name, (low, high))
            scale[name] = [min(least, low), max(largest, high)]
    missing = f"{len(source.runs) - len(maps)} of {len(source.runs)} runs"
    notes = [f"Maps of {missing} are omitted to limit the size of the page; fidelity.parquet has them."]
    return {"maps": maps, "scale": scale, "notes": notes if len(maps) < len(source.runs) else []}
