"""Where the stretches of rows end over which store ``topk`` sums columns."""

from __future__ import annotations

from kvscope.trace.schema import STRETCH


def stretches(prompt: int, length: int) -> list[int]:
    """Return the ends (exclusive) of the stretches of rows over which columns are summed."""
    return sorted({*range(STRETCH, length, STRETCH), prompt, length})


def count_stretches(prompt: int, length: int) -> int:
    """Return how many stretches `stretches` gives, without making them."""
    return (length - 1) // STRETCH + 1 + (prompt < length and prompt % STRETCH != 0)
