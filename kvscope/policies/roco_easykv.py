"""RoCo in EasyKV's decoding mode: the authors' code, which retains the prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvscope.policies.base import Protection, Step, variant
from kvscope.policies.roco import RoCo

UNKNOWN = 2e9  # deviation above that of the newest keys: where rounding left no number


@variant("roco", "easykv")
@dataclass(frozen=True)
class RoCoEasyKV(RoCo):
    """Reproduce the decoding mode of DRSY/EasyKV, ``easykv.py``: it retains the prompt, which the rule ignores.

    ``B`` is the number of prompt keys plus that code's budget ``b``, and ``w`` is computed from ``b``. The newest 10
    keys are not protected but count as those that vary most; with ``b`` under 30 some of them may therefore be evicted.
    A variance that rounds below zero counts as the largest of all.

    Example: a prompt of one key, and two more. Key 1 has varied most and key 3 is the newest: key 2 is evicted.

    >>> from kvscope.replay.example import held
    >>> rows = [[1.0], [0.4, 0.6], [0.7, 0.0, 0.3], [0.5, 0.0, 0.25, 0.25]]
    >>> held(RoCoEasyKV(std_ratio=0.5, recent=1), rows, budget=3, prompt=1)[3]
    [0, 1, 3]
    """

    prefills = frozenset({"full"})
    published = True
    proven = "authors' decisions"

    def protect(self, budget: int) -> Protection:
        return Protection(prompt=True)

    def observe(self, step: Step, score: Tensor) -> Tensor:
        mean, variance = self._moments(step)
        if not step.compresses:
            return mean
        deviation = variance.sqrt().nan_to_num(nan=UNKNOWN)
        return self._varying_last(step, mean, deviation, torch.full_like(step.budget, self.recent), first=step.prompt)
