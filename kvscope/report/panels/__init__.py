"""The panels of the page, one file of data and one of drawing each. Importing this package registers them."""

from kvscope.report.panels import (
    agreement,
    budget_curve,
    depth,
    head_map,
    inspector,
    norms,
    outcome,
    over_time,
    overview,
    provenance,
    queries,
    regrets,
    residency_raster,
    sweep,
    text_view,
)

__all__ = [
    "agreement",
    "budget_curve",
    "depth",
    "head_map",
    "inspector",
    "norms",
    "outcome",
    "over_time",
    "overview",
    "provenance",
    "queries",
    "regrets",
    "residency_raster",
    "sweep",
    "text_view",
]
