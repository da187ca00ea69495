"""The full cache: nothing is evicted. The reference that every other policy is compared with."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvscope.policies.base import Policy, Step, policy


@policy("full")
@dataclass(frozen=True)
class Full(Policy):
    """Keep everything."""

    needs = frozenset()
    scope = "layer"
    phase = "none"
    bounded = False
    paper = "the uncompressed cache"

    def observe(self, step: Step, score: Tensor) -> Tensor:
        return score
