"""The ideal set: the keys that the query attends to most, selected from its row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvscope.policies.a2sf import A2SF
from kvscope.policies.base import Policy, Step, policy


@policy("ideal")
@dataclass(frozen=True)
class Ideal(Policy):
    """Read the current key and the ``B`` heaviest others in each row: the bound for every policy with this budget.

    The keys are selected anew at each step, from the row of that step. So a key that was not selected before can be
    selected now, which no cache can do. Shares of the row are averaged over the query heads of a group; of equal shares
    the newer key is selected. With one query head per key/value head, this is the set of the metrics `ideal_mass` and
    `ideal_cosine` (A2SF, arXiv:2407.20485, section 4.3), which select keys for each query head.

    >>> from kvscope.replay.example import held
    >>> held("ideal", [[1], [.5, .5], [.1, .8, .1], [.7, .1, .1, .1]], budget=1)
    [[0], [0, 1], [1, 2], [0, 3]]
    """

    needs = frozenset({"full_weights"})
    reads = True
    clairvoyant = True
    formula = "read t and the B keys with the largest p_t[j]"
    paper = "arXiv:2407.20485 section 4.3"
    citation = A2SF.citation
    proven = "the ideal set of the metrics"

    def read(self, step: Step) -> Tensor:
        rows = step.signals["full_weights"]
        total = rows.sum(-1, keepdim=True)
        shares = step.grouped(rows / torch.where(total > 0, total, 1))
        others = torch.where(step.visible, shares, -1.0)[..., :-1]
        newest_first = others.flip(-1).argsort(dim=-1, descending=True, stable=True)
        places = torch.arange(step.t, device=rows.device).expand_as(newest_first)
        rank = torch.empty_like(newest_first).scatter_(-1, newest_first, places).flip(-1)
        chosen = rank < step.budget[..., None]
        return torch.cat([chosen, torch.ones_like(step.visible[..., :1])], dim=-1)

    def observe(self, step: Step, score: Tensor) -> Tensor:
        return score
