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

    The policies `a` and `b` choose in turn, `a` first, until the budget is full. Each chooses the key with its highest
    score among the keys that it has not chosen. A key that both choose counts once, so agreement makes room for more
    keys. Score of key ``j``: minus the smaller of ``2 r_a`` and ``2 r_b + 1``, where ``r_a`` and ``r_b`` are its ranks
    in the orders of both policies, 0 for the highest score. The larger protection of both policies holds; protected
    keys have no rank. This is our rule, without a paper or code; it is cited with the publications of its members.

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
