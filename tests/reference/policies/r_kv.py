"""R-KV on one key/value head, from its rule."""

from __future__ import annotations

import math

import numpy as np


def scores(
    keys: np.ndarray, queries: np.ndarray, t: int, visible: list[int], window: int, mix: float, pooling: int
) -> dict[int, float]:
    """Return the score of each visible key; `keys` is ``[T, D]``, `queries` ``[heads of the group, T, D]``."""
    attention = _attention(keys, queries, t, visible, window, pooling)
    redundant = _redundancy(keys, visible)
    return {key: mix * attention.get(key, 0.0) - (1 - mix) * redundant[key] for key in visible}


def _attention(
    keys: np.ndarray, queries: np.ndarray, t: int, visible: list[int], window: int, pooling: int
) -> dict[int, float]:
    before = [key for key in visible if key <= t - window]
    asking = [q for q in range(t - max(window, 1) + 1, t + 1) if q >= 0]
    mean = [0.0] * len(before)
    for q in asking:
        logits = [max(float(head[q] @ keys[key]) for head in queries) / math.sqrt(keys.shape[1]) for key in before]
        total = sum(math.exp(x) for x in logits)
        for i, logit in enumerate(logits):
            mean[i] += math.exp(logit) / total / len(asking)
    reach = pooling // 2
    return {key: max(mean[max(0, i - reach) : i + reach + 1]) for i, key in enumerate(before)}


def _redundancy(keys: np.ndarray, visible: list[int]) -> dict[int, float]:
    n = len(visible)
    unit = [keys[key] / np.linalg.norm(keys[key]) for key in visible]
    cosine = [[float(unit[i] @ unit[j]) for j in range(n)] for i in range(n)]
    for i in range(n):
        cosine[i][i] = 0.0
        alike = [j for j in range(n) if cosine[i][j] > 0.5]
        if alike:
            cosine[i][alike[-1]] = 0.0
    means = [sum(cosine[i][j] for i in range(n)) / n for j in range(n)]
    total = sum(math.exp(x) for x in means)
    return {key: math.exp(means[j]) / total for j, key in enumerate(visible)}
