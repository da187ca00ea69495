"""One head (or one layer) of the step that every policy goes through, with sets and loops instead of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Row = Sequence[float]
Score = Callable[[int, dict[int, list[float]], dict[int, float]], dict[int, float]]


def live(row: Row, visible: set[int]) -> list[float]:
    """Return the row on the visible keys, divided by its sum; zero elsewhere."""
    total = sum(row[key] for key in sorted(visible))
    return [row[key] / total if key in visible and total > 0 else 0.0 for key in range(len(row))]


def replay(
    rows: Sequence[Sequence[Row]],
    observe: Callable[[int, list[list[float]], dict[int, float]], dict[int, float]],
    budget: int,
    prompt: int,
    prefill: str,
    sinks: int = 0,
    recent: int = 0,
) -> tuple[list[set[int]], list[set[int]]]:
    """Return ``V_t`` and ``R_t`` for every step of the query heads that share one decision.

    `rows` is ``[heads][t][key]``; `observe` gets ``t``, the live rows of the heads and the scores so far.
    """
    held: set[int] = set()
    score: dict[int, float] = {}
    all_visible, all_held = [], []
    for t in range(len(rows[0])):
        visible = held | {t}
        score = observe(t, [live(head[t][: t + 1], visible) for head in rows], {**score, t: 0.0})
        held = set(visible)
        if prefill == "stream" or t >= prompt - 1:
            protected = {key for key in visible if key < sinks or key > t - recent}
            while len(held) > budget:
                worst = min(sorted(held - protected), key=lambda key: score[key])  # the first, so the oldest
                held.remove(worst)
        all_visible.append(visible)
        all_held.append(held)
    return all_visible, all_held


def h2o(t: int, rows: list[list[float]], score: dict[int, float]) -> dict[int, float]:
    return {key: score[key] + sum(row[key] for row in rows) / len(rows) for key in range(t + 1)}


def tova(t: int, rows: list[list[float]], score: dict[int, float]) -> dict[int, float]:
    return {key: sum(row[key] for row in rows) / len(rows) for key in range(t + 1)}


def a2sf(alpha: float) -> Callable[[int, list[list[float]], dict[int, float]], dict[int, float]]:
    def observe(t: int, rows: list[list[float]], score: dict[int, float]) -> dict[int, float]:
        return {key: sum(row[key] for row in rows) / len(rows) + alpha * score[key] for key in range(t + 1)}

    return observe


def newest(t: int, rows: list[list[float]], score: dict[int, float]) -> dict[int, float]:
    return {key: float(key) for key in range(t + 1)}
