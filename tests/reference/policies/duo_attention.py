"""DuoAttention: a head with a low score keeps the first and the newest keys, the others keep all."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tests.reference.policies.evict import Rows

Sets = list[set[int]]


def observed(rows: Rows, prompt: int, *, last: int, sinks: int, recent: int) -> float:
    """Return the score of a group from its full rows ``[Q, T, T]``: what the prompt's end gives to keys in between."""
    queries = range(max(0, prompt - last), prompt)
    mass = [sum(float(head[q, key]) for key in range(sinks, q - recent + 1)) for head in rows for q in queries]
    return sum(mass) / len(mass)


def quantile(scores: Sequence[float], share: float) -> float:
    """Return the score below which a share of the scores is, between its neighbours in proportion."""
    if share in (0, 1):
        return math.inf if share else -math.inf
    order = sorted(scores)
    place = share * (len(order) - 1)
    low = math.floor(place)
    high = min(low + 1, len(order) - 1)
    return order[low] + (order[high] - order[low]) * (place - low)


def duo_attention(streaming: bool, prompt: int, length: int, prefill: str, *, sinks: int, recent: int) -> Sets:
    """Return ``R_t`` of one head."""
    held = []
    for t in range(length):
        evicts = prefill == "stream" or t >= prompt - 1
        held.append({key for key in range(t + 1) if not (streaming and evicts) or key < sinks or key > t - recent})
    return held
