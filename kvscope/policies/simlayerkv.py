"""SimLayerKV: layers that attend to little but sinks and recent keys hold no more than these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvscope.policies.base import Phase, Policy, Scope, Step, at_least, parameter, policy
from kvscope.policies.citation import Citation
from kvscope.policies.history import History


@policy("simlayerkv")
@dataclass(frozen=True)
class SimLayerKV(Policy):
    """Retain the first and the newest keys of the prompt in lazy layers, and everything in the others.

    A layer is lazy if its last `rows` rows of the prompt give more than `threshold` of their weight to the first
    `sinks` and the last `recent` keys of the prompt, on average over rows and query heads. The policy decides once, at
    the end of the prompt, and retains everything that is generated. The text determines how many keys are held; the
    budget is ignored.
    arXiv:2410.13846 (in the prompt); code sail-sg/SimLayerKV. The thresholds there are 0.9 for Llama 3,
    0.65 for Llama 2, 0.8 for Mistral and 0.85 for Qwen.

    The code's other form (in decoding) uses only the row of the first generated token and then evicts the same keys;
    ``rows=1`` uses the row before it. NVIDIA/kvpress, ``SimLayerKVPress``, does not count the rows' own keys in the
    weight that it compares, and retains that many fewer recent keys.

    >>> from kvscope.replay.example import held
    >>> rows = [[1], [.5, .5], [.6, .1, .3], [.6, .1, .1, .2]]
    >>> held("simlayerkv:rows=1,sinks=1,recent=1,threshold=0.7", rows, budget=4, prompt=4)[-1]  # .8 on keys 0 and 3
    [0, 3]
    """

    scope: ClassVar[Scope] = "layer"
    phase: ClassVar[Phase] = "prefill"
    bounded: ClassVar[bool] = False
    prefills: ClassVar[frozenset[str]] = frozenset({"full"})
    formula: ClassVar[str] = "sinks and recent keys alone, where the last rows give them more than `threshold`"
    paper: ClassVar[str] = "arXiv:2410.13846"
    citation: ClassVar[Citation] = Citation(
        key="zhang2024simlayerkv",
        title="SimLayerKV: A Simple Framework for Layer-Level KV Cache Reduction",
        authors="Zhang, Xuan and Du, Cunxiao and Du, Chao and Pang, Tianyu and Gao, Wei and Lin, Min",
        year=2024,
        arxiv="2410.13846",
    )
    proven: ClassVar[str] = "kvpress's decisions"

    threshold: float = parameter(0.9, "weight above which a layer is lazy, from 0 to 1", search=(0.5, 0.65, 0.8, 0.9))
    rows: int = parameter(32, "rows at the end of the prompt that are averaged")
    sinks: int = parameter(4, "first keys that lazy layers retain")
    recent: int = parameter(1024, "newest keys of the prompt that lazy layers retain", search=(64, 256, 1024))

    def __post_init__(self) -> None:
        at_least("threshold", self.threshold, 0, 1)
        at_least("rows", self.rows, 1)
        at_least("sinks", self.sinks, 0)
        at_least("recent", self.recent, 1)

    def observe(self, step: Step, score: Tensor) -> Tensor:
        history = History.of(step.memory, "rows", self.rows)
        history.push(step.layer_weights())
        if not step.compresses:
            return score
        key = torch.arange(step.t + 1, device=score.device)
        dropped = (key >= self.sinks) & (key <= step.t - self.recent)  # [n]
        mass = (history.rows.double() * ~dropped).sum((-2, -1)) / history.count  # [R, L, 1]
        return torch.zeros_like(score).masked_fill_((mass > self.threshold)[..., None] & dropped, -torch.inf)
