"""KeyDiff on one key/value head, from its rule."""

from __future__ import annotations

import math

import numpy as np


def scores(keys: np.ndarray, visible: list[int]) -> dict[int, float]:
    """Return minus the cosine of each visible key with the mean of the visible unit keys; `keys` is ``[T, D]``."""
    size = keys.shape[1]
    mean = [0.0] * size
    for key in visible:
        norm = math.sqrt(sum(float(x) ** 2 for x in keys[key]))
        for d in range(size):
            mean[d] += float(keys[key, d]) / norm / len(visible)
    result = {}
    for key in visible:
        dot = sum(float(keys[key, d]) * mean[d] for d in range(size))
        norms = math.sqrt(sum(float(x) ** 2 for x in keys[key])) * math.sqrt(sum(x * x for x in mean))
        result[key] = -dot / norms
    return result
