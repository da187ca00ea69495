"""H2O: heavy hitters, the keys that have gathered most attention, and the newest ones."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvscope.policies.base import Group, Policy, Protection, Step, at_least, parameter, policy


@policy("h2o")
@dataclass(frozen=True)
class H2O(Policy):
    """Keep the keys with the largest sum of attention since they arrived, and the newest half.

    ``S_t[j] = S_{t-1}[j] + w_t[j]``, with ``w_t`` the live row. arXiv:2306.14048, algorithm 1; code FMInference/H2O,
    ``utils_real_drop`` (keys are really dropped, as here). That code keeps scores per query head and assumes one
    key/value head each; with grouped heads the group is reduced by `group`.

    Example: budget 2, ``recent=1``, rows (1), (.6 .4), (.5 .3 .2): sums 2.1, .7, .2; key 2 is recent, key 1 goes.
    """

    paper = "arXiv:2306.14048 algorithm 1"

    recent: int | None = parameter(None, "newest keys that always stay; None: half of the budget, rounded down")
    group: Group = parameter("mean", "how the query heads of a group become one: mean, max or sum")

    def __post_init__(self) -> None:
        at_least("recent", 0 if self.recent is None else self.recent, 0)

    def protect(self, budget: int) -> Protection:
        return Protection(recent=budget // 2 if self.recent is None else self.recent)

    def observe(self, step: Step, score: Tensor) -> Tensor:
        return score + step.weights(self.group)
