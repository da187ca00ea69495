"""MorphKV: the logits of the last queries over what the cache holds."""

from __future__ import annotations

import numpy as np

from tests.reference.policies.evict import Sets


def held(
    logits: np.ndarray, capacity: int, window: int, prompt: int, prefill: str, fuse: str = "max"
) -> tuple[Sets, Sets]:
    """Return ``V_t`` and ``R_t``; `logits` ``[heads, T, T]`` are those of one group. ``capacity + 1`` keys stay."""
    cache: list[int] = []
    all_visible, all_held = [], []
    for t in range(logits.shape[-1]):
        cache = [*cache, t]
        all_visible.append(set(cache))
        if len(cache) > capacity + 1 and t >= (0 if prefill == "stream" else prompt - 1):
            older, newest = cache[: len(cache) - window - 1], cache[len(cache) - window - 1 :]
            fused = np.zeros(len(older))
            for query in range(t - window, t):
                grouped = logits[:, query, older].sum(0)
                weights = np.exp(grouped - grouped.max())
                weights /= weights.sum()
                fused = np.maximum(fused, weights) if fuse == "max" else fused + weights
            best = sorted(range(len(older)), key=lambda slot: fused[slot], reverse=True)[: capacity - window]
            cache = [older[slot] for slot in sorted(best)] + newest
        all_held.append(set(cache))
    return all_visible, all_held
