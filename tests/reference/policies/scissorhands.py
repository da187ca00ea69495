"""Scissorhands: the paper's counters held to a budget, and the threshold rule of the released code."""

from __future__ import annotations

import numpy as np

from tests.reference.policies.evict import Rows, Score, Sets, live, loop, of_heads


def counters(
    rows: Rows,
    budget: int,
    prompt: int,
    prefill: str,
    history: int,
    recent: int,
    group: str = "mean",
    reduce: str = "rows",
) -> tuple[Sets, Sets]:
    """Over the last `history` rows, count those in which the key got less than the visible ones on average."""

    def make() -> Score:
        below: list[set[int]] = []

        def score(t: int, visible: set[int], row: np.ndarray) -> list[float]:
            below.append({key for key in visible if row[key] < sum(row) / len(visible)})
            return [-float(sum(key in step for step in below[-history:])) for key in range(t + 1)]

        return score

    score = make() if reduce == "rows" else of_heads(rows, make, group)
    return loop(rows, score, budget, prompt, prefill, recent=min(recent, budget // 2), group=group)


def released(rows: Rows, lru_window: int, position_window: int, start: int) -> Sets:
    """Return what every query sees, from the published loop over the rows of one text."""
    length = rows.shape[-1]
    full = rows.mean(0)
    threshold = [np.sort(full[query])[int(0.9 * length)] for query in range(length)]
    attention = full.copy()
    seen: Sets = [set(range(query + 1)) for query in range(length)]
    for i in range(start, length):
        keep = {i}
        for j in range(i):
            count = sum(attention[query, j] > threshold[query] for query in range(max(i - lru_window, 0), i))
            if count > 0 or j >= max(i - position_window, 0):
                keep.add(j)
        if len(keep) < i + 1:
            attention[i] = 0
            attention[i, : i + 1] = live(rows, i, keep)
        seen[i] = keep
    return seen
