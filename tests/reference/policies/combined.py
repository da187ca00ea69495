"""Two rules in one cache: what each gives to the keys that are held, and which of these stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tests.reference.policies.evict import Rows, Sets, loop

Score = Callable[[int, set[int], np.ndarray], Sequence[float]]


def summed(decay: float = 1.0) -> Score:
    """Return h2o's score, or a2sf's: the weights of each key so far, those of earlier rows times `decay`."""
    total: dict[int, float] = {}

    def score(t: int, visible: set[int], row: np.ndarray) -> list[float]:
        for key in range(t + 1):
            total[key] = float(row[key]) + decay * total.get(key, 0.0)
        return [total[key] for key in range(t + 1)]

    return score


def newest() -> Score:
    """Return the score of a window: the position."""
    return lambda t, visible, row: [float(key) for key in range(t + 1)]


def last_row() -> Score:
    """Return tova's score within one head: the newest row."""
    return lambda t, visible, row: [float(weight) for weight in row]


def places(scores: Sequence[float], free: set[int]) -> dict[int, int]:
    """Return the place of each free key in the order of scores, the highest first; of equal scores the newer one."""
    return {key: place for place, key in enumerate(sorted(free, key=lambda key: (scores[key], key), reverse=True))}


def shares(scores: Sequence[float], free: set[int], by: str) -> dict[int, float]:
    """Return scores of the free keys as numbers from 0 to 1."""
    if by == "rank":
        return {key: (len(free) - 1 - place) / max(len(free) - 1, 1) for key, place in places(scores, free).items()}
    least = min((scores[key] for key in free), default=0.0)
    total = sum(scores[key] - least for key in free)
    return {key: (scores[key] - least) / total if total else 0.0 for key in free}


def combined(
    rows: Rows,
    budget: int,
    prompt: int,
    prefill: str,
    one: Score,
    other: Score,
    *,
    sinks: int = 0,
    recent: int = 0,
    weight: float | None = None,
    by: str = "rank",
) -> tuple[Sets, Sets]:
    """Return ``V_t`` and ``R_t`` of one head: a union if there is no `weight`, otherwise a blend."""

    def score(t: int, visible: set[int], row: np.ndarray) -> list[float]:
        first, second = one(t, visible, row), other(t, visible, row)
        free = {key for key in visible if key >= sinks and key <= t - recent}
        if weight is None:
            mine, theirs = places(first, free), places(second, free)
            turn = {key: min(2 * mine[key], 2 * theirs[key] + 1) for key in free}
            return [-float(turn.get(key, 0)) for key in range(t + 1)]
        mixed = {key: weight * share for key, share in shares(first, free, by).items()}
        for key, share in shares(second, free, by).items():
            mixed[key] += (1 - weight) * share
        return [mixed.get(key, 0.0) for key in range(t + 1)]

    return loop(rows, score, budget, prompt, prefill, sinks=sinks, recent=recent)
