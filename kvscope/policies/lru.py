"""LRU: the key that has been unused for longest is evicted, as in any other cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvscope.policies.base import GroupReduction, Policy, Step, parameter, policy
from kvscope.policies.grouped_scores import GROUP_HELP, REDUCE_HELP, Reduce, head_scores


@policy("lru")
@dataclass(frozen=True)
class LRU(Policy):
    """Retain the most recently used keys; a row uses a key if it gives the key at least its even share.

    Score of key ``j``: the last step ``t`` with ``w_t[j] >= mean of w_t over V_t``, which is ``1 / |V_t|`` for a row
    that sums to one. The arrival of a key counts as a use. This is a baseline without a paper: the classical
    replacement rule, applied to attention. With ``reduce=scores`` each query head has its own last uses, and `group`
    reduces those.

    Example
    -------
    The even share of step 3 is 1/3, and only key 2 falls short of it.

    >>> from kvscope.replay.example import held
    >>> held(LRU(), [[1], [0.6, 0.4], [0.2, 0.5, 0.3], [0.1, 0.4, 0.1, 0.4]], 2)
    [[0], [0, 1], [1, 2], [1, 3]]
    """

    formula = "S[j] = last t with w_t[j] >= 1 / |V_t|"
    paper = "baseline: least recently used"
    proven = "own rule"

    group: GroupReduction = parameter("mean", GROUP_HELP)
    reduce: Reduce = parameter("rows", REDUCE_HELP)

    def observe(self, step: Step, score: Tensor) -> Tensor:
        if self.reduce == "rows":
            return torch.where(_used(step.weights(self.group), step.visible), step.t, score)
        last = head_scores(step, score)
        last.masked_fill_(_used(step.head_weights(), step.visible_to_heads()), step.t)
        return step.grouped(last, self.group)


def _used(weights: Tensor, visible: Tensor) -> Tensor:
    """Return which keys rows ``[R, L, H or G, n]`` use: those with at least their even share, and the newest."""
    used = (weights >= even_share(weights, visible)) & (weights > 0)
    used[..., -1].fill_(True)
    return used


def even_share(weights: Tensor, visible: Tensor) -> Tensor:
    """Return the mean of rows ``[R, L, H or G, n]`` over the keys that are visible, ``[R, L, H or G, 1]``."""
    total = weights.sum(-1, keepdim=True, dtype=torch.float64).to(weights.dtype)  # the order of a sum decides nothing
    return total / visible.sum(-1, keepdim=True)
