"""Learned gates, filters and scorers, which ``attention-gate``, ``q-filters`` and ``kvzap`` use: modules and files."""
