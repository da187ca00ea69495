"""CAKE: mean and variance of the last rows of the prompt, then the newest row; neighbours share what they have."""

from __future__ import annotations

import numpy as np

from tests.reference.policies.evict import REDUCE, Rows, Sets, live, loop
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
    reduce: str = "scores",
) -> tuple[Sets, Sets]:
    """Return ``V_t`` and ``R_t``; `budget` bounds the window, `capacity` is what this layer holds if not the budget."""
    width = min(window, budget // 2)

    def score(t: int, visible: set[int], row: np.ndarray) -> list[float]:
        if t < prompt - 1:
            return [0.0] * (t + 1)
        older = [key for key in sorted(visible) if key <= t - width]
        if reduce == "rows":
            shown = [row if t >= prompt else REDUCE[group](rows[:, t + 1 - width : t + 1], axis=0)]
        elif t >= prompt:
            shown = [live(rows[head : head + 1], t, visible) for head in range(len(rows))]
        else:
            shown = [head[t + 1 - width : t + 1] for head in rows]
        heads = [
            [float(part[key]) if t >= prompt else indicator(part[:, key], gamma) for key in older] for part in shown
        ]
        pooled = np.array([pool(worth, kernel, pooling) for worth in heads])
        worth = REDUCE[group](pooled, axis=0).tolist() if reduce == "scores" else pooled[0].tolist()
        by_key = dict(zip(older, worth, strict=True))
        return [by_key.get(key, 0.0) for key in range(t + 1)]

    holds = budget if capacity is None else capacity
    return loop(rows, score, holds, prompt, "full", recent=width, group=group)


def indicator(weights: np.ndarray, gamma: float) -> float:
    """Return the mean and `gamma` times the variance of one key's weights in the window; one row has no variance."""
    if len(weights) == 0:
        return 0.0
    mean = sum(weights) / len(weights)
    return float(mean + gamma * sum((weight - mean) ** 2 for weight in weights) / max(len(weights) - 1, 1))
