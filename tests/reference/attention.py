"""One attention row from its definition: scale, cap, mask, softmax with a learned sink."""

from __future__ import annotations

import math
from collections.abc import Sequence


def row(
    query: Sequence[float],
    keys: Sequence[Sequence[float]],
    t: int,
    scaling: float,
    softcap: float | None = None,
    sink: float | None = None,
    window: int | None = None,
) -> list[float]:
    """Return the weights of keys ``0..t`` for the query at position `t`."""
    weights = []
    for position, key in enumerate(keys[: t + 1]):
        logit = scaling * sum(a * b for a, b in zip(query, key, strict=True))
        if softcap is not None:
            logit = softcap * math.tanh(logit / softcap)
        seen = window is None or position > t - window
        weights.append(math.exp(logit) if seen else 0.0)
    total = sum(weights) + (0.0 if sink is None else math.exp(sink))
    return [weight / total for weight in weights]
