"""Random eviction: what a policy must beat to have learned anything."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvscope.policies.base import Policy, Step, parameter, policy


@policy("random")
@dataclass(frozen=True)
class Random(Policy):
    """Keep keys by a draw made once for each key, when it arrives.

    Score of key ``j``: one seeded uniform number per key/value head. It depends on the seed, the sequence, the layer,
    the head and the position alone, so that neither budgets nor the other policies of a replay change it.
    """

    needs = frozenset()
    paper = "baseline"

    seed: int = parameter(0, "seed of the draws")

    def observe(self, step: Step, score: Tensor) -> Tensor:
        score[..., -1] = step.draw(self.seed).to(score.dtype)
        return score
