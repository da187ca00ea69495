"""HeadKV: SnapKV with a budget for each head, in proportion to how much the head is needed for retrieval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvscope.policies.base import Step, at_least, parameter, policy
from kvscope.policies.citation import Citation
from kvscope.policies.duo_attention import OBSERVED
from kvscope.policies.head_scores import head_scores
from kvscope.policies.snapkv import Pooling, SnapKV


@policy("headkv")
@dataclass(frozen=True)
class HeadKV(SnapKV):
    """Retain the keys that the last rows of the prompt attend to; retrieval heads get more budget than others.

    The score is SnapKV's with window 32 and max pooling over 7. The budget is divided as by ``--allocate heads``: each
    head gives ``b // beta`` of its ``b`` free keys to a pool, which all heads of the model share in proportion to their
    head scores. Head scores come from a file (`heads`), such as the authors publish for two models: the share of
    needles that a head attends to while the model repeats or uses them. ``heads=observed`` is ours and computes them
    from the rows of the prompt. arXiv:2410.19258; code FYYFU/HeadKV, ``ReasonSnapKVCluster``. That code works per query
    head; here scores are averaged over the query heads that share a key/value head.

    >>> from kvscope.replay.example import held
    >>> rows = [[1], [.5, .5], [.6, .1, .3], [.1, .5, .2, .2]]
    >>> held("headkv:window=1,kernel=1", rows, budget=2, prompt=4)[-1]  # one head: as snapkv
    [1, 3]
    """

    allocate: ClassVar[str] = "heads"
    formula: ClassVar[str] = "S[j] = pool(sum of w_q[j] over the last `window` rows); B of a head by its score"
    paper: ClassVar[str] = "arXiv:2410.19258"
    citation: ClassVar[Citation] = Citation(
        key="fu2025headkv",
        title="Not All Heads Matter: A Head-Level KV Cache Compression Method with Integrated Retrieval and Reasoning",
        authors="Fu, Yu and Cai, Zefan and Asi, Abedelkadir and Xiong, Wayne and Dong, Yue and Xiao, Wen",
        booktitle="International Conference on Learning Representations",
        year=2025,
        arxiv="2410.19258",
    )
    proven: ClassVar[str] = "authors' code, read"

    window: int = parameter(
        32, "last rows of the prompt, which give the scores; their keys are protected; at most half of the budget"
    )
    kernel: int = parameter(7, "width of the pooling over neighbouring keys, an odd number")
    pooling: Pooling = parameter("max", "kind of pooling: avg, max or none")
    heads: str = parameter(
        OBSERVED, "file of head scores (kvscope heads writes one), or observed: from the prompt's rows"
    )
    beta: float = parameter(1.2, "each head gives 1/beta of its free keys to the shared pool", search=(1.2, 2, 5))

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("beta", self.beta, 1)

    def fit(self, layers: Sequence[int], kv_heads: int, n_layers: int) -> None:
        if self.heads != OBSERVED:
            head_scores(self.heads, n_layers, kv_heads)

    def observe(self, step: Step, score: Tensor) -> Tensor:
        if "beta" not in step.memory:
            device = step.visible.device
            step.memory["beta"] = torch.tensor([[self.beta]], dtype=torch.float64, device=device)
            if self.heads != OBSERVED:
                scores = head_scores(self.heads, step.n_layers, step.kv_heads)[list(step.places)]
                step.memory["head_scores"] = scores[None].to(device)
        return super().observe(step, score)
