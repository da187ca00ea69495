"""Q-Filters from their rule: the filter of a group of query heads, and the score of a key."""

from __future__ import annotations

import numpy as np


def filter_of(queries: list[np.ndarray]) -> np.ndarray:
    """Return the filter ``[D]`` of a key/value head from the queries ``[n, D]`` of each query head of its group."""
    directions = []
    for head in queries:
        left, _, right = np.linalg.svd(head.astype(np.float64), full_matrices=False)
        ahead = sum(1 for number in left[:, 0] if number > 0)
        directions.append(right[0] if ahead > len(head) / 2 else -right[0])
    return sum(directions) / len(directions)


def scores(keys: np.ndarray, along: np.ndarray, visible: list[int]) -> dict[int, float]:
    """Return the score of each visible key; keys are ``[T, D]``."""
    return {key: sum(float(x) * float(y) for x, y in zip(keys[key], along, strict=True)) for key in visible}
