"""Predicted scores of keys: a perceptron in loops, and the keys that are held under a budget or a threshold."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tests.reference.policies.evict import Sets

Matrix = Sequence[Sequence[float]]
Layer = tuple[Matrix, Sequence[float]]  # weights and constants


def predicted(token: Sequence[float], inner: Layer | None, outer: Layer) -> list[float]:
    """Return the scores of a token for each head, from the weights and constants of both layers, or of one."""
    if inner is not None:
        token = [x * 0.5 * (1 + math.erf(x / math.sqrt(2))) for x in affine(token, *inner)]
    return affine(token, *outer)


def affine(token: Sequence[float], weight: Matrix, constant: Sequence[float]) -> list[float]:
    """Return ``W x + b``."""
    return [sum(w * x for w, x in zip(row, token, strict=True)) + b for row, b in zip(weight, constant, strict=True)]


def below(scores: Sequence[float], threshold: float, prompt: int, prefill: str, window: int) -> tuple[Sets, Sets]:
    """Return ``V_t`` and ``R_t``: a key below the threshold leaves when `window` newer keys exist."""
    all_visible, all_held = [], []
    held: set[int] = set()
    for t in range(len(scores)):
        visible = held | {t}
        evicts = prefill == "stream" or t >= prompt - 1
        held = {key for key in visible if not (evicts and scores[key] < threshold and t - key >= window)}
        all_visible.append(visible)
        all_held.append(held)
    return all_visible, all_held
