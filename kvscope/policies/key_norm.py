"""Key norm: keys with a small norm stay, since queries tend to attend to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvscope.policies.base import Policy, Step, Traits, at_least, parameter, policy


@policy("key-norm")
@dataclass(frozen=True)
class KeyNorm(Policy):
    """Keep the keys with the smallest L2 norm; no weights are read and nothing is protected.

    Score of key ``j``: ``-|k_j|``, per key/value head. Devoto et al., arXiv:2406.11430; code
    alessiodevoto/l2compress, ``cache.py``. NVIDIA/kvpress, ``knorm_press.py``, is the same score with one choice at
    the end of the prompt (``--compress prefill``).

    ``variant=l2compress`` is the authors' own rule, which knows no budget: whenever a head holds `prune_after` keys or
    more, it keeps the ``ceil(keep_ratio * held)`` smallest of them, so that its length goes up and down like a saw. Of
    equal norms the older stays there, where the code leaves the choice open. It keeps every key by default
    (``keep_ratio=1``); ours is the 0.9 of its first example.

    Example: budget 2, norms 3, 1, 2, 5: key 0 goes when key 2 has come, key 3 as soon as it comes.

    >>> from kvscope.replay.example import held
    >>> rows = [[1.0], [0.5] * 2, [0.3] * 3, [0.25] * 4]
    >>> held(KeyNorm(), rows, budget=2, prompt=1, key_l2=[3.0, 1.0, 2.0, 5.0])
    [[0], [0, 1], [1, 2], [1, 2]]
    """

    needs = frozenset({"key_l2"})
    paper = "arXiv:2406.11430"
    proven = "plain-loop twin of the authors' code"

    variant: Literal["plain", "l2compress"] = parameter("plain", "plain: to the budget; l2compress: the authors' code")
    keep_ratio: float = parameter(0.9, "l2compress: share of the keys that stays when some go")
    prune_after: int = parameter(2048, "l2compress: keys from which on some go")
    skip_layers: int = parameter(0, "l2compress: first layers of the model, which keep everything")

    def __post_init__(self) -> None:
        at_least("keep_ratio", self.keep_ratio, 0, 1)
        at_least("prune_after", self.prune_after, 1)
        at_least("skip_layers", self.skip_layers, 0)

    @property
    def traits(self) -> Traits:
        return self.with_traits() if self.variant == "plain" else self.with_traits(bounded=False, published=True)

    def observe(self, step: Step, score: Tensor) -> Tensor:
        norm = step.signals["key_l2"].expand(step.visible.shape)
        if self.variant == "plain":
            return -norm.to(score.dtype)
        if not step.compresses:
            return torch.zeros_like(score)
        return torch.zeros_like(score).masked_fill_(self._pruned(step, norm), -torch.inf)

    def _pruned(self, step: Step, norm: Tensor) -> Tensor:
        """Return which keys the authors' code drops after this step, bool ``[R, L, G, n]``."""
        held = step.visible.sum(-1, keepdim=True)
        keeps = torch.ceil(self.keep_ratio * held.double())
        order = norm.masked_fill(~step.visible, torch.inf).argsort(dim=-1, stable=True)
        place = torch.empty_like(order).scatter_(
            -1, order, torch.arange(step.t + 1, device=order.device).expand_as(order)
        )
        prunes = (held >= self.prune_after) & (step.layers >= self.skip_layers)[:, None, None]
        return prunes & step.visible & (place >= keeps)
