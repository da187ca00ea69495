"""TOVA: token omission via attention. The least attended key of the newest row goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from kvscope.policies.base import Group, Policy, Protection, Scope, Step, Traits, at_least, parameter, policy
from kvscope.policies.recurrence import Recurrence


@policy("tova")
@dataclass(frozen=True)
class TOVA(Policy):
    """Keep the keys that the newest query attends to most.

    Score of key ``j``: its weight in row ``t``, averaged over all query heads; one decision per layer.
    arXiv:2401.06104, section 4.2 and algorithm 1; code schwartz-lab-NLP/TOVA, ``tova_cache.py``. Nothing is protected:
    even the current key can go. As in that code a prompt that does not fit is cut once, at its end; the paper's own
    evaluation (appendix E) is streaming prefill. Its compressed positions for long texts are not taken over. Its
    ablations let each head decide (``scope=kv_head``; with grouped heads that is EasyKV's rule in decoding) and protect
    the first keys (`sinks`).

    ``variant=kvpress`` is NVIDIA/kvpress, ``tova_press.py``: the choice is made at the end of the prompt alone, and the
    last key of the prompt always stays.

    Example
    -------
    >>> from kvscope.replay.example import held
    >>> held(TOVA(), [[1], [0.6, 0.4], [0.5, 0.2, 0.3]], 2)
    [[0], [0, 1], [0, 2]]
    """

    paper = "arXiv:2401.06104 section 4.2"
    proven = "authors' decisions, plain-loop twin"

    scope: Scope = parameter("layer", "who decides: layer, all heads as one, or kv_head, each for itself")  # type: ignore[misc]
    sinks: int = parameter(0, "keys at the start that always stay")
    group: Group = parameter("mean", "scope=kv_head: how the query heads of a group become one: mean, max or sum")
    variant: Literal["plain", "kvpress"] = parameter(
        "plain", "plain: at every step; kvpress: at the end of the prompt alone, whose last key stays"
    )

    def __post_init__(self) -> None:
        at_least("sinks", self.sinks, 0)

    @property
    def traits(self) -> Traits:
        if self.variant == "plain":
            return self.with_traits()
        return self.with_traits(phase="prefill", prefills=frozenset({"full"}), published=True)

    def protect(self, budget: int) -> Protection:
        return Protection(sinks=self.sinks, recent=int(self.variant == "kvpress"))

    def recurrence(self) -> Recurrence:
        return Recurrence("mean" if self.scope == "layer" else self.group)

    def observe(self, step: Step, score: Tensor) -> Tensor:
        return step.layer_weights() if self.scope == "layer" else step.weights(self.group)
