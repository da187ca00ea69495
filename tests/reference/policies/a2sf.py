"""A2SF: sums that forget, as the real-drop code, the paper's mask evaluation, and divided by age."""

from __future__ import annotations

import math

import numpy as np

from tests.reference.policies.evict import REDUCE, Rows, Score, Sets, live, loop, of_heads


def drop(
    rows: Rows,
    budget: int,
    prompt: int,
    prefill: str,
    *,
    alpha: float,
    sinks: int = 0,
    recent: int = 0,
    group: str = "mean",
    lifetime: bool = False,
    reduce: str = "scores",
) -> tuple[Sets, Sets]:
    """Equation 5, summed anew at every step from all rows since the key arrived."""

    length = rows.shape[-1]
    powers = np.array([alpha**age for age in range(length)])

    def make() -> Score:
        seen = np.zeros((length, length))  # the row of each query; zero for keys after it

        def score(t: int, visible: set[int], row: np.ndarray) -> np.ndarray:
            seen[t, : t + 1] = row
            terms = powers[t::-1, None] * seen[: t + 1, : t + 1]
            sums = terms.cumsum(0)[-1]  # added one after another, where `sum` may add in pairs
            return sums / np.arange(t + 1, 0, -1) if lifetime else sums

        return score

    score = make() if reduce == "rows" else of_heads(rows, make, group)
    return loop(rows, score, budget, prompt, prefill, sinks=sinks, recent=recent, group=group)


def mask(rows: Rows, streaming: int, select: int, recent: int, alpha: float, group: str = "mean") -> Sets:
    """Return what every query sees: the published loop, in which an evicted key holds an infinite score."""
    length = rows.shape[-1]
    cache = streaming + select + recent
    score = np.zeros(length)
    alive = set(range(length))
    seen: Sets = []
    for t in range(length):
        seen.append({key for key in alive if key <= t})
        if t < cache:
            score[: t + 1] = alpha * score[: t + 1] + REDUCE[group](rows[:, t, : t + 1], axis=0)
            continue
        row = live(rows, t, seen[t], group)
        for key in range(t + 1):
            if math.isfinite(score[key]):
                score[key] = row[key] + (alpha * score[key] if alpha else 0.0)
        slots = range(streaming, t - recent + 1)
        gone = min(slots, key=lambda key: score[key])
        score[gone] = math.inf
        alive.discard(gone)
    return seen
