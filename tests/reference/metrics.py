"""Every metric for one row, as semantics has it: sums over explicit key lists."""

from __future__ import annotations

import math
from collections.abc import Sequence

Row = Sequence[float]


def ideal_set(row: Row, t: int, budget: int) -> set[int]:
    """Return the query's own key and the `budget` heaviest others; of equal weights the newer is taken."""
    others = sorted(range(t), key=lambda key: (-row[key], -key))
    return {t, *others[:budget]}


def share(row: Row, keys: set[int], first: int = 0) -> float:
    whole = sum(row[key] for key in range(first, len(row)))
    part = sum(row[key] for key in keys if key >= first)
    return part / whole if whole > 0 else (math.nan if first else 0.0)


def restricted(row: Row, keys: set[int]) -> list[float]:
    total = sum(row[key] for key in keys)
    return [row[key] / total if key in keys and total > 0 else 0.0 for key in range(len(row))]


def cosine(one: Row, other: Row) -> float:
    dot = sum(a * b for a, b in zip(one, other, strict=True))
    norms = math.sqrt(sum(a * a for a in one)) * math.sqrt(sum(b * b for b in other))
    return dot / norms if norms > 0 else 0.0


def all_metrics(row: Row, t: int, visible: set[int], held: set[int], budget: int) -> dict[str, float]:
    """Return every per-step metric of one query head at step `t`; `row` has ``t + 1`` weights."""
    ideal = ideal_set(row, t, budget)
    return {
        "retained_mass": share(row, visible),
        "retained_mass_no_sinks": share(row, visible, 4),
        "ideal_mass": share(row, ideal),
        "ideal_cosine": cosine(restricted(row, visible), restricted(row, ideal)),
        "full_cosine": cosine(restricted(row, visible), row),
        "mask_cosine": len(visible & ideal) / math.sqrt(len(visible) * len(ideal)),
        "ideal_recall": len(visible & ideal) / len(ideal),
        "read_keys": float(len(visible)),
        "held_keys": float(len(held)),
    }
