"""Union: two policies choose the keys that are retained in turn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvscope.policies.base import Step, policy
from kvscope.policies.members import Members, ranked


@policy("union")
@dataclass(frozen=True)
class Union(Members):
    """Retain the keys that either of two policies would retain with about half of the budget.

    The policies `a` and `b` choose in turn, `a` first: each the key with its highest score that was not yet chosen by
    itself, until the budget is full; a key that both choose takes one place, so that what they agree on leaves room
    for more. Score of key ``j``: with ``r_a`` and ``r_b`` its places in the orders of both, 0 for the highest score,
    minus the smaller of ``2 r_a`` and ``2 r_b + 1``. Protected keys, the larger numbers of both policies, are in no
    order. This is our rule, without a paper or code; what is published on its members is cited with it.

    Both must evict at the same time and hold to a budget. Write ``union(h2o, tova)`` or
    ``union:a=a2sf(alpha=0.7),b=window``.

    >>> from kvscope.replay.example import held
    >>> rows = [[1], [.5, .5], [.6, .2, .2], [.1, .2, .4, .3]]
    >>> held("union(h2o(recent=0), tova)", rows, budget=2, prompt=4)[-1]  # h2o chooses key 0, tova key 2
    [0, 2]
    """

    formula = "S[j] = -min(2 r_a[j], 2 r_b[j] + 1), with r the place of j in the order of each policy's scores"
    paper = "combination of two policies"
    proven = "own rule"

    def observe(self, step: Step, score: Tensor) -> Tensor:
        one, other = self.scores(step, score.dtype)
        if not step.compresses:
            return score
        among = self.evictable(step)
        last = step.t  # the place of the highest score
        turn = torch.minimum(2 * (last - ranked(one, among)), 2 * (last - ranked(other, among)) + 1)
        return (-turn).to(score.dtype)
