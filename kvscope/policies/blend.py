"""Blend: the weighted sum of the scores of two policies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvscope.policies.base import Step, at_least, parameter, policy
from kvscope.policies.members import Members, ranked


@policy("blend")
@dataclass(frozen=True)
class Blend(Members):
    """Retain the keys with the highest weighted sum of the scores of two policies.

    Score of key ``j``: ``weight * s_a[j] + (1 - weight) * s_b[j]``, where ``s`` is made comparable among the keys that
    the head holds and that are not protected: with ``by=rank`` the place in the order of scores, from 0 for the lowest
    to 1 for the highest; with ``by=sum-to-one`` the score less the lowest, divided by the sum of these. Equal ranks do
    not exist: of equal scores the older key has the lower rank. The larger protection of both policies holds. This is
    our rule, without a paper or code; it is cited with the publications of its members.

    Both must evict at the same time and hold to a budget. Write ``blend(h2o, tova, weight=0.7)`` or
    ``blend:a=a2sf(alpha=0.7),b=key-norm,by=sum-to-one``.

    >>> from kvscope.replay.example import held
    >>> rows = [[1], [.5, .5], [.6, .2, .2], [.1, .2, .4, .3]]
    >>> held("blend(h2o(recent=0), tova, weight=0.9)", rows, budget=2, prompt=4)[-1]
    [0, 1]
    """

    formula = "S[j] = weight * s_a[j] + (1 - weight) * s_b[j], with s the rank or share of each policy's score"
    paper = "combination of two policies"
    proven = "own rule"

    weight: float = parameter(
        0.5, "weight of the first policy, from 0 to 1; the second gets the rest", search=(0.3, 0.5, 0.7)
    )
    by: Literal["rank", "sum-to-one"] = parameter("rank", "how scores are made comparable: rank or sum-to-one")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("weight", self.weight, 0, 1)

    def observe(self, step: Step, score: Tensor) -> Tensor:
        one, other = self.scores(step, score.dtype)
        if not step.compresses:
            return score
        among = self.evictable(step)
        mixed = self.weight * self._comparable(one, among) + (1 - self.weight) * self._comparable(other, among)
        return mixed.masked_fill(~among, 0).to(score.dtype)

    def _comparable(self, score: Tensor, among: Tensor) -> Tensor:
        """Return scores as numbers from 0 to 1, float64 ``[R, L, S, n]``."""
        n, count = score.shape[-1], among.sum(-1, keepdim=True)
        if self.by == "rank":
            return (ranked(score, among) - (n - count)).double() / (count - 1).clamp(min=1)
        score = score.double()
        least = score.masked_fill(~among, torch.inf).amin(-1, keepdim=True)
        above = (score - least).masked_fill(~among, 0)
        total = above.sum(-1, keepdim=True)
        return torch.where(total > 0, above / total, 0.0)
