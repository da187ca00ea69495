"""CurDKV on one key/value head, from its rule."""

from __future__ import annotations

import numpy as np


def shares(states: np.ndarray, visible: list[int], window: int) -> dict[int, float]:
    """Return the squared norm of each visible vector as a share of that of its part, or itself without parts."""
    result = {}
    for place, key in enumerate(visible):
        part = visible[place // window * window : place // window * window + window] if window else []
        total = sum(float(states[other] @ states[other]) for other in part) if window else 1.0
        result[key] = float(states[key] @ states[key]) / total
    return result


def scores(
    keys: np.ndarray, values: np.ndarray, visible: list[int], *, combine: str = "product", window: int = 16
) -> dict[int, float]:
    """Return the score of each visible key; keys and values are ``[T, D]``."""
    of_keys, of_values = shares(keys, visible, window), shares(values, visible, window)
    combined = {
        "product": lambda key: of_keys[key] * of_values[key],
        "mean": lambda key: (of_keys[key] + of_values[key]) / 2,
        "key": lambda key: of_keys[key],
        "value": lambda key: of_values[key],
    }[combine]
    return {key: combined(key) for key in visible}
