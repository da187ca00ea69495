"""SimLayerKV: what the last rows of the prompt give to sinks and recent keys says whether a layer holds the others."""

from __future__ import annotations

import numpy as np

from tests.reference.policies.evict import Rows, Sets


def lazy(rows: Rows, prompt: int, *, last: int, sinks: int, recent: int, threshold: float) -> bool:
    """Return whether a layer, from the full rows ``[H, T, T]`` of all its heads, is lazy."""
    kept = [key for key in range(prompt) if key < sinks or key >= prompt - recent]
    weights = [
        sum(float(head[query, key]) for key in kept) for head in rows for query in range(max(0, prompt - last), prompt)
    ]
    return bool(np.mean(weights) > threshold)


def simlayerkv(rows: Rows, prompt: int, *, last: int, sinks: int, recent: int, threshold: float) -> tuple[Sets, Sets]:
    """Return ``V_t`` and ``R_t`` of a layer."""
    gone: set[int] = set()
    visible, held = [], []
    for t in range(rows.shape[-1]):
        visible.append(set(range(t + 1)) - gone)
        if t == prompt - 1 and lazy(rows, prompt, last=last, sinks=sinks, recent=recent, threshold=threshold):
            gone = {key for key in range(prompt) if key >= sinks and key < prompt - recent}
        held.append(set(range(t + 1)) - gone)
    return visible, held
