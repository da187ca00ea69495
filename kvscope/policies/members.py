"""Two policies in one: what they may be, what they need together, and how each scores the keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from kvscope.core.errors import UsageError
from kvscope.policies.base import Policy, Protection, Step, Traits, parameter
from kvscope.policies.nested import require_nested
from kvscope.policies.own import observe_of
from kvscope.policies.spec import parse_policy


@dataclass(frozen=True)
class Members(Policy):
    """A policy made of two others, `a` and `b`, each a policy with its settings: ``h2o``, ``a2sf(alpha=0.7)``.

    Both observe every step of the cache that their common decisions leave. Protected are the larger numbers of first
    and of last keys, and the prompt if either protects it. The signals are those of both; a decision is that of a
    layer if both decide per layer, otherwise each key/value head decides, and a member that decides per layer scores
    the keys that any head of the layer holds. The allocation is theirs if it is the same, otherwise uniform.
    """

    positional: ClassVar[tuple[str, ...]] = ("a", "b")

    a: str = parameter("h2o", "first policy, such as a2sf(alpha=0.7)")
    b: str = parameter("tova", "second policy")

    def __post_init__(self) -> None:
        for name, member in zip(self.positional, self.members, strict=True):
            todo = "Use policies that evict under a budget, such as h2o, tova, streaming-llm or snapkv."
            require_nested(self, name, member, self.refusal(member), todo)
        first, second = self._evicting[0].traits, self._evicting[-1].traits
        if first.phase != second.phase or not first.prefills & second.prefills:
            raise UsageError(
                f"{self.name} cannot use {self.a} with {self.b}: they evict at different times",
                f"Use two that evict at the same time: {first.phase} is not {second.phase}, see kvscope policies.",
            )

    @cached_property
    def members(self) -> tuple[Policy, Policy]:
        """The two policies."""
        return parse_policy(self.a), parse_policy(self.b)

    @property
    def _evicting(self) -> list[Policy]:
        return [member for member in self.members if member.traits.phase != "none"]

    def refusal(self, member: Policy) -> str | None:
        """Return why a policy cannot be a member, as the end of a sentence, or None."""
        traits = member.traits
        if traits.clairvoyant:
            return "it is a bound, and uses what no cache can have"
        if traits.reads:
            return "it reads a part of the cache and evicts nothing"
        if traits.published:
            return "it reproduces published code with all its steps"
        if traits.phase == "none":
            return "it evicts nothing"
        return None if traits.bounded else "it holds to no budget"

    @property
    def traits(self) -> Traits:
        one, other = (member.traits for member in self.members)
        first, second = self._evicting[0].traits, self._evicting[-1].traits
        return self.with_traits(
            needs=one.needs | other.needs,
            scope="layer" if first.scope == second.scope == "layer" else "kv_head",
            phase=first.phase,
            prefills=first.prefills & second.prefills,
            allocate=first.allocate if first.allocate == second.allocate else "uniform",
        )

    def fit(self, layers: Sequence[int], kv_heads: int, n_layers: int) -> None:
        for member in self.members:
            member.fit(layers, kv_heads, n_layers)

    def protect(self, budget: int) -> Protection:
        one, other = (member.protect(budget) for member in self.members)
        return Protection(max(one.sinks, other.sinks), max(one.recent, other.recent), one.prompt or other.prompt)

    def scores(self, step: Step, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the scores of both members after they have observed the step, ``[R, L, S, n]`` each."""
        one, other = self.members
        return self._score_of("a", one, step, dtype), self._score_of("b", other, step, dtype)

    def _score_of(self, name: str, member: Policy, step: Step, dtype: torch.dtype) -> Tensor:
        memory = step.memory.setdefault(f"member {name}", {"own": {}, "score": None})
        visible, budget = step.visible, step.budget
        if member.traits.scope == "layer" and visible.shape[2] > 1:
            visible, budget = visible.any(2, keepdim=True), budget.amax(2, keepdim=True)
        if memory["score"] is None:
            score = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        else:
            score = functional.pad(memory["score"], (0, step.t + 1 - memory["score"].shape[-1]))
        own = replace(step, visible=visible, budget=budget, memory=memory["own"])
        memory["score"] = observe_of(member)(own, score).expand(visible.shape)
        made: Tensor = memory["score"]
        return made.expand(step.visible.shape)

    def evictable(self, step: Step) -> Tensor:
        """Return which keys a head holds that are not protected, bool ``[R, L, S, n]``."""
        if "ends" not in step.memory:  # remembered, because every copy to a GPU waits for it
            kept = [self.protect(budget) for budget in step.budgets]
            ends = [[max(each.sinks, step.prompt) if each.prompt else each.sinks, each.recent] for each in kept]
            step.memory["ends"] = torch.tensor(ends, device=step.visible.device)[:, None, None, None]
        first, last = step.memory["ends"].unbind(-1)  # [R, 1, 1, 1] each
        key = torch.arange(step.t + 1, device=step.visible.device)
        among: Tensor = step.visible & (key >= first) & (key <= step.t - last)
        return among


def ranked(score: Tensor, among: Tensor) -> Tensor:
    """Return the place of every key in the order of scores, int64 ``[R, L, S, n]``: the last is retained first.

    Only keys that are `among` them are ordered, from ``n`` minus their number to ``n - 1``; of equal scores the older
    key is before the newer one.
    """
    order = score.masked_fill(~among, -torch.inf).argsort(dim=-1, stable=True)
    others_first = among.gather(-1, order).byte().argsort(dim=-1, stable=True)  # a key may have -inf itself
    order = order.gather(-1, others_first)
    place = torch.arange(score.shape[-1], device=score.device).expand(order.shape)
    return torch.empty_like(order).scatter_(-1, order, place)
