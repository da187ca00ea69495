"""Limits on the amount of data in a page."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """How much data one page may contain; the page states what is omitted. Bytes are those in the page.

    Attributes
    ----------
    rows : int
        Rows of a table, and lines of a plot.
    text_bytes : int
        Token texts; sequences beyond the limit are not shown in the panels of single tokens.
    raster_bytes, share_bytes, map_bytes, line_bytes, row_bytes, key_bytes : int
        Residency rasters; shares of heads by token and step; layer x head maps; lines over steps; attention rows;
        values of each key.
    weights : int
        Attention weights that are read from the traces to compute the attention on evicted keys.
    worst : int
        Evictions listed for each run.
    bins : int
        Steps of the text view; a line over steps has twice as many points.
    sequences : int
        Sequences in the panels of single tokens.
    """

    rows: int = 400
    text_bytes: int = 700_000
    raster_bytes: int = 5_000_000
    share_bytes: int = 2_000_000
    map_bytes: int = 700_000
    line_bytes: int = 700_000
    row_bytes: int = 900_000
    key_bytes: int = 1_500_000
    weights: int = 1_500_000_000
    worst: int = 50
    bins: int = 128
    sequences: int = 12
