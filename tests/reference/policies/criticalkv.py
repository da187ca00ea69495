"""CriticalKV's second stage on one key/value head, from its rule, and the norms of projected values."""

from __future__ import annotations

import numpy as np


def norms(values: np.ndarray, projections: list[np.ndarray]) -> list[float]:
    """Return of each value ``[T, D]`` the mean L1 norm after the projections ``[D, hidden]`` of a group's heads."""
    return [sum(float(np.abs(value @ weight).sum()) for weight in projections) / len(projections) for value in values]


def retained(
    base: dict[int, float],
    norm: list[float],
    budget: int,
    protected: set[int],
    *,
    first: float = 0.5,
    epsilon: float = 0.0001,
) -> set[int]:
    """Return the keys that stay, of the base's scores of all visible keys; of equal scores the newer key stays."""
    chosen = set(protected & base.keys())
    lowest = min([0.0, *(base[key] for key in base if key not in chosen)])
    while len(chosen) < int(budget * first):
        chosen.add(max((key for key in base if key not in chosen), key=lambda key: (base[key], key)))
    while len(chosen) < min(budget, len(base)):
        rest = [key for key in base if key not in chosen]
        chosen.add(max(rest, key=lambda key: ((base[key] - lowest + epsilon) * norm[key], key)))
    return chosen
