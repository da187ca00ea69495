"""Scores that a kernel can compute in place of `Policy.observe`: recurrences for each key, and fixed ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class Arrivals:
    """What is known of the keys of ``b`` consecutive steps when they arrive.

    Attributes
    ----------
    positions : Tensor
        int64 ``[b]``.
    signals : mapping of str to Tensor
        The signals in the policy's `needs` with one number for each key, ``[., L, G, b]``.
    draws : callable
        ``draws(seed)`` returns what ``Step.draw(seed)`` returns at each of these steps, ``[L, S, b]``.
    """

    positions: Tensor
    signals: Mapping[str, Tensor]
    draws: Callable[[int], Tensor]


def position(keys: Arrivals) -> Tensor:
    """Return the position of each key: the oldest has the lowest score."""
    return keys.positions


@dataclass(frozen=True)
class Recurrence:
    """A score of the form ``S_t[j] = w_t[j] + decay * S_{t-1}[j]``, or one that never changes.

    Attributes
    ----------
    weights : {"mean", "max", "sum", "none"}
        How the live rows of the query heads that decide together are reduced to ``w_t``; ``none``: ``S[j]`` is `fixed`.
    decay : float
        Factor on the score of the previous step.
    scale : str or None
        Signal ``[., L, G, n]`` that each weight is first multiplied by, for policies that decide per key/value head.
    fixed : callable
        With ``none``: returns the scores of keys when they arrive, which broadcast to ``[., L, S, b]``.
    """

    weights: Literal["mean", "max", "sum", "none"]
    decay: float = 0.0
    scale: str | None = None
    fixed: Callable[[Arrivals], Tensor] = position
