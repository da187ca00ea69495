"""LaCache: of neighbours in the cache some stay, others in the next layer; a cursor goes through the cache."""

from __future__ import annotations

import math

Sets = list[set[int]]


def lacache(
    layer: int, layers: int, budget: int, prompt: int, length: int, prefill: str, *, span: int, overlap: int, sinks: int
) -> Sets:
    """Return ``R_t`` of one layer: the keys of a prompt that are evicted at its end leave as if they had come alone."""
    before = max(2, math.ceil((layers - span) / (span - overlap)) + 1)
    after = min(math.ceil(span / (span - overlap)), before - 1)
    start, end = min(sinks, budget // 4), budget - min(layers, budget // 2)
    cache: list[int] = []
    doomed: list[int] = []
    cursor, result = start, []
    for t in range(length):
        cache = [*cache, t]
        if len(cache) > budget:
            if not doomed:
                if end - cursor < after:
                    cursor = start
                step = cache[cursor : cursor + before]
                first = layer % (before - after + 1)
                doomed = [key for place, key in enumerate(step) if not first <= place < first + after] or step[:1]
                cursor += after
            cache = [key for key in cache if key != doomed[0]]
            doomed = doomed[1:]
        whole = prefill == "full" and t < prompt - 1
        result.append(set(range(t + 1)) if whole else set(cache))
    return result
