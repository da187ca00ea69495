"""Sliding window: the newest keys stay. Also called Local in the H2O and A2SF papers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvscope.policies.base import Policy, Step, policy


@policy("window")
@dataclass(frozen=True)
class Window(Policy):
    """Keep the newest keys, in all heads and layers alike.

    Score of key ``j``: its position ``j``. Baseline of TOVA (arXiv:2401.06104, section 5.1) and, as "Local", of
    A2SF (arXiv:2407.20485, section 4.1). Positions stay the original ones.

    Example: budget 2; after step 3 the keys 2 and 3 are held.
    """

    needs = frozenset()
    scope = "layer"
    paper = "arXiv:2401.06104 section 5.1"

    def observe(self, step: Step, score: Tensor) -> Tensor:
        score[..., -1] = step.t
        return score
