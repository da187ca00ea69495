"""The best schedule of evictions: by trying all of them, and as an assignment that scipy solves."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import combinations

import numpy as np
from scipy.optimize import linear_sum_assignment

Row = Sequence[float]


def best_of_all(rows: Sequence[Row], budget: int, prompt: int, prefill: str, window: int | None = None) -> float:
    """Return the most mass that the scored steps of one head can retain, over every schedule there is.

    With `window` the model itself forgets keys of that age.
    """
    first = prompt - 1 if prefill == "full" else 0
    scored = prompt if prefill == "full" else 0

    @cache
    def most(t: int, held: frozenset[int]) -> float:
        if t == len(rows):
            return 0.0
        visible = frozenset(key for key in held | {t} if window is None or t - key < window)
        mass = sum(rows[t][key] for key in sorted(visible)) if t >= scored else 0.0
        if t < first or len(visible) <= budget:
            return mass + most(t + 1, visible)
        return mass + max(most(t + 1, frozenset(kept)) for kept in combinations(sorted(visible), budget))

    return most(0, frozenset())


def best_by_assignment(rows: np.ndarray, budget: int, prompt: int, prefill: str) -> float:
    """Return the same of one head ``[T, T]``, from what a key has gathered when it leaves: slots against keys, scipy.

    A slot for every eviction, and one for every key that is left: at the end of the prompt ``P - B`` slots open, after
    it (in streaming prefill, from the step at which ``B + 1`` keys are visible on) one at every step.
    """
    length = len(rows)
    first = prompt - 1 if prefill == "full" else 0
    counted = np.tril(rows)
    counted[: prompt if prefill == "full" else 0] = 0.0
    gathered = counted.cumsum(0)
    leaving = []
    for t in range(first, length):
        leaving += [t] * max(0, t + 1 - budget - len(leaving))
    gain = np.full((length, length), -1e6)
    for slot in range(length):
        t = leaving[slot] if slot < len(leaving) else length - 1
        gain[slot, : t + 1] = gathered[t, : t + 1]
    slots, keys = linear_sum_assignment(gain, maximize=True)
    return float(gain[slots, keys].sum())
