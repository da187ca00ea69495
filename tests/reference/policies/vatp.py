"""VATP: weights times value norms, under other policies' rules and as the published mask."""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np

from tests.reference.policies.evict import Rows, Sets, live, loop

Score = Callable[[int, set[int], np.ndarray], np.ndarray]


def scaled(rows: Rows, norms: np.ndarray, t: int, visible: set[int]) -> np.ndarray:
    """Return the mean over heads of weight times norm; `norms` is ``[heads, T]``, those of each query head."""
    total = np.zeros(t + 1)
    for head in range(len(rows)):
        total += live(rows[head : head + 1], t, visible) * norms[head, : t + 1] / len(rows)
    return total


def plain(
    rows: Rows, norms: np.ndarray, base: str, budget: int, prompt: int, prefill: str, sinks: int = 20
) -> tuple[Sets, Sets]:
    """Over ``h2o``, ``tova``, ``a2sf`` (at .7) or ``scissorhands``."""
    sums = np.zeros(rows.shape[-1])
    below: list[set[int]] = []

    def score(t: int, visible: set[int], row: np.ndarray) -> np.ndarray:
        now = scaled(rows, norms, t, visible)
        if base == "scissorhands":
            mean = sum(now[key] for key in visible) / len(visible)
            below.append({key for key in visible if now[key] < mean})
            return -np.array([sum(key in step for step in below[-400:]) for key in range(t + 1)], dtype=float)
        sums[: t + 1] = now + {"h2o": 1.0, "tova": 0.0, "a2sf": 0.7}[base] * sums[: t + 1]
        return sums

    recent = {"h2o": budget // 2, "tova": 0, "a2sf": 0, "scissorhands": min(10, budget // 2)}[base]
    return loop(rows, score, budget, prompt, prefill, sinks=min(sinks, budget // 4), recent=recent)


def mask(rows: Rows, norms: np.ndarray | None, base: str, heavy: int, recent: int, sinks: int, prompt: int) -> Sets:
    """Return what every query sees, itself included; without norms it is the published baseline."""
    length = rows.shape[-1]
    norm = np.ones(length) if norms is None else norms
    full = rows.mean(0)
    if base == "h2o":
        sums = full[:prompt, :prompt].sum(0) * norm[:prompt]
    else:
        sums = full[:prompt, :prompt][-400:].sum(0) / 400 * norm[:prompt]
    if norms is not None:
        sums[:sinks] = sys.float_info.max
    seen: Sets = [set(range(query + 1)) for query in range(prompt)]
    for query in range(prompt, length):
        n = query
        shown = np.ones(n + 1, dtype=bool)
        if n > heavy + recent:
            shown[: n + 1 - recent] = False
            candidates = sorted(range(n - recent), key=lambda key: sums[key], reverse=True)
            shown[candidates[:heavy]] = True
        shown[n - recent : n] = True  # written into the mask itself: nothing is in limbo
        sums = np.where(shown[:n], sums, 0.0)
        visible = set(np.flatnonzero(shown).tolist())
        sums = np.append(sums, 0.0) + live(rows, query, visible) * norm[: n + 1]
        seen.append(visible)
    return seen
