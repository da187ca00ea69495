"""Key norm: the smallest norms stay; at a budget, and as the published saw."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tests.reference.policies.evict import Rows, Sets, loop


def plain(rows: Rows, norms: Sequence[float], budget: int, prompt: int, prefill: str) -> tuple[Sets, Sets]:
    return loop(rows, lambda t, visible, row: -np.asarray(norms[: t + 1]), budget, prompt, prefill)


def kvpress(norms: Sequence[float], budget: int, prompt: int) -> set[int]:
    """Return what is left of the prompt: the keys whose negated norm is largest."""
    return set(sorted(range(prompt), key=lambda key: norms[key])[:budget])


def compress(norms: Sequence[float], keep_ratio: float, prune_after: int) -> list[int]:
    """Return the slots of a cache that stay, smallest norm first; of equal norms the first."""
    slots = list(range(len(norms)))
    if len(norms) < prune_after:
        return slots
    slots.sort(key=lambda slot: norms[slot])
    return slots[: math.ceil(keep_ratio * len(norms))]


def released(norms: Sequence[float], prompt: int, keep_ratio: float, prune_after: int) -> Sets:
    """Return what is held after each step: the prompt in one forward, then token by token."""
    all_held: Sets = [set(range(t + 1)) for t in range(prompt - 1)]
    cache = list(range(prompt - 1))
    for t in range(prompt - 1, len(norms)):
        cache = sorted([*cache, t])
        cache = [cache[slot] for slot in compress([norms[key] for key in cache], keep_ratio, prune_after)]
        all_held.append(set(cache))
    return all_held
