"""Key norm as in l2compress: a share of the keys is evicted whenever there are many."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvscope.policies.base import Step, variant
from kvscope.policies.key_norm import KeyNorm


@variant("key-norm", "l2compress")
@dataclass(frozen=True)
class KeyNormL2Compress(KeyNorm):
    """Reproduce alessiodevoto/l2compress, ``cache.py``, which has no budget.

    When a head holds `prune_after` keys or more, it retains the ``ceil(keep_ratio * held)`` keys with the smallest
    norms. So the number of keys rises and falls repeatedly. Of equal norms the older key is retained; the code does not
    define which. The code retains every key by default (``keep_ratio=1``); the default here is the 0.9 of its first
    example.

    Example: of four or more keys half are retained, here those with the two smallest of the norms 3, 1, 2 and 5.

    >>> from kvscope.replay.example import held
    >>> rows = [[1.0], [0.5] * 2, [0.3] * 3, [0.25] * 4]
    >>> held(KeyNormL2Compress(keep_ratio=0.5, prune_after=4), rows, budget=9, key_l2=[3.0, 1.0, 2.0, 5.0])
    [[0], [0, 1], [0, 1, 2], [1, 2]]
    """

    bounded = False
    published = True
    proven = "authors' decisions"

    def observe(self, step: Step, score: Tensor) -> Tensor:
        if not step.compresses:
            return torch.zeros_like(score)
        norm = step.signals["key_l2"].expand(step.visible.shape)
        return torch.zeros_like(score).masked_fill_(self._evicted(step, norm), -torch.inf)

    def _evicted(self, step: Step, norm: Tensor) -> Tensor:
        """Return which keys that code drops after this step, bool ``[R, L, G, n]``."""
        held = step.visible.sum(-1, keepdim=True)
        retained = torch.ceil(self.keep_ratio * held.double())
        order = norm.masked_fill(~step.visible, torch.inf).argsort(dim=-1, stable=True)
        key = torch.arange(step.t + 1, device=order.device)
        place = torch.empty_like(order).scatter_(-1, order, key.expand_as(order))
        prunes = (held >= self.prune_after) & (step.layers >= self.skip_layers)[:, None, None]
        return prunes & step.visible & (place >= retained)
