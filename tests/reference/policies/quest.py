"""Quest on one key/value head, from its rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np


def read(
    keys: np.ndarray,
    queries: np.ndarray,
    budget: int,
    page_size: int,
    fewest: int,
    reduce: Callable[[Sequence[float]], float] = max,
    first: int = 0,
) -> set[int]:
    """Return the keys that the last key's query reads: `keys` ``[n, D]``, `queries` ``[heads of the group, D]``.

    Keys before `first` are out of the model's own reach.
    """
    n = len(keys)
    if n <= budget:
        return set(range(first, n))
    bounds = []
    for start in range(0, n, page_size):
        page = keys[start : start + page_size]
        of_heads = []
        for query in queries:
            bound = 0.0
            for d, q in enumerate(query):
                bound += max(float(q) * min(page[:, d]), float(q) * max(page[:, d]))
            of_heads.append(bound)
        if start + page_size > first:
            bounds.append((reduce(of_heads), start))
    best = sorted(bounds)[-max(fewest, budget // page_size) :]
    chosen = {key for _, start in best for key in range(start, min(start + page_size, n))}
    return {key for key in chosen | {n - 1} if key >= first}
