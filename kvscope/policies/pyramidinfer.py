"""PyramidInfer: the keys that recent rows agree on, fewer of them from layer to layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvscope.policies.base import Phase, Policy, Protection, Scope, Step, at_least, parameter, policy
from kvscope.policies.citation import Citation
from kvscope.policies.history import History
from kvscope.policies.snapkv import voting


@policy("pyramidinfer")
@dataclass(frozen=True)
class PyramidInfer(Policy):
    """Retain recent and first keys, and those that recent rows of the prompt attend to; fewer in deeper layers.

    Score of key ``j``: a weighted sum of its weights over the recent rows, averaged over the query heads of the layer.
    The oldest row counts once, the newest `distance` times, and those between in equal steps. The recent keys, which
    are a share `recent` of the budget and one more, and the first `sinks` are protected. The budget is allocated as by
    ``--allocate decay``.

    arXiv:2405.12532; code mutonix/pyramidinfer, with the settings of its ``llama2_7b.json``. In that code `recent` is a
    share of the prompt, and a token that is evicted in one layer is not computed in the later ones. Here each layer
    selects among all keys of the prompt. That code also evicts after the prompt, 16 tokens at a time. This is not
    reproduced: what is generated is retained. Recent keys are at most half of the budget, sinks at most a quarter.

    >>> from kvscope.replay.example import held
    >>> rows = [[1], [.5, .5], [.6, .1, .3], [.1, .3, .4, .2]]
    >>> held("pyramidinfer:recent=0", rows, budget=2, prompt=4)[-1]  # the newest row votes, its key is protected
    [2, 3]
    """

    scope: ClassVar[Scope] = "layer"
    phase: ClassVar[Phase] = "prefill"
    allocate: ClassVar[str] = "decay"
    prefills: ClassVar[frozenset[str]] = frozenset({"full"})
    formula: ClassVar[str] = "S[j] = sum of a_q * w_q[j] over the recent rows, with a_q from 1 to `distance`"
    paper: ClassVar[str] = "arXiv:2405.12532"
    citation: ClassVar[Citation] = Citation(
        key="yang2024pyramidinfer",
        title="PyramidInfer: Pyramid KV Cache Compression for High-throughput LLM Inference",
        authors="Yang, Dongjie and Han, XiaoDong and Gao, Yan and Hu, Yao and Zhang, Shilin and Zhao, Hai",
        booktitle="Findings of the Association for Computational Linguistics: ACL 2024",
        year=2024,
        arxiv="2405.12532",
    )
    proven: ClassVar[str] = "authors' code, read"

    recent: float = parameter(0.2, "share of the budget for recent keys, whose rows are summed; at most 0.5")
    distance: float = parameter(1.2, "weight of the newest row; the oldest recent row has weight 1")
    sinks: int = parameter(4, "first keys that are never evicted, at most a quarter of the budget")

    def __post_init__(self) -> None:
        at_least("recent", self.recent, 0, 0.5)
        at_least("distance", self.distance, 0)
        at_least("sinks", self.sinks, 0)

    def protect(self, budget: int) -> Protection:
        return Protection(min(self.sinks, budget // 4), min(int(budget * self.recent) + 1, budget // 2))

    def observe(self, step: Step, score: Tensor) -> Tensor:
        most = max(1, *(self.protect(budget).recent for budget in step.budgets))
        history = History.of(step.memory, "rows", most)
        history.push(step.layer_weights())
        if not step.compresses:
            return score
        rows, used = history.rows, voting(self, step)[:, None]  # [R, L, 1, w, n], [R, 1]
        age = torch.arange(rows.shape[-2] - 1, -1, -1, device=rows.device)  # 0 for the newest
        counts = self.distance + (1 - self.distance) * age / (used - 1).clamp(min=1)
        counts = torch.where(age < used, counts.double(), 0.0)[:, None, None, :, None]  # [R, 1, 1, w, 1]
        return (rows * counts).sum(-2).to(score.dtype)
