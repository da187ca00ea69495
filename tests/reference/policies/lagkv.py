"""LagKV on one key/value head, from its rule."""

from __future__ import annotations

import math

import numpy as np


def scores(keys: np.ndarray, values: np.ndarray, visible: list[int], sinks: int, lag: int) -> dict[int, float]:
    """Return the score of each visible key; `keys` and `values` are ``[T, D]``."""
    n = len(visible)
    result = {key: 1000.0 + place for place, key in enumerate(visible)}
    parts = (n - sinks) // lag
    for part in range(parts - 1):
        start = sinks + part * lag
        mine, following = visible[start : start + lag], visible[start + lag : start + 2 * lag]
        one, other = spread(keys, mine, following), spread(values, mine, following)
        mean = [(a + b) / 2 for a, b in zip(one, other, strict=True)]
        for i, key in enumerate(mine):
            result[key] = sum(mean[j] < mean[i] for j in range(lag))
    return result


def spread(states: np.ndarray, mine: list[int], following: list[int]) -> list[float]:
    """Return the softmax over a part of the deviation over dimensions, scaled by the part that follows."""
    size = states.shape[1]
    low = [min(float(states[key, d]) for key in following) for d in range(size)]
    high = [max(float(states[key, d]) for key in following) for d in range(size)]
    deviations = []
    for key in mine:
        scaled = [(float(states[key, d]) - low[d]) / ((high[d] - low[d]) or 1.0) for d in range(size)]
        mean = sum(scaled) / size
        deviations.append(math.sqrt(sum((x - mean) ** 2 for x in scaled) / (size - 1)))
    total = sum(math.exp(x) for x in deviations)
    return [math.exp(x) / total for x in deviations]
