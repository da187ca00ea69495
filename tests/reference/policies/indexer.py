"""The keys that a model's own index chose, from a row on one key/value head."""

from __future__ import annotations

import numpy as np


def read(rows: np.ndarray) -> set[int]:
    """Return the keys that the last key's query reads: rows ``[heads of the group, n]``, with weight on chosen keys."""
    n = rows.shape[1]
    chosen = {n - 1}
    for row in rows:
        for key, weight in enumerate(row):
            if weight > 0:
                chosen.add(key)
    return chosen
