"""A2SF: accumulated attention with a forgetting factor."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvscope.policies.base import Group, Policy, Protection, Step, at_least, parameter, policy


@policy("a2sf")
@dataclass(frozen=True)
class A2SF(Policy):
    """Keep the keys with the largest attention sum in which older rows count less and less.

    ``A_t[j] = w_t[j] + alpha * A_{t-1}[j]``, with ``w_t`` the live row. ``alpha = 1`` is H2O's score, ``alpha = 0`` the
    newest row alone. arXiv:2407.20485, section 3.3, equations 5 and 6; code Dirac-Notation/A2SF, ``utils_real_drop``.
    No key is protected by default (section 4.1). With streaming prefill the decisions are those of the paper's mask
    evaluation (``utils_lm_eval``).

    Example: ``alpha=.5``, rows (1), (.6 .4): scores .6 + .5 * 1 = 1.1 and .4.
    """

    paper = "arXiv:2407.20485 section 3.3"

    alpha: float = parameter(0.2, "forgetting factor: 0 is the newest row alone, 1 is a plain sum")
    recent: int = parameter(0, "newest keys that always stay")
    group: Group = parameter("mean", "how the query heads of a group become one: mean, max or sum")

    def __post_init__(self) -> None:
        at_least("alpha", self.alpha, 0, 1)
        at_least("recent", self.recent, 0)

    def protect(self, budget: int) -> Protection:
        return Protection(recent=self.recent)

    def observe(self, step: Step, score: Tensor) -> Tensor:
        return step.weights(self.group) + self.alpha * score
