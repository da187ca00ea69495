"""CAKE: mean and variance of the last rows of the prompt, then the newest row; neighbours share what they have."""

from __future__ import annotations

import numpy as np

from tests.reference.policies.evict import REDUCE, Rows, Sets, loop
from tests.reference.policies.snapkv import pool


def cake(
    rows: Rows,
    budget: int,
    prompt: int,
    *,
    window: int,
    gamma: float,
    kernel: int,
    pooling: str,
    group: str = "mean",
    capacity: int | None = None,
) -> tuple[Sets, Sets]:
    """Return ``V_t`` and ``R_t``; `budget` bounds the window, `capacity` is what this layer holds if not the budget."""
    width = min(window, budget // 2)

    def score(t: int, visible: set[int], row: np.ndarray) -> list[float]:
        if t < prompt - 1:
            return [0.0] * (t + 1)
        older = [key for key in sorted(visible) if key <= t - width]
        if t >= prompt:
            worth = [float(row[key]) for key in older]
        else:
            heads = [[indicator(head[t + 1 - width : t + 1, key], gamma) for key in older] for head in rows]
            worth = [float(value) for value in REDUCE[group](heads, axis=0)]
        by_key = dict(zip(older, pool(worth, kernel, pooling), strict=True))
        return [by_key.get(key, 0.0) for key in range(t + 1)]

    holds = budget if capacity is None else capacity
    return loop(rows, score, holds, prompt, "full", recent=width, group=group)


def indicator(weights: np.ndarray, gamma: float) -> float:
    """Return the mean and `gamma` times the variance of one key's weights in the window; one row has no variance."""
    if len(weights) == 0:
        return 0.0
    mean = sum(weights) / len(weights)
    return float(mean + gamma * sum((weight - mean) ** 2 for weight in weights) / max(len(weights) - 1, 1))
