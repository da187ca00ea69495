"""Scores that are a recurrence for each key, which a kernel can compute in place of `Policy.observe`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Recurrence:
    """A score of the form ``S_t[j] = w_t[j] + decay * S_{t-1}[j]``, or the position of the key.

    Attributes
    ----------
    weights : {"mean", "max", "sum", "none"}
        How the live rows of the query heads that decide together are reduced to ``w_t``; ``none``: ``S[j] = j``.
    decay : float
        Factor on the score of the previous step.
    scale : str or None
        Signal ``[., L, G, n]`` that each weight is first multiplied by, for policies that decide per key/value head.
    """

    weights: Literal["mean", "max", "sum", "none"]
    decay: float = 0.0
    scale: str | None = None
