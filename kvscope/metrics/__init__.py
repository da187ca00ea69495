"""Fidelity metrics: one file for each or for a family. Importing this package registers them."""

from kvscope.metrics import cosine, keys, mass, overlap
from kvscope.metrics.base import METRICS, Metric, Rows, metric

__all__ = ["METRICS", "Metric", "Rows", "cosine", "keys", "mass", "metric", "overlap"]
