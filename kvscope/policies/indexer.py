"""The model's own index: which keys a model with learned sparse attention reads at each step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvscope.policies.base import Policy, Step, policy
from kvscope.policies.citation import Citation


@policy("indexer")
@dataclass(frozen=True)
class Indexer(Policy):
    """Read the keys that the model's own learned index selects for the query, as recorded; hold all keys.

    In DeepSeek-V3.2 and similar models, a small indexer in a layer scores every key for a query, and the query attends
    only to the keys with the highest scores: the recorded rows have no weight on others. The model defines how many
    keys it selects, so a budget has no effect. The current key counts as read even if it is not selected.

    Only a trace of such a model contains the selection. Its rows are over the selected keys, so the retained mass of
    this policy is 1, and that of other policies is the share of what the model itself reads. DeepSeek-V3.2,
    arXiv:2512.02556, section 2.1; the selection is that of the model's code in transformers.

    >>> from kvscope.replay.example import held
    >>> held("indexer", [[1], [0.5, 0.5], [0.4, 0, 0.6], [0, 0.3, 0.7, 0]], budget=4, prompt=1)
    [[0], [0, 1], [0, 2], [1, 2, 3]]
    """

    needs = frozenset({"selection"})
    reads = True
    bounded = False
    formula = "read the keys that the model's index selects for t"
    paper = "the model's own index (arXiv:2512.02556)"
    citation = Citation(
        key="deepseek2025v32",
        title="DeepSeek-V3.2: Pushing the Frontier of Open Large Language Models",
        authors="DeepSeek-AI",
        year=2025,
        arxiv="2512.02556",
    )
    proven = "the model's decisions"

    def read(self, step: Step) -> Tensor:
        chosen = step.signals["selection"].expand(step.visible.shape)[..., :-1]
        return torch.cat([chosen, torch.ones_like(step.visible[..., :1])], -1)

    def observe(self, step: Step, score: Tensor) -> Tensor:
        return score
