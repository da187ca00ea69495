"""FINCH: rows of the question, each times the keys before it; a rank within a chunk where there are chunks."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from tests.reference.policies.evict import Rows, Sets, loop


def finch(
    rows: Rows,
    budget: int,
    prompt: int,
    *,
    window: int,
    chunk: int | None = None,
    normalise: bool = True,
    group: str = "mean",
    when: Callable[[int], bool] | None = None,
) -> tuple[Sets, Sets]:
    """Return ``V_t`` and ``R_t`` of one key/value head."""
    width = min(window, budget // 2)
    past: list[np.ndarray] = []

    def score(t: int, visible: set[int], row: np.ndarray) -> list[float]:
        past.append(row)
        votes = []
        for key in range(t + 1):
            seen = [query for query in range(t + 1 - width, t + 1) if query >= key]
            votes.append(sum(float(past[query][key]) * (query if normalise else 1) for query in seen))
        if chunk is None:
            return votes
        shares = [0.0] * (t + 1)
        for first in range(0, t + 1, chunk):
            members = [key for key in range(first, first + chunk) if key in visible]
            members.sort(key=lambda key: (math.inf if key > t - width else votes[key], key))
            for rank, key in enumerate(members):
                shares[key] = (rank + 1) / len(members)
        return shares

    once = (lambda t: t == prompt - 1) if when is None else when
    return loop(rows, score, budget, prompt, "full", recent=width, group=group, when=once)
