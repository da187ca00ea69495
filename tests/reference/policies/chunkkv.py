"""ChunkKV: the last rows vote, neighbours are counted together, and the last keys stay."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.reference.policies.evict import Rows, Sets, loop
from tests.reference.policies.snapkv import pool


def chunkkv(
    rows: Rows,
    budget: int,
    prompt: int,
    *,
    chunk: int,
    window: int,
    mean: bool = False,
    kernel: int = 5,
    pooling: str = "none",
    group: str = "mean",
    when: Callable[[int], bool] | None = None,
) -> tuple[Sets, Sets]:
    """Return ``V_t`` and ``R_t`` of the heads that decide as one."""
    width = min(window, budget // 2)
    past: list[np.ndarray] = []

    def score(t: int, visible: set[int], row: np.ndarray) -> list[float]:
        past.append(row)
        older = [key for key in sorted(visible) if key <= t - width]
        voting = past[len(past) - width :]
        votes = pool([sum(float(one[key]) for one in voting if key < len(one)) for key in older], kernel, pooling)
        by_key = dict(zip(older, votes, strict=True))
        scores = []
        for key in range(t + 1):
            first = key - key % chunk
            members = [by_key[other] for other in range(first, first + chunk) if other in by_key]
            scores.append(sum(members) / (max(len(members), 1) if mean else 1))
        return scores

    once = (lambda t: t == prompt - 1) if when is None else when
    return loop(rows, score, budget, prompt, "full", recent=width, group=group, when=once)
