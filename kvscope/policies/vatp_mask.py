"""VATP's mask: the authors' code, which hides keys but drops none."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvscope.core.errors import UsageError
from kvscope.policies.base import Protection, Recurrence, Step, Traits, at_least, variant
from kvscope.policies.vatp import VATP, norm_signal, scaled_by_values

HISTORY, LAST = 400, 10  # over scissorhands: rows of the prompt that count, and newest keys


@variant("vatp", "mask")
@dataclass(frozen=True)
class VATPMask(VATP):
    """Reproduce guozhiyu/vatp, ``modify_llama.py``, with base ``h2o`` or ``scissorhands``.

    Keys are hidden, never evicted. A query sees ``heavy + recent = B`` keys and the current one. With base ``h2o`` each
    of the two is half of ``B``. With base ``scissorhands``, ``recent`` is 10, and the score is not a count: it is the
    sum of the prompt's last 400 rows divided by 400, to which every later row is added undivided. At the end of the
    prompt the first `sinks` scores are set to the largest number, so sinks beyond ``heavy`` are lost. Of equal scores
    the older key is shown; the code does not define which. So a hidden key can become visible again if it scores 0 and
    a visible one does too. The code without VATP is ``norm=none,sinks=0``. It has no grouped heads; here their mean is
    used.

    Example: budget 2, so one heavy and one recent key. With value norms of 1, 4, 1 and 1, key 1 has a score of 2.8 and
    key 0 of 2.1.

    >>> from kvscope.replay.example import held
    >>> rows = [[1], [0.6, 0.4], [0.5, 0.3, 0.2], [0.1, 0.1, 0.2, 0.6]]
    >>> held(VATPMask(sinks=0), rows, 2, prompt=3, value_l1=[1, 1, 1, 1])
    [[0], [0, 1], [0, 1, 2], [0, 2, 3]]
    >>> held(VATPMask(sinks=0), rows, 2, prompt=3, value_l1=[1, 4, 1, 1])
    [[0], [0, 1], [0, 1, 2], [1, 2, 3]]
    """

    reads = True
    prefills = frozenset({"full"})
    published = True
    proven = "authors' decisions"

    def __post_init__(self) -> None:
        at_least("sinks", self.sinks, 0)
        if self.base not in ("h2o", "scissorhands"):
            raise UsageError(
                f"vatp: variant=mask cannot use the base {self.base}", "Use base=h2o or base=scissorhands."
            )

    @property
    def traits(self) -> Traits:
        return self.with_traits(needs=frozenset({"weights"}) | norm_signal(self.norm))

    def protect(self, budget: int) -> Protection:
        least = 2 if self.base == "h2o" else LAST + 1
        if budget < least:
            raise UsageError(f"{self.label} has no rule for a budget of {budget}", f"Give it at least {least} keys.")
        return Protection()

    def recurrence(self) -> Recurrence | None:
        return None

    def read(self, step: Step) -> Tensor:
        shown: Tensor = step.memory["vatp"]
        return step.visible & torch.nn.functional.pad(shown, (0, 1), value=True)

    def observe(self, step: Step, score: Tensor) -> Tensor:
        """Return the scores that the authors' code has after the step, and remember which keys the next query sees."""
        rows, end = scaled_by_values(step, self.norm).weights(), step.prompt - 1
        if self.base == "scissorhands" and step.t <= end:
            rows = rows / HISTORY if step.t > end - HISTORY else torch.zeros_like(rows)
        score = score + rows
        if step.t < end:
            return score
        if step.t == end:
            score[..., : self.sinks] = torch.finfo(score.dtype).max
        recent = torch.full_like(step.budget, LAST) if self.base == "scissorhands" else step.budget // 2
        heavy = (step.budget - recent)[..., None]  # [R, L, G, 1]
        key = torch.arange(step.t + 1, device=score.device)
        old = key < step.t + 1 - recent[..., None]
        order = score.masked_fill(~old, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        place = torch.empty_like(order).scatter_(-1, order, key.expand_as(order))
        step.memory["vatp"] = ~old | (place < heavy) | (step.t < step.budget[..., None])
        return score  # that code sets hidden scores to 0; here that changes nothing, since those above only grow
