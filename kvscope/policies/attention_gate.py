"""Attention-Gate: a small learned module in front of each layer decides which keys to retain."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvscope.policies.base import Policy, Step, Traits, at_least, parameter, policy
from kvscope.policies.citation import Citation


@policy("attention-gate")
@dataclass(frozen=True)
class AttentionGate(Policy):
    """Evict the keys whose learned gates are closed; each layer and key/value head has its own, and there is no budget.

    A gate is ``g = sigmoid(W A(X) + b)``, with ``A`` a reduced multi-head attention over the layer's input ``X``. A key
    is retained if its gate exceeds the threshold of its training plus `margin`; the query at the same position sees it
    in any case. arXiv:2410.12876. There is no public code, and the full text was not available. So we chose what its
    abstract, introduction and reviews do not define: form and sizes of ``A``, threshold, grouped heads, first tokens.

    As published, only keys of the prompt are gated; ``decode=true``, our extension, gates later keys too. With
    streaming prefill only the query at its position sees a key with a closed gate, also inside the prompt, as in the
    paper's mask. With full prefill the prompt's queries see every key, and keys with closed gates are evicted at the
    end of the prompt.

    ``kvscope gate train`` trains a gate for one model; ``gate=demo`` is the gate of the bundled model. The trace must
    contain layer inputs (``kvscope trace --hidden``); any gate of its model can then be replayed over it. There is no
    budget: compare the policy with others that hold as many keys on average, which the summary shows.

    Example
    -------
    The gates of keys 0 and 2 are closed; the prompt has three keys.

    >>> from kvscope.replay.example import held
    >>> shut = {"gate:demo": [-0.2, 0.3, -0.1, -0.4]}
    >>> held(AttentionGate(), [[1], [0.6, 0.4], [0.5, 0.2, 0.3], [0.4, 0.2, 0.2, 0.2]], 9, prompt=3, **shut)
    [[0], [0, 1], [1], [1, 3]]
    """

    bounded = False
    formula = "retain j while sigmoid(W A(X) + b)[j] > threshold + margin"
    paper = "arXiv:2410.12876; our reading of its abstract and reviews"
    citation = Citation(
        key="zeng2024attentiongate",
        title="In-context KV-Cache Eviction for LLMs via Attention-Gate",
        authors="Zeng, Zihao and Lin, Bokai and Hou, Tianqi and Zhang, Hao and Deng, Zhijie",
        year=2024,
        arxiv="2410.12876",
    )
    proven = "paper"

    gate: str = parameter("demo", "file of the gate, or demo for the gate of the bundled model")
    decode: bool = parameter(False, "gate the tokens after the prompt too")
    margin: float = parameter(0.0, "number added to the threshold: above 0 evicts more keys, below 0 fewer")

    def __post_init__(self) -> None:
        at_least("margin", self.margin, -1, 1)

    @property
    def traits(self) -> Traits:
        return self.with_traits(needs=frozenset({self._signal}))

    def observe(self, step: Step, score: Tensor) -> Tensor:
        above = step.signals[self._signal].expand(score.shape)
        shut = above <= self.margin
        if not self.decode:
            shut = shut & (torch.arange(step.t + 1, device=score.device) < step.prompt)
        return torch.where(shut, -torch.inf, above)

    @property
    def _signal(self) -> str:
        return f"gate:{self.gate}"
