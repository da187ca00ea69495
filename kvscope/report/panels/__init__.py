"""The panels of the page, one file of data and one of drawing each. Importing this package registers them."""

from kvscope.report.panels import budget_curve, head_map, provenance, residency_raster, summary_table

__all__ = ["budget_curve", "head_map", "provenance", "residency_raster", "summary_table"]
