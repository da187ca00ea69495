"""KVzip's scores of one key/value head from queries and keys, with loops; and which keys stay."""

from __future__ import annotations

import math

import numpy as np


def largest(
    queries: np.ndarray, keys: np.ndarray, again: np.ndarray, start: int, stop: int, scaling: float, sinks: int = 4
) -> list[float]:
    """Return the largest weight on each key of a chunk.

    Queries of the second reading ``[Q, q, D]`` of a group, keys of the prompt ``[P, D]``, of the second reading
    ``[q, D]``.
    """
    best = [0.0] * (stop - start)
    first = [keys[place] for place in range(min(sinks, start))]
    chunk = [keys[place] for place in range(start, stop)]
    for head in queries:
        for place, query in enumerate(head):
            seen = [*first, *chunk, *again[: place + 1]]
            exponentials = [math.exp(float(query @ key) * scaling) for key in seen]
            for offset in range(len(chunk)):
                weight = exponentials[len(first) + offset] / sum(exponentials)
                best[offset] = max(best[offset], weight)
    return best


def retained(scores: list[float], visible: list[int], budget: int, prompt: int, sinks: int) -> set[int]:
    """Return the keys that stay; of equal scores the newer key stays."""
    free = [key for key in visible if key >= sinks]
    order = sorted(free, key=lambda key: (2.0 if key >= prompt else scores[key], key))
    return set(visible) - set(order[: max(0, len(visible) - budget)])
