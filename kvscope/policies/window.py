"""Sliding window: the newest keys are retained. Also called Local in the H2O and A2SF papers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvscope.policies.base import Policy, Recurrence, Step, policy
from kvscope.policies.tova import TOVA


@policy("window")
@dataclass(frozen=True)
class Window(Policy):
    """Retain the newest keys, in all heads and layers the same.

    Score of key ``j``: its position ``j``. Baseline of TOVA (arXiv:2401.06104, section 5.1) and, as "Local", of
    A2SF (arXiv:2407.20485, section 4.1); code FMInference/H2O with no heavy keys, whose budget counts the current key,
    which is not counted here. Positions are the original ones.

    >>> from kvscope.replay.example import held
    >>> held(Window(), [[1], [0.6, 0.4], [0.5, 0.2, 0.3], [0.7, 0.1, 0.1, 0.1]], budget=2)
    [[0], [0, 1], [1, 2], [2, 3]]
    """

    needs = frozenset()
    scope = "layer"
    formula = "S[j] = j"
    paper = "arXiv:2401.06104 section 5.1"
    citation = TOVA.citation
    proven = "own rule"

    def recurrence(self) -> Recurrence:
        return Recurrence("none")

    def observe(self, step: Step, score: Tensor) -> Tensor:
        score[..., -1].fill_(step.t)
        return score
