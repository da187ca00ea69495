"""VATP: value-aware token pruning. Another policy's attention, times the norm of each key's value."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from kvscope.core.errors import UsageError
from kvscope.policies.base import Policy, Protection, Step, Traits, at_least, parameter, policy
from kvscope.policies.recurrence import Recurrence, recurrence_of
from kvscope.policies.spec import parse_policy

HISTORY, LAST = 400, 10  # of the mask variant over scissorhands: rows of the prompt that count, and newest keys


@policy("vatp")
@dataclass(frozen=True)
class VATP(Policy):
    """Keep what the base policy keeps, had every weight been multiplied by the norm of its key's value.

    The base is given ``w_t[j] * |v_j|`` for ``w_t[j]``; `base` is any policy that reads weights, its own parameters in
    parentheses. It decides when and per what is evicted; what it protects stays, and so do the first `sinks` keys (at
    most a quarter of the budget). Guo et al., arXiv:2406.12335; code guozhiyu/vatp, ``modify_llama.py``.

    ``variant=mask`` is that code, over ``h2o`` or ``scissorhands`` alone: keys are hidden, never dropped, and a query
    sees ``heavy + recent = B`` keys and itself. Over ``h2o`` each is half of ``B``. Over ``scissorhands``, ``recent``
    is 10, and the score is no count: the sum of the prompt's last 400 rows over 400, then each row in full. The first
    `sinks` scores are set to the largest number at the end of the prompt, so sinks beyond ``heavy`` are lost. Of equal
    scores the older key stays, where the code leaves the choice open; a hidden key that scores 0 like a visible one can
    so come back. Code without VATP is ``norm=none,sinks=0``. It knows no grouped heads; here their mean is taken.

    Example: budget 1, row 1 is (.6 .4), and the values' norms are 1 and 2: .6 against .8, so key 0 goes.

    >>> from kvscope.replay.example import held
    >>> held(VATP(base="tova"), [[1.0], [0.6, 0.4]], budget=1, prompt=1, value_l1=[1.0, 2.0])
    [[0], [1]]
    """

    needs = frozenset({"weights", "value_l1"})
    paper = "arXiv:2406.12335"
    proven = "authors' decisions (mask), plain-loop twin"

    base: str = parameter("h2o", "policy whose weights are multiplied, as in a2sf(alpha=0.7)")
    norm: Literal["l1", "l2", "none"] = parameter("l1", "norm of a value; none: the weights as they are")
    sinks: int = parameter(20, "first keys that stay, at most a quarter of the budget")
    variant: Literal["plain", "mask"] = parameter("plain", "mask: the authors' code, over h2o or scissorhands")

    def __post_init__(self) -> None:
        at_least("sinks", self.sinks, 0)
        if self.variant == "mask":
            if self.base not in ("h2o", "scissorhands"):
                raise UsageError(
                    f"vatp: variant=mask does not go over {self.base}", "The authors' code has h2o and scissorhands."
                )
            return
        refusal = _refusal(self.inner)
        if refusal:
            raise UsageError(f"vatp cannot go over {self.base}: {refusal}", "Name a base such as h2o, tova or a2sf.")
        if ".py:" not in self.base:
            object.__setattr__(self, "base", self.inner.label)  # one spelling of one policy

    @cached_property
    def inner(self) -> Policy:
        """The base policy."""
        return parse_policy(self.base)

    @property
    def traits(self) -> Traits:
        norm = frozenset() if self.norm == "none" else frozenset({f"value_{self.norm}"})
        if self.variant == "plain":
            base = self.inner.traits
            return replace(base, needs=base.needs | norm)
        return self.with_traits(
            needs=frozenset({"weights"}) | norm, reads=True, prefills=frozenset({"full"}), published=True
        )

    def protect(self, budget: int) -> Protection:
        if self.variant == "plain":
            kept = self.inner.protect(budget)
            return replace(kept, sinks=max(kept.sinks, min(self.sinks, budget // 4)))
        least = 2 if self.base == "h2o" else LAST + 1
        if budget < least:
            raise UsageError(f"{self.label} has no rule for a budget of {budget}", f"Give it at least {least} keys.")
        return Protection()

    def recurrence(self) -> Recurrence | None:
        base = recurrence_of(self.inner) if self.variant == "plain" else None
        if base is None or self.norm == "none":
            return base
        return replace(base, scale=f"value_{self.norm}") if self.traits.scope == "kv_head" else None

    def observe(self, step: Step, score: Tensor) -> Tensor:
        scaled = replace(step, live=self._scaled(step))
        if self.variant == "plain":
            return self.inner.observe(scaled, score)
        return self._masked(scaled, score)

    def read(self, step: Step) -> Tensor:
        shown: Tensor = step.memory["vatp"]
        return step.visible & torch.nn.functional.pad(shown, (0, 1), value=True)

    def _scaled(self, step: Step) -> Tensor:
        """Return the live row, each weight times the norm of its key's value, ``[R, L, H, n]``."""
        assert step.live is not None
        if self.norm == "none":
            return step.live
        norm = step.signals[f"value_{self.norm}"]  # [., L, G, n]
        return step.live * norm.repeat_interleave(step.live.shape[2] // step.kv_heads, 2)

    def _masked(self, step: Step, score: Tensor) -> Tensor:
        """Return the scores that the authors' code has after the step, and remember what the next query sees."""
        rows, end = step.weights(), step.prompt - 1
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
        shown = ~old | (place < heavy) | (step.t < step.budget[..., None])
        step.memory["vatp"] = shown
        return score  # set to 0 there where hidden; here that changes nothing, since what is above only grows


def _refusal(base: Policy) -> str | None:
    """Return why a policy cannot be a base, or None."""
    traits = base.traits
    if isinstance(base, VATP):
        return "it multiplies weights itself"
    if "weights" not in traits.needs:
        return "it does not read weights"
    if traits.reads:
        return "it reads a part of the cache and evicts nothing"
    return None if traits.bounded else "it holds to no budget"
