"""KVzip: keys of the prompt that the model attends to when it is to repeat the prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvscope.policies.base import Policy, Protection, Step, at_least, parameter, policy
from kvscope.policies.citation import Citation


@policy("kvzip")
@dataclass(frozen=True)
class KVzip(Policy):
    """Retain the keys with the largest weights while the model reads the prompt a second time in order to repeat it.

    Score of key ``j``: the largest weight that any query of the second reading gives it, over the query heads of a
    group. The trace must contain the scores: ``kvscope trace --reread`` reads each prompt twice more, with the full
    cache. Without such a trace, the closed loop reads the prompts again itself (``kvscope perplexity``). The policy
    evicts once, at the end of the prompt. If it must evict later too, it evicts the keys after the prompt last, because
    the second reading does not score them. arXiv:2505.23416; code snu-mllab/KVzip, ``score.py``, and NVIDIA/kvpress,
    ``kvzip_press.py``, whose first keys are never evicted. Here every head has the same budget, as in that code's
    uniform variant, unless ``--allocate`` says otherwise; prompts in a chat template are repeated with it.

    Example: the largest weights of the second reading are .9, .1, .3 and .2.

    >>> from kvscope.replay.example import held
    >>> rows, again = [[1], [0.5] * 2, [0.3] * 3, [0.25] * 4], [0.9, 0.1, 0.3, 0.2]
    >>> held("kvzip:sinks=0", rows, budget=2, prompt=4, reconstruction=again)[-1]
    [0, 2]
    """

    needs = frozenset({"reconstruction"})
    phase = "prefill"
    prefills = frozenset({"full"})
    formula = "S[j] = largest weight on j of the queries that read the prompt again"
    paper = "arXiv:2505.23416"
    citation = Citation(
        key="kim2025kvzip",
        title="KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction",
        authors=("Kim, Jang-Hyun and Kim, Jinuk and Kwon, Sangwoo and Lee, Jae W. and Yun, Sangdoo and Song, Hyun Oh"),
        booktitle="Advances in Neural Information Processing Systems",
        year=2025,
        arxiv="2505.23416",
    )
    proven = "authors' code, read"

    sinks: int = parameter(4, "first keys, which are never evicted")

    def __post_init__(self) -> None:
        at_least("sinks", self.sinks, 0)

    def protect(self, budget: int) -> Protection:
        return Protection(sinks=self.sinks)

    def observe(self, step: Step, score: Tensor) -> Tensor:
        if not step.compresses:
            return score
        later = torch.arange(step.t + 1, device=score.device) >= step.prompt
        # a weight is at most 1
        return torch.where(later, 2.0, step.signals["reconstruction"]).expand(step.visible.shape).to(score.dtype)
