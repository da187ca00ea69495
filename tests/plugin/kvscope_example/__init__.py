"""A policy in a package of its own: what the entry-point group ``kvscope.policies`` needs."""

from dataclasses import dataclass

from torch import Tensor, arange

from kvscope import Policy, Step, policy


@policy("every-other")
@dataclass(frozen=True)
class EveryOther(Policy):
    """Keep even positions before odd ones."""

    needs = frozenset()
    paper = "an example"

    def observe(self, step: Step, score: Tensor) -> Tensor:
        return score * 0 - (arange(step.t + 1) % 2)
