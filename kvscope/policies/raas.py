"""RaaS: pages of keys by the last time that a query used them; the prompt stays."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kvscope.policies.base import GroupReduction, Policy, Step, at_least, parameter, policy
from kvscope.policies.citation import Citation


@policy("raas")
@dataclass(frozen=True)
class RaaS(Policy):
    """Retain the prompt, and the most recently used pages of the later keys.

    Page ``i`` holds the keys at positions ``i * page`` to ``(i + 1) * page - 1``; its weight is the largest weight of
    its keys. A query uses the pages whose weight exceeds `alpha`. With `share` it uses that share of the visible pages
    instead, those with the largest weights, rounded up. A page also counts as used when a key arrives in it. Score of a
    key: the last step at which its page was used.

    arXiv:2502.11147, whose pages have 16 keys; the authors' code is not public. In the paper the weight of a page is
    estimated from a representative key, as in Quest; here it is the largest true weight. Of a page the oldest keys are
    evicted first, so that the budget is kept exactly. The prompt counts in the budget. The paper has no rule for a
    prompt that leaves no room for a generated key. Then keys of the prompt are ranked like all others, and the rows of
    the prompt count as well. With ``keep_prompt=False`` this is always so.

    >>> from kvscope.replay.example import held
    >>> rows = [[1], [.5, .5], [.4, .3, .3], [.3, .1, .4, .2], [.2, .1, .1, .4, .2]]
    >>> held("raas:page=1,alpha=0.15", rows, budget=3, prompt=1)[3:]  # row 3 uses 2, row 4 uses 3: key 1 goes, then 2
    [[0, 2, 3], [0, 3, 4]]
    """

    formula = "S[j] = last step whose weight on the page of j exceeds alpha"
    paper = "arXiv:2502.11147"
    citation = Citation(
        key="hu2025raas",
        title="RaaS: Reasoning-Aware Attention Sparsity for Efficient LLM Reasoning",
        authors=(
            "Hu, Junhao and Huang, Wenrui and Wang, Weidong and Li, Zhenwen and Hu, Tiancheng and Liu, Zhixia"
            " and Chen, Xusheng and Xie, Tao and Shan, Yizhou"
        ),
        booktitle="Findings of the Association for Computational Linguistics: ACL 2025",
        year=2025,
        pages="2577--2590",
        arxiv="2502.11147",
    )
    proven = "paper"

    page: int = parameter(16, "number of keys in a page", search=(1, 16))
    alpha: float = parameter(0.0001, "weight above which a page is used", search=(0.0001, 0.001, 0.01))
    share: float | None = parameter(None, "share of the visible pages that a query uses, from 0 to 1, instead of alpha")
    keep_prompt: bool = parameter(True, "whether the prompt is retained if it is smaller than the budget")
    group: GroupReduction = parameter("mean", "how the query heads of a group are reduced to one: mean, max or sum")

    def __post_init__(self) -> None:
        at_least("page", self.page, 1)
        at_least("alpha", self.alpha, 0)
        if self.share is not None:
            at_least("share", self.share, 0, 1)

    def observe(self, step: Step, score: Tensor) -> Tensor:
        used = self._used(step).repeat_interleave(self.page, -1)[..., : step.t + 1]  # [R, L, S, n]
        score = torch.where(used, step.t, score)
        if not self.keep_prompt or step.t < step.prompt:
            return score
        fits = step.budget > step.prompt  # [R, L, S]
        return torch.cat(
            [score[..., : step.prompt].masked_fill(fits[..., None], torch.inf), score[..., step.prompt :]], -1
        )

    def _used(self, step: Step) -> Tensor:
        """Return which pages this query uses, bool ``[R, L, S, pages]``; the newest one always is."""
        weight = self._paged(step.weights(self.group)).amax(-1)
        if self.share is None:
            used = weight > self.alpha
        else:
            there = self._paged(step.visible.to(weight.dtype)).amax(-1) > 0
            most = torch.ceil(there.sum(-1, keepdim=True) * self.share - 1e-9)  # 0.3 of ten pages is three
            order = weight.masked_fill(~there, -torch.inf).argsort(dim=-1, stable=True)
            pages = order.shape[-1]
            best = torch.arange(pages, device=order.device) >= pages - most
            used = torch.zeros_like(there).scatter(-1, order, best)
        used[..., -1].fill_(True)
        return used

    def _paged(self, values: Tensor) -> Tensor:
        """Return ``[..., n]`` as ``[..., pages, page]``, the last page filled up with zeros."""
        pages = math.ceil(values.shape[-1] / self.page)
        padded = functional.pad(values, (0, pages * self.page - values.shape[-1]))
        return padded.reshape(*values.shape[:-1], pages, self.page)
