"""VATP: value-aware token pruning. The attention that another policy scores, times the norm of each key's value."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from torch import Tensor

from kvscope.policies.base import (
    Policy,
    Protection,
    Recurrence,
    Step,
    Traits,
    at_least,
    parameter,
    policy,
    recurrence_of,
    variant_parameter,
)
from kvscope.policies.citation import Citation
from kvscope.policies.nested import require_nested
from kvscope.policies.spec import parse_policy


@policy("vatp")
@dataclass(frozen=True)
class VATP(Policy):
    """Retain the keys that the base policy retains when each weight is multiplied by the norm of the key's value.

    The base policy observes ``w_t[j] * |v_j|`` in place of ``w_t[j]``. `base` is any policy that reads weights, with
    parameters in parentheses. Phase and scope are those of the base. The keys that the base protects are protected, and
    also the first `sinks` keys (at most a quarter of the budget). Guo et al., arXiv:2406.12335; code guozhiyu/vatp,
    ``modify_llama.py``, which is the variant.

    Example: budget 1. Row 1 is (.6 .4), and the norms of the values are 1 and 2. The scores are .6 and .8, so key 0 is
    evicted.

    >>> from kvscope.replay.example import held
    >>> held(VATP(base="tova"), [[1.0], [0.6, 0.4]], budget=1, prompt=1, value_l1=[1.0, 2.0])
    [[0], [1]]
    """

    needs = frozenset({"weights", "value_l1"})
    formula = "S[j] = the score of `base` with w_t[j] * |v_j|_1 in place of w_t[j]"
    paper = "arXiv:2406.12335"
    citation = Citation(
        key="guo2024vatp",
        title=(
            "Attention Score is not All You Need for Token Importance Indicator in KV Cache Reduction: Value Also "
            "Matters"
        ),
        authors="Guo, Zhiyu and Kamigaito, Hidetaka and Watanabe, Taro",
        booktitle="Proceedings of the 2024 Conference on Empirical Methods in Natural Language Processing",
        year=2024,
        arxiv="2406.12335",
        doi="10.18653/v1/2024.emnlp-main.1178",
    )
    proven = "paper"

    base: str = parameter("h2o", "policy whose weights are multiplied, such as a2sf(alpha=0.7)")
    norm: Literal["l1", "l2", "none"] = parameter("l1", "norm of a value; none: unchanged weights")
    sinks: int = parameter(20, "first keys that are never evicted, at most a quarter of the budget")
    variant: str = variant_parameter()

    def __post_init__(self) -> None:
        at_least("sinks", self.sinks, 0)
        require_nested(self, "base", self.inner, _refusal(self.inner), "Use a base such as h2o, tova or a2sf.")

    @cached_property
    def inner(self) -> Policy:
        """The base policy."""
        return parse_policy(self.base)

    @property
    def traits(self) -> Traits:
        return replace(self.inner.traits, needs=self.inner.traits.needs | norm_signal(self.norm))

    def protect(self, budget: int) -> Protection:
        base = self.inner.protect(budget)
        return replace(base, sinks=max(base.sinks, min(self.sinks, budget // 4)))

    def recurrence(self) -> Recurrence | None:
        base = recurrence_of(self.inner)
        if base is None or self.norm == "none":
            return base
        return replace(base, scale=f"value_{self.norm}") if self.traits.scope == "kv_head" else None

    def observe(self, step: Step, score: Tensor) -> Tensor:
        return self.inner.observe(scaled_by_values(step, self.norm), score)


def norm_signal(norm: str) -> frozenset[str]:
    """Return the signal that holds the norms of the values, as what a policy needs; nothing for ``none``."""
    return frozenset() if norm == "none" else frozenset({f"value_{norm}"})


def scaled_by_values(step: Step, norm: str) -> Step:
    """Return the step with each weight of the live row multiplied by the norm of its key's value."""
    if norm == "none":
        return step
    assert step.live is not None
    norms = step.signals[f"value_{norm}"]  # [., L, G, n]
    return replace(step, live=step.live * norms.repeat_interleave(step.live.shape[2] // step.kv_heads, 2))


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
