"""Residency raster: which keys were held at which step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

from kvscope.core.json import JsonDict
from kvscope.report.panel import panel
from kvscope.report.parts import Part, spread
from kvscope.report.residency import packed_intervals, packed_intervals_bytes
from kvscope.report.source import ReportInput


@panel(
    "residency",
    title="Residency",
    order=50,
    needs=("residency",),
    detail=True,
    help="Each row is a token, each column a step: blue where the token's key is held after the step (for a policy "
    "that reads a part: where it is read), sand or brown where it has been evicted, empty before it exists. Long blue "
    "rows are tokens that the policy retains, and an edge parallel to the diagonal is a sliding window. For a single "
    "head, the pointer shows since when a key is held, or when and why it was evicted.",
)
def residency_raster(source: ReportInput) -> JsonDict:
    """Return residency intervals per sequence, run and layer as packed integers, as many as fit into the page.

    A layer is added for all runs at once, so that they can be compared; layers are spread over the depth of the model,
    sequence by sequence. If not even one layer fits, the runs of it that fit are returned.
    """
    left = source.limits.raster_bytes
    rasters: list[JsonDict] = []
    layers = list(_order(source))
    for shown, (part, layer) in enumerate(layers):
        residency = source.residency(part, layer)
        made: list[JsonDict] = [
            {"run": run.id, "part": part.name, "layer": layer, **packed_intervals(residency[run.id])}
            for run in source.runs_of(part)
            if run.id in residency
        ]
        fitting = sum(total <= left for total in accumulate(packed_intervals_bytes(each) for each in made))
        left -= sum(packed_intervals_bytes(each) for each in made[:fitting])
        if fitting == len(made) or (not rasters and fitting):
            rasters += made[:fitting]
        if fitting < len(made):
            return {"rasters": rasters, "notes": [_omitted(source, shown, len(layers), fitting, made)]}
    return {"rasters": rasters, "notes": []}


def _omitted(source: ReportInput, shown: int, layers: int, fitting: int, made: Sequence[JsonDict]) -> str:
    limit = source.limits.raster_bytes
    size = f"{limit / 1e6:g} MB" if limit >= 100_000 else f"{limit} bytes"
    what = f"{shown} of {layers} layers are shown"
    if shown == 0:
        what = f"{fitting} of {len(made)} runs are shown, in 1 of {layers} layers"
    return f"{what}: all rasters together are limited to {size}. residency.parquet has all of them."


def _order(source: ReportInput) -> Iterator[tuple[Part, int]]:
    """Yield sequence and layer: first sequences first, layers spread over the depth."""
    for part in source.parts.values():
        for layer in spread(source.layers_of(part)):
            yield part, layer
