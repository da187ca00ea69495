"""What every evicting rule shares: rows over what is visible, and who goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Rows = np.ndarray  # full attention of the query heads that share one decision, [heads, T, T]
Sets = list[set[int]]
Score = Callable[[int, set[int], np.ndarray], Sequence[float]]


def mean(rows: np.ndarray, axis: int = 0) -> np.ndarray:
    """Return what `numpy.mean` does along one axis, in a third of its time."""
    total: np.ndarray = np.add.reduce(rows, axis=axis)
    return total / rows.shape[axis]


# Along one axis, the first by default.
REDUCE: dict[str, Callable[..., np.ndarray]] = {"mean": mean, "max": np.maximum.reduce, "sum": np.add.reduce}


def live(rows: Rows, t: int, visible: set[int], group: str = "mean") -> np.ndarray:
    """Return row `t` of every head over the visible keys, divided by its sum, then the heads as one."""
    keys = sorted(visible)
    seen = rows[:, t, keys]  # [heads, keys]
    shown = np.zeros((len(rows), t + 1))
    shown[:, keys] = seen / seen.cumsum(-1)[:, -1:]  # added one after another, where `sum` adds in pairs
    return shown[0] if len(shown) == 1 else REDUCE[group](shown, axis=0)


def of_heads(rows: Rows, make: Callable[[], Score], group: str) -> Score:
    """Return the score of a group whose query heads score keys one by one, each with what it remembers itself."""
    scores = [make() for _ in rows]

    def score(t: int, visible: set[int], row: np.ndarray) -> Sequence[float]:
        each = [one(t, visible, live(rows[head : head + 1], t, visible)) for head, one in enumerate(scores)]
        reduced: Sequence[float] = REDUCE[group](np.array(each), axis=0).tolist()
        return reduced

    return score


def loop(
    rows: Rows,
    score: Score,
    budget: int,
    prompt: int,
    prefill: str,
    *,
    sinks: int = 0,
    recent: int = 0,
    group: str = "mean",
    when: Callable[[int], bool] | None = None,
) -> tuple[Sets, Sets]:
    """Return ``V_t`` and ``R_t`` of a rule that gives scores from ``t``, ``V_t`` and the live row.

    The lowest scores go, of equal ones the oldest. With `when` keys go only at the end of the steps it is true of.
    """
    held: set[int] = set()
    all_visible, all_held = [], []
    for t in range(rows.shape[-1]):
        visible = held | {t}
        scores = score(t, visible, live(rows, t, visible, group))
        held = set(visible)
        first = 0 if prefill == "stream" else prompt - 1
        if t >= first if when is None else when(t):
            free = sorted(key for key in visible if key >= sinks and key <= t - recent)
            while len(held) > budget:
                lowest = min(free, key=lambda key: scores[key])
                free.remove(lowest)
                held.remove(lowest)
        all_visible.append(visible)
        all_held.append(held)
    return all_visible, all_held
