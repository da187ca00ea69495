"""SnapKV: the last rows vote for older keys, neighbours share their votes, and the last keys stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tests.reference.policies.evict import REDUCE, Rows, Sets, live, loop


def pool(votes: Sequence[float], kernel: int, pooling: str) -> list[float]:
    """Return the votes pooled with stride 1; beyond the ends there is nothing, and an average divides by the kernel."""
    if pooling == "none":
        return list(votes)
    reach = kernel // 2
    near = [votes[max(0, place - reach) : place + reach + 1] for place in range(len(votes))]
    return [max(part) if pooling == "max" else sum(part) / kernel for part in near]


def snapkv(
    rows: Rows,
    budget: int,
    prompt: int,
    *,
    window: int,
    kernel: int,
    pooling: str,
    group: str = "mean",
    reduce: str = "votes",
    capacity: int | None = None,
    when: Callable[[int], bool] | None = None,
) -> tuple[Sets, Sets]:
    """Return ``V_t`` and ``R_t``; `budget` bounds the window, `capacity` is what this head holds if not the budget.

    `when` says at which steps keys go: at the end of the prompt alone, as published, if it is not given.
    """
    width = min(window, budget // 2)
    once = (lambda t: t == prompt - 1) if when is None else when
    past: list[list[list[float]]] = []  # of each step: rows of the heads, or the one that they were reduced to

    def score(t: int, visible: set[int], row: np.ndarray) -> list[float]:
        each = [live(rows[head : head + 1], t, visible) for head in range(len(rows))]
        past.append([own.tolist() for own in each] if reduce == "votes" else [row.tolist()])
        if not once(t):
            return [0.0] * (t + 1)  # no key goes
        older = [key for key in sorted(visible) if key <= t - width]
        voting = past[len(past) - width :]
        by_head = [
            [sum(vote[head][key] for vote in voting if key < len(vote[head])) for key in older]
            for head in range(len(past[0]))
        ]
        reduced = REDUCE[group](np.array(by_head), axis=0) if reduce == "votes" else by_head[0]
        votes = pool([float(vote) for vote in reduced], kernel, pooling)
        by_key = dict(zip(older, votes, strict=True))
        return [by_key.get(key, 0.0) for key in range(t + 1)]

    holds = budget if capacity is None else capacity
    return loop(rows, score, holds, prompt, "full", recent=width, group=group, when=once)


def votes(rows: Rows, prompt: int, width: int, kernel: int, pooling: str, group: str = "mean") -> list[float]:
    """Return what the window gives to the prompt's older keys, for one head: what Ada-KV compares among heads."""
    of_heads = rows[:, prompt - width : prompt, : prompt - width].sum(axis=1)
    return pool([float(vote) for vote in REDUCE[group](of_heads, axis=0)], kernel, pooling)
