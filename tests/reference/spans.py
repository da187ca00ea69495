"""How much of a span the heads hold, with sets and loops."""

from __future__ import annotations

from collections.abc import Sequence

from tests.reference.residency import Stay, resident


def held(stays: Sequence[Stay], heads: int, length: int, start: int, stop: int) -> list[tuple[float, float] | None]:
    """Return after each step the mean share of the span that a head holds, and the share of heads that hold it all."""
    sets = resident(stays, heads, length)
    result: list[tuple[float, float] | None] = []
    for t in range(length):
        if t < stop - 1:
            result.append(None)
            continue
        counts = [len(sets[head][t] & set(range(start, stop))) for head in range(heads)]
        size = stop - start
        result.append((sum(counts) / heads / size, sum(count == size for count in counts) / heads))
    return result
