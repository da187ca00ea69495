"""Compactor on all key/value heads of a layer, from its rule."""

from __future__ import annotations

import math

import numpy as np

from tests.reference.policies.expected_attention import Pairs, unturned


def leverage(plain: list[np.ndarray], sketch: np.ndarray) -> list[float]:
    """Return the approximate leverage score of each key ``[D]``."""
    mean = sum(plain) / len(plain)
    rows = np.array([(key - mean) @ sketch for key in plain])
    inverse = np.linalg.inv(rows.T @ rows + 0.01 * np.eye(sketch.shape[1]))
    return [max(0.0, float(row @ inverse @ row)) for row in rows]


def attended(queries: list[np.ndarray], keys: list[np.ndarray], values: list[np.ndarray], chunk: int) -> list[float]:
    """Return what each key of one head gets; `queries` are ``[Q, D]`` for each key, one row for each query head."""
    count, group, size = len(keys), len(queries[0]), len(keys[0])
    sums = [0.0] * count
    for start in range(0, count, chunk):
        here = [keys[place] if place < count else np.zeros(size) for place in range(start, start + chunk)]
        for head in range(group):
            for place in range(start, start + chunk):
                query = queries[place][head] if place < count else np.zeros(size)
                logits = [float(query @ key) for key in here]
                exponentials = [math.exp(logit - max(logits)) for logit in logits]
                for offset, each in enumerate(exponentials):
                    if start + offset < count:
                        sums[start + offset] += each / sum(exponentials) / group
    weighted = [total * float(np.linalg.norm(value)) for total, value in zip(sums, values, strict=True)]
    around = [0.0, *weighted, 0.0]
    return [(around[place] + around[place + 1] + around[place + 2]) / 3 for place in range(count)]


def standard(heads: list[list[float]]) -> list[list[float]]:
    """Return numbers with mean 0 and deviation 1 over all heads."""
    every = [number for head in heads for number in head]
    mean = sum(every) / len(every)
    deviation = math.sqrt(sum((number - mean) ** 2 for number in every) / (len(every) - 1))
    return [[(number - mean) / max(deviation, 1e-6) for number in head] for head in heads]


def scores(
    keys: np.ndarray,
    values: np.ndarray,
    queries: np.ndarray,
    visible: list[list[int]],
    pairs: Pairs,
    sketch: np.ndarray,
    *,
    sinks: int,
    newest: int,
    budget: int,
    chunk: int,
    blend: float | None,
) -> list[dict[int, float]]:
    """Return the score of each key of each head; keys ``[G, T, D]``, queries ``[G, Q, T, D]``; `newest` may score."""
    free = [[key for key in head if sinks <= key <= newest] for head in visible]
    first = standard(
        [leverage([unturned(keys[head][key], key, pairs) for key in own], sketch) for head, own in enumerate(free)]
    )
    second = standard(
        [
            attended([queries[head][:, key] for key in own], list(keys[head][own]), list(values[head][own]), chunk)
            for head, own in enumerate(free)
        ]
    )
    result = []
    for head, own in enumerate(free):
        factor = 1 - budget / len(visible[head]) if blend is None else blend
        made = dict.fromkeys(visible[head], 0.0)
        made.update({key: factor * a + b for key, a, b in zip(own, first[head], second[head], strict=True)})
        result.append(made)
    return result
