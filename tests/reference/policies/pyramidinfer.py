"""PyramidInfer: recent rows vote, the newer the more, and the recent keys and the first ones stay."""

from __future__ import annotations

import numpy as np

from tests.reference.policies.evict import Rows, Sets, loop


def pyramidinfer(
    rows: Rows, budget: int, prompt: int, *, recent: float, distance: float, sinks: int, capacity: int | None = None
) -> tuple[Sets, Sets]:
    """Return ``V_t`` and ``R_t`` of a layer; `budget` bounds what is protected, `capacity` is what it holds."""
    width = min(int(budget * recent) + 1, budget // 2)
    past: list[np.ndarray] = []

    def score(t: int, visible: set[int], row: np.ndarray) -> list[float]:
        past.append(row)
        voting = past[len(past) - width :] if width else []
        steps = max(width - 1, 1)
        counts = [distance + (1 - distance) * (len(voting) - 1 - place) / steps for place in range(len(voting))]
        return [
            sum(count * float(one[key]) for count, one in zip(counts, voting, strict=True) if key < len(one))
            for key in range(t + 1)
        ]

    holds = budget if capacity is None else capacity
    first = min(sinks, budget // 4)
    return loop(rows, score, holds, prompt, "full", sinks=first, recent=width, when=lambda t: t == prompt - 1)
