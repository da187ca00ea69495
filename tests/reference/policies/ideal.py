"""The current key and the heaviest others of the mean row of a group; of equal ones the newer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def ideal(heads: Sequence[np.ndarray], budget: int, prompt: int, prefill: str) -> list[set[int]]:
    """Return ``V_t`` of the query heads that share a key/value head."""
    visible = []
    for t in range(len(heads[0])):
        if prefill == "full" and t < prompt:
            visible.append(set(range(t + 1)))
            continue
        row = [sum(head[t][key] / sum(head[t][: t + 1]) for head in heads) for key in range(t)]
        others = sorted(range(t), key=lambda key: (-row[key], -key))
        visible.append({t, *others[:budget]})
    return visible
