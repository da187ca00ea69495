"""The full cache: nothing is evicted. Every other policy is compared with it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvscope.policies.base import Policy, Step, policy


@policy("full")
@dataclass(frozen=True)
class Full(Policy):
    """Retain everything: the cache that every other policy is compared with.

    Scores and budgets have no effect: a query sees the same keys as in the model itself.

    >>> from kvscope.replay.example import held
    >>> held(Full(), [[1], [0.6, 0.4], [0.5, 0.2, 0.3]], budget=1)
    [[0], [0, 1], [0, 1, 2]]
    """

    needs = frozenset()
    scope = "layer"
    phase = "none"
    bounded = False
    formula = "S[j] = 0, without a budget"
    paper = "the uncompressed cache"
    proven = "own rule"

    def observe(self, step: Step, score: Tensor) -> Tensor:
        return score
