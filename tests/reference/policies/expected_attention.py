"""Expected Attention on one key/value head, from its rule, with the rotation as complex numbers."""

from __future__ import annotations

import cmath
import math

import numpy as np

Pairs = list[tuple[int, int, float]]  # lower and upper dimension, radians per position


def unturned(query: np.ndarray, position: int, pairs: Pairs) -> np.ndarray:
    """Return a query ``[D]`` as before its rotation."""
    plain = query.astype(float).copy()
    for low, high, frequency in pairs:
        number = complex(query[low], query[high]) * cmath.exp(-1j * position * frequency)
        plain[low], plain[high] = number.real, number.imag
    return plain


def mean_turn(first: int, count: int, pairs: Pairs, size: int) -> np.ndarray:
    """Return the mean rotation of `count` positions, ``[D, D]``."""
    turn = np.eye(size)
    for low, high, frequency in pairs:
        mean = sum(cmath.exp(1j * (first + step) * frequency) for step in range(count)) / count
        turn[low, low] = turn[high, high] = mean.real
        turn[low, high], turn[high, low] = -mean.imag, mean.imag
    return turn


def scores(
    keys: np.ndarray,
    values: np.ndarray,
    queries: np.ndarray,
    visible: list[int],
    pairs: Pairs,
    *,
    future: int = 512,
    sinks: int = 4,
    covariance: bool = True,
    epsilon: float = 0.0,
    norms: bool = True,
) -> dict[int, float]:
    """Return the score of each visible key; keys and values ``[T, D]``, queries ``[Q, t + 1, D]`` of one group."""
    size = keys.shape[1]
    free = [key for key in visible if key >= sinks]
    total = dict.fromkeys(free, 0.0)
    for head in queries:
        plain = [unturned(query, position, pairs) for position, query in enumerate(head) if position >= sinks]
        turn = mean_turn(len(head), future, pairs, size)
        mean = sum(plain) / len(plain)
        spread = sum(np.outer(query - mean, query - mean) for query in plain) / len(plain)
        mean, spread = turn @ mean, turn @ spread @ turn.T
        logits = {}
        for key in free:
            logits[key] = float(keys[key] @ mean) / math.sqrt(size)
            logits[key] += float(keys[key] @ spread @ keys[key]) / size / 2 if covariance else 0.0
        largest = max(logits.values())
        summed = sum(math.exp(logit - largest) for logit in logits.values())
        for key in free:
            total[key] += math.exp(logits[key] - largest) / summed / len(queries)
    result = dict.fromkeys(visible, 0.0)
    for key in free:
        result[key] = (total[key] + epsilon) * float(np.linalg.norm(values[key])) if norms else total[key]
    return result
