"""Fidelity metrics: one file for each or for a family. Importing this package registers them."""

from kvscope.metrics import cosine, keys, late, mass, output, overlap, recovered
from kvscope.metrics.base import METRICS, Metric, Rows, metric

__all__ = [
    "METRICS",
    "Metric",
    "Rows",
    "cosine",
    "keys",
    "late",
    "mass",
    "metric",
    "output",
    "overlap",
    "recovered",
]
