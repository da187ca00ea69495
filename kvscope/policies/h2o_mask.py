"""H2O's mask: the authors' simulation, in which a hidden key may become visible again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvscope.core.errors import UsageError
from kvscope.policies.base import Step, variant
from kvscope.policies.h2o import H2O
from kvscope.policies.history import wider


@variant("h2o", "mask")
@dataclass(frozen=True)
class H2OMask(H2O):
    """Reproduce ``utils_hh`` of FMInference/H2O, the simulation that most papers compare with.

    The budget includes the current key. A key that is no longer one of the newest competes with the heavy keys. It is
    hidden for the one step in which it competes, and may then become visible again. A cache of exactly the budget is
    not reduced yet. Nothing is evicted, so this is a sparse reader.

    Example
    -------
    Step 3 reads its key and key 0.

    >>> from kvscope.replay.example import held
    >>> rows = [[1], [0.6, 0.4], [0.5, 0.3, 0.2], [0.1, 0.1, 0.2, 0.6]]
    >>> held(H2OMask(recent=1), rows, 2, prompt=3)
    [[0], [0, 1], [0, 1, 2], [0, 3]]
    """

    reads = True
    prefills = frozenset({"full"})
    published = True
    proven = "authors' decisions"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recent == 0:
            raise UsageError(
                "h2o: variant=mask with recent=0 hides the current key from every query",
                "Use recent=1 or more, or variant=drop.",
            )

    def read(self, step: Step) -> Tensor:
        heavy = wider(step.memory["heavy"], step.t + 1)
        return heavy | (torch.arange(step.t + 1, device=heavy.device) > step.t - self._recent(step))

    def observe(self, step: Step, score: Tensor) -> Tensor:
        score = super().observe(step, score)
        return self._hide(step, score) if step.t >= step.prompt - 1 else score

    def _recent(self, step: Step) -> Tensor:
        """Return how many of the newest keys the mask shows, ``[R, L, S, 1]``: at least the query's own."""
        budget = step.budget[..., None]
        return (budget // 2).clamp(min=1) if self.recent is None else torch.full_like(budget, self.recent)

    def _hide(self, step: Step, score: Tensor) -> Tensor:
        """Remember which older keys the next query sees, and set the sums of those that are lost for good to zero."""
        n = step.t + 1
        key = torch.arange(n, device=score.device)
        recent = self._recent(step)
        ranked = score.masked_fill(key >= n - recent, -torch.inf)
        order = ranked.argsort(dim=-1, stable=True)  # of equal sums the oldest first, so it loses
        rank = torch.zeros_like(order).scatter_(-1, order, key.expand_as(order))
        heavy = rank >= n - (step.budget[..., None] - recent)
        heavy |= n <= step.budget[..., None]
        step.memory["heavy"] = heavy
        # Sums of query heads, where a policy stores them, keep what is lost: it stays below the heavy ones, which grow.
        return torch.where(heavy | (key >= n - recent), score, 0)
