"""Ada-KV: SnapKV with the budget of a layer allocated to its heads by their attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvscope.policies.base import parameter, policy
from kvscope.policies.citation import Citation
from kvscope.policies.snapkv import Pooling, SnapKV


@policy("ada-kv")
@dataclass(frozen=True)
class AdaKV(SnapKV):
    """Retain the keys that the last rows of the prompt attend to; heads with concentrated attention get less budget.

    The score is SnapKV's with the defaults of FFY0/AdaKV (window 32, max pooling over 7); the budget is divided as by
    ``--allocate ada``. arXiv:2407.11550, algorithm 1; code FFY0/AdaKV, which uses the mean over the window instead of
    the sum. Both give the same order of keys.

    >>> from kvscope.replay.example import held
    >>> rows = [[1], [.5, .5], [.6, .1, .3], [.1, .5, .2, .2]]
    >>> held("ada-kv:window=1,kernel=1", rows, budget=2, prompt=4)[-1]  # one head: as snapkv
    [1, 3]
    """

    allocate: ClassVar[str] = "ada"
    formula: ClassVar[str] = (
        "S[j] = pool(sum of w_q[j] over the last `window` rows); the layer's largest S receive its budget"
    )
    paper: ClassVar[str] = "arXiv:2407.11550 algorithm 1"
    citation: ClassVar[Citation] = Citation(
        key="feng2025adakv",
        title="Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference",
        authors="Feng, Yuan and Lv, Junlin and Cao, Yukun and Xie, Xike and Zhou, S. Kevin",
        booktitle="Advances in Neural Information Processing Systems",
        year=2025,
        arxiv="2407.11550",
    )
    proven: ClassVar[str] = "authors' decisions"

    window: int = parameter(
        32, "last rows of the prompt, which give the scores; their keys are protected; at most half of the budget"
    )
    kernel: int = parameter(7, "width of the pooling over neighbouring keys, an odd number")
    pooling: Pooling = parameter("max", "kind of pooling: avg, max or none")
