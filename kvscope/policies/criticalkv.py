"""CriticalKV: half of the budget by another policy's scores, the rest by these times norms of projected values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from kvscope.policies.base import Policy, Protection, Step, Traits, at_least, parameter, policy
from kvscope.policies.citation import Citation
from kvscope.policies.nested import require_nested
from kvscope.policies.spec import parse_policy


@policy("criticalkv")
@dataclass(frozen=True)
class CriticalKV(Policy):
    """Retain the keys that the base policy scores highest, then those that also change the output of the layer most.

    A share `first` of the budget is for the keys with the highest scores of the base, its protected keys among them.
    The rest is for the keys with the largest ``(score + epsilon) * |W_o v|``, where ``|W_o v|`` is the L1 norm of the
    key's value after the output projection, averaged over the query heads of a group. `base` is any policy that evicts
    to a budget, with parameters in parentheses. Phase, scope, protection and allocation are those of the base.

    arXiv:2502.03805; code NVIDIA/kvpress, ``criticalkv_press.py``. Ours: scores of a base that are below zero are
    shifted so that they start at zero; where one decision holds for a layer, the norms of its heads are averaged. The
    trace must contain the norms: ``kvscope trace --outputs``.

    Example: budget 2 of 3 keys. Key 0 has the largest weight. Of the others key 1 has the larger weight, and key 2 the
    larger product, .2 times 3.

    >>> from kvscope.replay.example import held
    >>> rows, norms = [[1], [0.5, 0.5], [0.5, 0.3, 0.2]], [1.0, 1.0, 3.0]
    >>> held("criticalkv:base=tova(scope=kv_head)", rows, budget=2, prompt=3, value_out_l1=norms)[-1]
    [0, 2]
    """

    needs = frozenset({"weights", "value_out_l1"})
    formula = "half of B by S[j] of `base`, the rest by (S[j] + epsilon) * |W_o v_j|_1"
    paper = "arXiv:2502.03805"
    citation = Citation(
        key="feng2025criticalkv",
        title="Identify Critical KV Cache in LLM Inference from an Output Perturbation Perspective",
        authors="Feng, Yuan and Lv, Junlin and Cao, Yukun and Xie, Xike and Zhou, S. Kevin",
        year=2025,
        arxiv="2502.03805",
    )
    proven = "kvpress's decisions"

    base: str = parameter("snapkv", "policy whose scores are used, such as a2sf(alpha=0.7)")
    first: float = parameter(0.5, "share of the budget that is filled by the base's scores alone")
    epsilon: float = parameter(0.0001, "added to a score before it is multiplied by the norm")

    def __post_init__(self) -> None:
        at_least("first", self.first, 0, 1)
        at_least("epsilon", self.epsilon, 0)
        require_nested(self, "base", self.inner, _refusal(self.inner), "Use a base such as snapkv, h2o or tova.")

    @cached_property
    def inner(self) -> Policy:
        """The base policy."""
        return parse_policy(self.base)

    @property
    def traits(self) -> Traits:
        return replace(self.inner.traits, needs=self.inner.traits.needs | {"value_out_l1"})

    def protect(self, budget: int) -> Protection:
        return self.inner.protect(budget)

    def observe(self, step: Step, score: Tensor) -> Tensor:
        base = self.inner.observe(step, self._before(step, score))
        step.memory["criticalkv"] = base
        if not step.compresses:
            return base
        free = step.visible & ~protected(self.inner, step)
        lowest = base.masked_fill(~free, torch.inf).amin(-1, keepdim=True).clamp(max=0)
        norms = step.signals["value_out_l1"]
        norms = norms.mean(2, keepdim=True) if base.shape[2] == 1 else norms
        second = ((base - lowest + self.epsilon) * norms.to(base.dtype)).masked_fill(~free, 0)
        left = (step.budget.double() * self.first).long()[..., None] - (step.visible & ~free).sum(-1, keepdim=True)
        highest = second.amax(-1, keepdim=True) + 1
        return torch.where(places_from_the_top(base, free) < left, highest, second)

    @staticmethod
    def _before(step: Step, score: Tensor) -> Tensor:
        """Return the base's own scores of the previous step, and 0 for the new key."""
        before = step.memory.get("criticalkv")
        return score if before is None else torch.cat([before, torch.zeros_like(score[..., :1])], -1)


def places_from_the_top(score: Tensor, among: Tensor) -> Tensor:
    """Return how many keys of `among` score higher than each, or as high and are newer, int64 ``[R, L, S, n]``."""
    order = score.masked_fill(~among, -torch.inf).argsort(dim=-1, stable=True)  # the older of equals first
    return score.shape[-1] - 1 - order.argsort(-1)


def protected(policy: Policy, step: Step) -> Tensor:
    """Return which keys a policy protects in each run, bool ``[R, 1, 1, n]``."""
    position = torch.arange(step.t + 1, device=step.budget.device)
    runs = []
    for budget in step.budgets:
        kept = policy.protect(budget)
        sinks = max(kept.sinks, step.prompt) if kept.prompt else kept.sinks
        runs.append((position < sinks) | (position > step.t - kept.recent))
    return torch.stack(runs)[:, None, None]


def _refusal(base: Policy) -> str | None:
    """Return why a policy cannot be a base, or None."""
    traits = base.traits
    if isinstance(base, CriticalKV):
        return "it divides the budget itself"
    if traits.reads:
        return "it reads a part of the cache and evicts nothing"
    if traits.clairvoyant:
        return "it is a bound"
    if traits.published:
        return "it reproduces published code"
    return None if traits.bounded and traits.phase != "none" else "it holds to no budget"
