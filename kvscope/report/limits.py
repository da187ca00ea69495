"""How much of the results a page carries."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """How much goes into one page; whatever is left out is said there. Bytes are those in the page.

    Attributes
    ----------
    rows : int
        Rows of a table, and lines of a plot.
    text_bytes : int
        Token texts; sequences beyond it have no part in the panels that show single tokens.
    raster_bytes, share_bytes, map_bytes, line_bytes, row_bytes, key_bytes : int
        Residency rasters; shares of heads by token and step; layer x head maps; lines over steps; attention rows;
        what is known of each key.
    weights : int
        Attention weights that are read from the traces, for what evicted keys would still have received.
    worst : int
        Evictions listed for each run.
    bins : int
        Steps of the text view; a line over steps has twice as many points.
    sequences : int
        Sequences that have a part in the panels that show single tokens.
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
