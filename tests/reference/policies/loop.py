"""The eviction loop of one key/value head for rules that score the cache as it stands, with sets and loops."""

from __future__ import annotations

from collections.abc import Callable


def evict(
    length: int,
    budget: int,
    compresses: Callable[[int], bool],
    score: Callable[[int, list[int]], dict[int, float]],
    sinks: int = 0,
    recent: int = 0,
) -> list[set[int]]:
    """Return ``R_t`` of every step; `score` gets ``t`` and the visible keys in order, and is asked only to evict."""
    held: set[int] = set()
    result = []
    for t in range(length):
        held = held | {t}
        if compresses(t) and len(held) > budget:
            scores = score(t, sorted(held))
            free = [key for key in sorted(held) if key >= sinks and key <= t - recent]
            for key in sorted(free, key=lambda key: scores[key])[: len(held) - budget]:  # stable: the oldest of equals
                held = held - {key}
        result.append(held)
    return result
