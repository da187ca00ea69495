"""Random eviction: the baseline that any useful policy must exceed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvscope.policies.base import Policy, Recurrence, Step, parameter, policy


@policy("random")
@dataclass(frozen=True)
class Random(Policy):
    """Retain the keys with the highest random scores, drawn once for each key when it arrives.

    Score of key ``j``: one seeded uniform number per key/value head. It depends only on the seed, the sequence, the
    layer, the head and the position, so neither budgets nor other policies of a replay change it. NVIDIA/kvpress,
    ``random_press.py``, has the same rule but draws once, at the end of the prompt. This is a baseline without a paper.

    Example: the first four draws are .47, .65, .02 and .60.

    >>> from kvscope.replay.example import held
    >>> held(Random(), [[1], [0.5, 0.5], [0.4, 0.3, 0.3], [0.25] * 4], budget=2)
    [[0], [0, 1], [0, 1], [1, 3]]
    """

    needs = frozenset()
    formula = "S[j] = u_j, uniform in [0, 1)"
    paper = "baseline"
    proven = "own rule"

    seed: int = parameter(0, "seed of the draws")

    def recurrence(self) -> Recurrence:
        return Recurrence("none", fixed=lambda keys: keys.draws(self.seed))

    def observe(self, step: Step, score: Tensor) -> Tensor:
        score[..., -1] = step.draw(self.seed).to(score.dtype)
        return score
