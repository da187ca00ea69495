"""Recycled Attention and RefreshKV on one key/value head, from the pseudocode, with an ordered list for the set."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np


def read(
    rows: np.ndarray,
    budget: int,
    start: int,
    is_full: Callable[[int], bool],
    pooling: int = 1,
    reduce: Callable[[Sequence[float]], float] = max,
    window: int | None = None,
) -> list[set[int]]:
    """Return ``V_t`` of every step; `rows` is ``[heads of the group, T, T]``, `start` the first full step."""
    recycled: list[int] = []
    result = []
    for t in range(rows.shape[1]):
        reach = set(range(t + 1)) if window is None else set(range(max(0, t - window + 1), t + 1))
        recycled = [key for key in recycled if key in reach]
        if t < start:
            result.append(reach)
        elif t == start or is_full(t):
            result.append(reach)
            recycled = top(rows[:, t, : t + 1], sorted(reach), budget, pooling, reduce)
        else:
            result.append({*recycled, t})
            recycled = [*recycled, t]
            if len(recycled) > budget:
                recycled = recycled[1:]
    return result


def top(
    rows: np.ndarray, keys: list[int], budget: int, pooling: int, reduce: Callable[[Sequence[float]], float]
) -> list[int]:
    """Return the `budget` keys that weigh most, in ascending order."""
    weight = {}
    for key in keys:
        weight[key] = reduce([float(row[key] / sum(row[k] for k in keys)) for row in rows])
    half = pooling // 2
    pooled = {key: max(weight.get(other, -math.inf) for other in range(key - half, key + half + 1)) for key in keys}
    return sorted(keys, key=lambda key: (pooled[key], key))[-budget:]


def full_by_queries(queries: np.ndarray, start: int, every: int, threshold: float) -> Callable[[int], bool]:
    """Return which steps are full for one layer: `queries` is ``[H, T, D]``."""
    last = start
    full = {start}
    for t in range(start + 1, queries.shape[1]):
        if (t - start) % every == 0:
            one, other = queries[:, t].mean(0), queries[:, last].mean(0)
            similarity = float(one @ other) / math.sqrt(float(one @ one) * float(other @ other))
            if not similarity > threshold:
                full.add(t)
                last = t
    return full.__contains__
