"""RoCo: robust cache omission. The key with the smallest mean is evicted, among those whose weight varies little."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvscope.policies.base import (
    GroupReduction,
    Policy,
    Protection,
    Step,
    at_least,
    parameter,
    policy,
    variant_parameter,
)
from kvscope.policies.citation import Citation
from kvscope.policies.grouped_scores import GROUP_HELP, REDUCE_HELP, Reduce

NEWEST = 1e9  # deviation beyond any weight's: of the newest keys


@policy("roco")
@dataclass(frozen=True)
class RoCo(Policy):
    """Evict the key with the smallest mean weight, except for the keys whose weight has varied most.

    Over the rows that saw key ``j``, its weight has the mean ``m[j]`` and the standard deviation ``s[j]``. With
    ``w = int(std_ratio * B)``, the ``w + 1`` visible keys with the largest ``s`` are not evicted. Of the others (at a
    step that evicts one, the ``B - w`` with the smallest ``s``) the one with the smallest ``m`` is evicted. The newest
    `recent` keys are protected, at most half of the budget.

    Ren and Zhu, arXiv:2402.06262; code DRSY/EasyKV, ``easykv.py``, whose decoding mode is the variant. If several keys
    are evicted at once, as at the end of a prompt, they are those with the smallest ``m``; the authors' code reduces a
    prompt in chunks in the same way. That code averages the rows of a group's query heads first. With
    ``reduce=scores``, `group` reduces the means and the variances of the heads instead. Of equal deviations the older
    key counts as the smaller; that code does not define it.

    Example: budget 3, ``std_ratio=0.4`` (``w = 1``), ``recent=1``. After row 3 the means of keys 0 to 2 are .65, .2 and
    .275, and the deviations .23, .28 and .03. Key 1 has varied most and key 3 is the newest. So key 2 is evicted, not
    key 1.

    >>> from kvscope.replay.example import held
    >>> rows = [[1.0], [0.4, 0.6], [0.7, 0.0, 0.3], [0.5, 0.0, 0.25, 0.25]]
    >>> held(RoCo(std_ratio=0.4, recent=1), rows, budget=3, prompt=1)[3]
    [0, 1, 3]
    """

    formula = "S[j] = mean over t of w_t[j], among the keys whose w_t[j] varies least"
    paper = "arXiv:2402.06262; code DRSY/EasyKV"
    citation = Citation(
        key="ren2024efficacy",
        title="On the Efficacy of Eviction Policy for Key-Value Constrained Generative Language Model Inference",
        authors="Ren, Siyu and Zhu, Kenny Q.",
        year=2024,
        arxiv="2402.06262",
    )
    proven = "authors' code, read"

    std_ratio: float = parameter(0.3, "share of the budget for the keys whose weight varies most")
    recent: int = parameter(10, "newest keys that are never evicted, at most half of the budget")
    group: GroupReduction = parameter("mean", GROUP_HELP)
    reduce: Reduce = parameter("rows", REDUCE_HELP)
    variant: str = variant_parameter()

    def __post_init__(self) -> None:
        at_least("std_ratio", self.std_ratio, 0, 1)
        at_least("recent", self.recent, 0)

    def protect(self, budget: int) -> Protection:
        return Protection(recent=min(self.recent, budget // 2))

    def observe(self, step: Step, score: Tensor) -> Tensor:
        mean, variance = self._moments(step)
        if not step.compresses:
            return mean
        newest = (step.budget // 2).clamp(max=self.recent)
        return self._varying_last(step, mean, variance.clamp(min=0).sqrt(), newest, first=0)

    def _moments(self, step: Step) -> tuple[Tensor, Tensor]:
        """Return mean and variance of every key's weight over the rows that saw it, ``[R, L, G, n]``."""
        by_head = self.reduce == "scores"
        weights = step.head_weights() if by_head else step.weights(self.group)
        if "roco" not in step.memory:
            step.memory["roco"] = weights.new_zeros((2, *weights.shape[:-1], step.length))
        sums = step.memory["roco"][..., : step.t + 1]
        sums[0] += weights
        sums[1] += weights**2
        rows = torch.arange(step.t + 1, 0, -1, device=weights.device)  # a key is seen from its own row on
        mean = sums[0] / rows
        variance = sums[1] / rows - mean**2
        return (step.grouped(mean, self.group), step.grouped(variance, self.group)) if by_head else (mean, variance)

    def _varying_last(self, step: Step, mean: Tensor, deviation: Tensor, newest: Tensor, first: int) -> Tensor:
        """Return the means, those of the keys that vary most raised above all others, ``[R, L, G, n]``.

        Keys before `first` have no part in the choice; the `newest` ``[R, L, G]`` count as varying most.
        """
        key = torch.arange(step.t + 1, device=mean.device)
        candidate = step.visible & (key >= first)
        spread = deviation.masked_fill(key >= step.t + 1 - newest[..., None], NEWEST)
        order = spread.masked_fill(~candidate, torch.inf).argsort(dim=-1, stable=True)
        place = torch.empty_like(order).scatter_(-1, order, key.expand_as(order))
        varying = (self.std_ratio * (step.budget - first).double()).long()  # [R, L, G]
        feasible = place < (candidate.sum(-1) - varying - 1)[..., None]
        return torch.where(feasible, mean, mean + mean.amax(-1, keepdim=True) + 1)
