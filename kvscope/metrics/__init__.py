"""Fidelity metrics, one file for each or for a family: a file in this folder is found by itself."""

from kvscope.metrics.base import METRICS, Metric, Rows, metric

__all__ = ["METRICS", "Metric", "Rows", "metric"]
