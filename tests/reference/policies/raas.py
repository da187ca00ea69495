"""RaaS: a page is as young as the last row that used it; the prompt stays where it fits."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from tests.reference.policies.evict import Rows, Sets, loop


def raas(
    rows: Rows,
    budget: int,
    prompt: int,
    prefill: str,
    *,
    page: int,
    alpha: float = 0.0001,
    share: str | None = None,
    keep: bool = True,
    group: str = "mean",
) -> tuple[Sets, Sets]:
    """Return ``V_t`` and ``R_t``; `share` is a number written out."""
    stamp: dict[int, int] = {}  # of each page

    def score(t: int, visible: set[int], row: np.ndarray) -> list[float]:
        weight: dict[int, float] = {}
        for key in sorted(visible):
            weight[key // page] = max(weight.get(key // page, 0.0), float(row[key]))
        if share is None:
            used = [number for number in weight if weight[number] > alpha]
        else:
            count = math.ceil(Fraction(share) * len(weight))
            by_weight = sorted(weight, key=lambda number: (weight[number], number))
            used = by_weight[len(by_weight) - count :]
        for number in (*used, t // page):
            stamp[number] = t
        kept = keep and t >= prompt and budget > prompt
        return [math.inf if kept and key < prompt else float(stamp.get(key // page, 0)) for key in range(t + 1)]

    return loop(rows, score, budget, prompt, prefill, group=group)
