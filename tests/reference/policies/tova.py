"""TOVA: the newest row alone decides."""

from __future__ import annotations

import numpy as np

from tests.reference.policies.evict import Rows, Sets, loop


def tova(rows: Rows, budget: int, prompt: int, prefill: str, sinks: int = 0, group: str = "mean") -> tuple[Sets, Sets]:
    """Return the sets of the heads in `rows` as one: a layer's query heads, or those of one key/value head."""
    return loop(rows, lambda t, visible, row: row, budget, prompt, prefill, sinks=sinks, group=group)


def kvpress(rows: Rows, budget: int, prompt: int, sinks: int = 0) -> set[int]:
    """Return what is left of the prompt: its last key, whose score is above all others, and the top of the rest."""
    scores = rows[:, prompt - 1, : prompt - 1].mean(0)
    scores = np.append(scores, scores.max(initial=0) + 1)
    scores[:sinks] = scores[-1]
    return set(np.argsort(-scores, kind="stable")[:budget].tolist())
