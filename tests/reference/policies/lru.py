"""LRU: the last step at which a key got at least ``1 / |V_t|``; arrival counts."""

from __future__ import annotations

import numpy as np

from tests.reference.policies.evict import Rows, Score, Sets, loop, of_heads


def lru(
    rows: Rows, budget: int, prompt: int, prefill: str, group: str = "mean", reduce: str = "rows"
) -> tuple[Sets, Sets]:
    def make() -> Score:
        last: dict[int, int] = {}

        def score(t: int, visible: set[int], row: np.ndarray) -> list[float]:
            # the mean of the heads sums to one, as each head does; their maximum does not
            whole = 1.0 if group == "mean" or reduce == "scores" else sum(row[key] for key in visible)
            for key in visible:
                if row[key] >= whole / len(visible):
                    last[key] = t
            last[t] = t
            return [last[key] for key in range(t + 1)]

        return score

    score = make() if reduce == "rows" else of_heads(rows, make, group)
    return loop(rows, score, budget, prompt, prefill, group=group)
