"""Rules that are one line of arithmetic per key: what a compiled kernel can step in place of `Policy.observe`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from kvscope.policies.base import Policy


@dataclass(frozen=True)
class Recurrence:
    """A score of the form ``S_t[j] = w_t[j] + decay * S_{t-1}[j]``, or the position of the key.

    Attributes
    ----------
    weights : {"mean", "max", "sum", "none"}
        How the live rows of the query heads that decide together become ``w_t``; ``none``: ``S[j] = j``.
    decay : float
        What is left of the score before.
    scale : str or None
        Signal ``[., L, G, n]`` that each weight is multiplied by first, for policies that decide per key/value head.
    """

    weights: Literal["mean", "max", "sum", "none"]
    decay: float = 0.0
    scale: str | None = None


def recurrence_of(policy: Policy) -> Recurrence | None:
    """Return the recurrence that a policy states for its `observe`, or None.

    A class that scores anew must state anew: what its base class said of another `observe` does not hold for it.
    """

    def owner(name: str) -> type:
        return next(cls for cls in type(policy).__mro__ if name in vars(cls))

    return policy.recurrence() if issubclass(owner("recurrence"), owner("observe")) else None
