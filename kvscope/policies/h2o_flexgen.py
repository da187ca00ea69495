"""H2O in FlexGen: the authors' fast implementation, which can only hold an odd number of keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvscope.core.errors import UsageError
from kvscope.policies.base import Protection, Step, variant
from kvscope.policies.h2o import H2O


@variant("h2o", "flexgen")
@dataclass(frozen=True)
class H2OFlexGen(H2O):
    """Reproduce ``h2o_flexgen`` of FMInference/H2O: ``(B + 1) // 2`` heavy keys and one fewer of the newest.

    That code cannot hold an even number of keys. At the end of the prompt, all keys that are older than the newest ones
    compete. At each later step, the key that has just become too old for the newest ones does not compete.

    Example
    -------
    At step 3 key 2 is no longer one of the newest and does not compete, so key 1 is evicted although its sum is larger.

    >>> from kvscope.replay.example import held
    >>> rows = [[1], [0.6, 0.4], [0.5, 0.3, 0.2], [0.1, 0.1, 0.2, 0.6]]
    >>> held(H2OFlexGen(), rows, 3, prompt=3)
    [[0], [0, 1], [0, 1, 2], [0, 2, 3]]
    """

    prefills = frozenset({"full"})
    published = True
    proven = "authors' decisions"

    def __post_init__(self) -> None:
        if self.recent is not None:
            raise UsageError(
                f"h2o: recent={self.recent} cannot be used with variant=flexgen, which protects half of the budget",
                "Omit recent, or use variant=drop.",
            )

    def protect(self, budget: int) -> Protection:
        if budget < 3 or budget % 2 == 0:
            raise UsageError(
                f"{self.label} holds an odd number of keys, 3 or more, and the budget is {budget}",
                f"Take a budget of {max(budget + 1, 3)} keys.",
            )
        return Protection(recent=(budget - 1) // 2)

    def observe(self, step: Step, score: Tensor) -> Tensor:
        """Return the sums, of which that of the key that leaves the newest ones is set aside for one step."""
        if "aside" in step.memory:
            score = score.scatter(-1, *step.memory.pop("aside"))
        score = super().observe(step, score)
        if step.t < step.prompt:
            return score
        leaving = (step.t + 1 - (step.budget[..., None] + 1) // 2).clamp(min=0)
        step.memory["aside"] = leaving, score.gather(-1, leaving)
        return score.scatter(-1, leaving, torch.inf)
