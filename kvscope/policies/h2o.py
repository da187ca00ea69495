"""H2O: heavy hitters, the keys that have gathered most attention, and the newest ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvscope.core.errors import UsageError
from kvscope.policies.base import Group, Policy, Protection, Step, Traits, at_least, parameter, policy
from kvscope.policies.history import wider
from kvscope.policies.recurrence import Recurrence


@policy("h2o")
@dataclass(frozen=True)
class H2O(Policy):
    """Keep the keys with the largest sum of attention since they arrived, and the newest half.

    ``S_t[j] = S_{t-1}[j] + w_t[j]``, with ``w_t`` the live row. arXiv:2306.14048, algorithm 1; code FMInference/H2O,
    which has three rules for it. They keep scores per query head and assume one key/value head each; with grouped heads
    the group is reduced by `group`.

    - ``drop``: ``utils_real_drop``. Keys are really dropped, and the query's own key comes on top of the budget.
    - ``mask``: ``utils_hh``, the simulation that most papers compare with. The budget includes the query's own key. A
      key that leaves the newest ones is hidden for one step while it competes with the heavy ones, and may come back.
      A cache of exactly the budget is not cut yet. Nothing is dropped, so this is a sparse reader.
    - ``flexgen``: ``h2o_flexgen``. ``hh = (B + 1) // 2`` heavy keys and the ``hh - 1`` newest; the code cannot hold an
      even number of keys. At the end of the prompt every older key competes; at each later step the key that has just
      left the newest ones does not.

    Example
    -------
    Sums after step 2 are 2.1, 0.7 and 0.2; key 2 is recent, key 1 goes. With the mask step 3 sees itself and key 0.

    >>> from kvscope.replay.example import held
    >>> rows = [[1], [0.6, 0.4], [0.5, 0.3, 0.2], [0.1, 0.1, 0.2, 0.6]]
    >>> held(H2O(recent=1), rows, 2)
    [[0], [0, 1], [0, 2], [0, 3]]
    >>> held(H2O(recent=1, variant="mask"), rows, 2, prompt=3)
    [[0], [0, 1], [0, 1, 2], [0, 3]]
    """

    paper = "arXiv:2306.14048 algorithm 1"
    proven = "authors' decisions (drop, mask), plain-loop twin"

    recent: int | None = parameter(None, "newest keys that always stay; None: half of the budget, rounded down")
    group: Group = parameter("mean", "how the query heads of a group become one: mean, max or sum")
    variant: Literal["drop", "mask", "flexgen"] = parameter(
        "drop", "which of the published rules: drop, mask (a key may come back) or flexgen (odd budgets)"
    )

    def __post_init__(self) -> None:
        at_least("recent", 0 if self.recent is None else self.recent, 0)
        if self.variant == "mask" and self.recent == 0:
            raise UsageError(
                "h2o: variant=mask with recent=0 hides every query's own key from it",
                "Take recent=1 or more, or variant=drop.",
            )
        if self.variant == "flexgen" and self.recent is not None:
            raise UsageError(
                f"h2o: recent={self.recent} does not go with variant=flexgen, which keeps half of the budget recent",
                "Leave recent out, or take variant=drop.",
            )

    @property
    def traits(self) -> Traits:
        if self.variant == "drop":
            return self.with_traits()
        return self.with_traits(reads=self.variant == "mask", prefills=frozenset({"full"}), published=True)

    def protect(self, budget: int) -> Protection:
        if self.variant == "flexgen":
            if budget < 3 or budget % 2 == 0:
                raise UsageError(
                    f"{self.label} holds an odd number of keys, 3 or more, and the budget is {budget}",
                    f"Take a budget of {max(budget + 1, 3)} keys.",
                )
            return Protection(recent=(budget - 1) // 2)
        return Protection(recent=budget // 2 if self.recent is None else self.recent)

    def read(self, step: Step) -> Tensor:
        heavy = wider(step.memory["heavy"], step.t + 1)
        return heavy | (torch.arange(step.t + 1, device=heavy.device) > step.t - self._recent(step))

    def recurrence(self) -> Recurrence | None:
        return Recurrence(self.group, decay=1.0) if self.variant == "drop" else None

    def observe(self, step: Step, score: Tensor) -> Tensor:
        if self.variant == "flexgen":
            return self._flexgen(step, score)
        score = score + step.weights(self.group)
        return self._mask(step, score) if self.variant == "mask" and step.t >= step.prompt - 1 else score

    def _recent(self, step: Step) -> Tensor:
        """Return how many of the newest keys the mask shows, ``[R, L, S, 1]``: at least the query's own."""
        budget = step.budget[..., None]
        return (budget // 2).clamp(min=1) if self.recent is None else torch.full_like(budget, self.recent)

    def _mask(self, step: Step, score: Tensor) -> Tensor:
        """Note which keys the next query sees beside the newest, and zero the sums of those that are lost for good."""
        n = step.t + 1
        key = torch.arange(n, device=score.device)
        recent = self._recent(step)
        ranked = score.masked_fill(key >= n - recent, -torch.inf)
        order = ranked.argsort(dim=-1, stable=True)  # of equal sums the oldest first, so it loses
        rank = torch.zeros_like(order).scatter_(-1, order, key.expand_as(order))
        heavy = rank >= n - (step.budget[..., None] - recent)
        heavy |= n <= step.budget[..., None]
        step.memory["heavy"] = heavy
        return torch.where(heavy | (key >= n - recent), score, 0)

    def _flexgen(self, step: Step, score: Tensor) -> Tensor:
        """Return the sums, of which that of the key that leaves the newest ones is set aside for one step."""
        if "aside" in step.memory:
            score = score.scatter(-1, *step.memory.pop("aside"))
        score = score + step.weights(self.group)
        if step.t < step.prompt:
            return score
        leaving = (step.t + 1 - (step.budget[..., None] + 1) // 2).clamp(min=0)
        step.memory["aside"] = leaving, score.gather(-1, leaving)
        return score.scatter(-1, leaving, torch.inf)
