"""A2SF: accumulated attention with a forgetting factor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvscope.policies.base import (
    GroupReduction,
    Policy,
    Protection,
    Recurrence,
    Step,
    at_least,
    parameter,
    policy,
    variant_parameter,
)
from kvscope.policies.citation import Citation
from kvscope.policies.grouped_scores import GROUP_HELP, REDUCE_HELP, Reduce, accumulated, recurrence_of_rows


@policy("a2sf")
@dataclass(frozen=True)
class A2SF(Policy):
    """Retain the keys with the largest sum of attention, in which each older row counts less.

    ``A_t[j] = w_t[j] + alpha * A_{t-1}[j]``, with ``w_t`` the live row. ``alpha = 1`` gives H2O's score, ``alpha = 0``
    uses only the newest row. arXiv:2407.20485, section 3.3, equations 5 and 6; code Dirac-Notation/A2SF,
    ``utils_real_drop``. By default no key is protected (section 4.1); that code protects the 128 newest by default. It
    scores query heads. Here `group` reduces the scores of a group's heads to one; ``reduce=rows`` reduces each row
    before it is added, and the result differs only for ``max``.

    ``normalise=lifetime`` divides ``A_t[j]`` by the number of rows since the key arrived, ``t - j + 1``. With
    ``alpha = 1`` that is the mean attention since arrival, by which kvpress (ObservedAttention) and OpenVINO rank keys.
    A smaller `alpha` favours new keys, because old rows count in the divisor but hardly in the sum.

    Example
    -------
    After step 2 key 0, which had the largest sum before, has a score of 0.26, and key 1 of 0.28.

    >>> from kvscope.replay.example import held
    >>> held(A2SF(alpha=0.2), [[1], [0.6, 0.4], [0.1, 0.2, 0.7]], 2)
    [[0], [0, 1], [1, 2]]
    >>> held(A2SF(alpha=1), [[1], [0.6, 0.4], [0.1, 0.2, 0.7]], 2)
    [[0], [0, 1], [0, 2]]
    """

    formula = "A_t[j] = w_t[j] + alpha * A_{t-1}[j]"
    paper = "arXiv:2407.20485 section 3.3"
    citation = Citation(
        key="jo2024a2sf",
        title="A2SF: Accumulative Attention Scoring with Forgetting Factor for Token Pruning in Transformer Decoder",
        authors="Jo, Hyun-rae and Shin, Dongkun",
        year=2024,
        arxiv="2407.20485",
    )
    proven = "authors' decisions"

    alpha: float = parameter(
        0.2,
        "forgetting factor: 0 uses only the newest row, 1 is a plain sum",
        search=(0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 1.0),
    )
    recent: int = parameter(0, "newest keys that are never evicted")
    group: GroupReduction = parameter("mean", GROUP_HELP)
    sinks: int = parameter(0, "first keys that are never evicted")
    normalise: Literal["none", "lifetime"] = parameter("none", "lifetime: divide a key's sum by its age in rows")
    reduce: Reduce = parameter("scores", REDUCE_HELP)
    variant: str = variant_parameter()

    def __post_init__(self) -> None:
        at_least("alpha", self.alpha, 0, 1)
        at_least("recent", self.recent, 0)
        at_least("sinks", self.sinks, 0)

    def protect(self, budget: int) -> Protection:
        return Protection(sinks=self.sinks, recent=self.recent)

    def recurrence(self) -> Recurrence | None:
        return recurrence_of_rows(self.group, self.reduce, decay=self.alpha) if self.normalise == "none" else None

    def observe(self, step: Step, score: Tensor) -> Tensor:
        return accumulated(step, score, self.group, self.reduce, self._next)

    def _next(self, weights: Tensor, score: Tensor) -> Tensor:
        if self.normalise == "none":
            return weights + self.alpha * score
        return (weights + self.alpha * score * (ages(score) - 1)) / ages(score)


def ages(score: Tensor) -> Tensor:
    """Return how many rows have seen each key after a step, ``[n]``: its own row is the first."""
    return torch.arange(score.shape[-1], 0, -1, device=score.device, dtype=score.dtype)
