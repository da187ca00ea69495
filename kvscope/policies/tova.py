"""TOVA: token omission via attention. The least attended key of the newest row goes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvscope.policies.base import Policy, Step, policy


@policy("tova")
@dataclass(frozen=True)
class TOVA(Policy):
    """Keep the keys that the newest query attends to most.

    Score of key ``j``: its weight in row ``t``, averaged over all query heads; one decision per layer.
    arXiv:2401.06104, section 4.2 and algorithm 1; code schwartz-lab-NLP/TOVA, ``tova_cache.py``. Nothing is protected:
    even the current key can go.

    Example: budget 2, row 2 is (.5 .2 .3): key 1 goes.
    """

    scope = "layer"
    paper = "arXiv:2401.06104 section 4.2"

    def observe(self, step: Step, score: Tensor) -> Tensor:
        return step.layer_weights()
