"""Traces on disk: one schema, one writer, one reader."""
