"""DuoAttention: retrieval heads hold every key, streaming heads the first and the newest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvscope.policies.base import Policy, Step, Traits, at_least, parameter, policy
from kvscope.policies.citation import Citation
from kvscope.policies.head_scores import head_scores
from kvscope.policies.history import History

OBSERVED = "observed"


@policy("duo-attention")
@dataclass(frozen=True)
class DuoAttention(Policy):
    """Retain every key in retrieval heads, and the first and the newest keys in streaming heads.

    The labels are from a file of scores (`heads`): a head whose score is at least `threshold` is a retrieval head; with
    `sparsity`, a head whose score is at least that quantile of all scores, so that this share of the heads are
    streaming heads. arXiv:2410.10819; code mit-han-lab/duo-attention, whose ``full_attention_heads.tsv`` for
    published models are such files. The labels determine how many keys are held; the budget is ignored. That code
    breaks ties of scores at random; here heads with equal scores have the same label.

    In that code, scores are learned for one model. ``heads=observed`` is ours and computes them from the prompt: the
    weight that the last `rows` rows of the prompt give to keys that are neither among the first `sinks` nor among the
    `recent` newest before their query, averaged over rows and the query heads of a group. The head of a file that
    holds scores of query heads has their mean. With ``observed``, `sparsity` is the share in each layer.

    >>> from kvscope.replay.example import held
    >>> rows = [[1], [.5, .5], [.6, .1, .3], [.3, .1, .3, .3], [.2, .2, .2, .2, .2]]
    >>> held("duo-attention:sinks=1,recent=1,rows=1,threshold=0.5", rows, budget=9, prompt=4)[-1]  # .4 on keys 1 and 2
    [0, 4]
    """

    bounded = False
    prefills = frozenset({"full", "stream"})
    formula = "every key where the head's score is at least `threshold`; elsewhere sinks and recent keys"
    paper = "arXiv:2410.10819"
    citation = Citation(
        key="xiao2025duoattention",
        title="DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads",
        authors=(
            "Xiao, Guangxuan and Tang, Jiaming and Zuo, Jingwei and Guo, Junxian and Yang, Shang and Tang, Haotian"
            " and Fu, Yao and Han, Song"
        ),
        booktitle="International Conference on Learning Representations",
        year=2025,
        arxiv="2410.10819",
    )
    proven = "authors' code, read"

    heads: str = parameter(
        OBSERVED, "file of head scores (kvscope heads writes one), or observed: from the rows of the prompt"
    )
    threshold: float = parameter(0.5, "smallest score with which a head holds every key", search=(0.1, 0.3, 0.5))
    sparsity: float | None = parameter(None, "share of streaming heads, from 0 to 1, instead of the threshold")
    sinks: int = parameter(128, "first keys that streaming heads hold")
    recent: int = parameter(256, "newest keys that streaming heads hold")
    rows: int = parameter(32, "heads=observed: rows at the end of the prompt that are averaged")

    def __post_init__(self) -> None:
        for name, low in (("sinks", 0), ("recent", 1), ("rows", 1)):
            at_least(name, getattr(self, name), low)
        if self.sparsity is not None:
            at_least("sparsity", self.sparsity, 0, 1)

    @property
    def traits(self) -> Traits:
        if self.heads == OBSERVED:
            return self.with_traits(prefills=frozenset({"full"}))
        return self.with_traits(needs=frozenset())

    def fit(self, layers: Sequence[int], kv_heads: int, n_layers: int) -> None:
        if self.heads != OBSERVED:
            head_scores(self.heads, n_layers, kv_heads)

    def observe(self, step: Step, score: Tensor) -> Tensor:
        if self.heads == OBSERVED and step.t < step.prompt:
            self._observe_prompt(step)
        if not step.compresses:
            return score
        if "streaming" not in step.memory:
            step.memory["streaming"] = self._streaming(step)  # bool [R or 1, L, G]
        key = torch.arange(step.t + 1, device=score.device)
        between = (key >= self.sinks) & (key <= step.t - self.recent)
        gone = step.memory["streaming"][..., None] & between
        return torch.zeros_like(score).masked_fill_(gone.expand(score.shape), -torch.inf)

    def _observe_prompt(self, step: Step) -> None:
        key = torch.arange(step.t + 1, device=step.visible.device)
        between = (key >= self.sinks) & (key <= step.t - self.recent)
        mass = (step.weights().double() * between).sum(-1, keepdim=True)  # [R, L, G, 1]
        History.of(step.memory, "mass", self.rows).push(mass)

    def _streaming(self, step: Step) -> Tensor:
        """Return which heads stream, bool ``[R, L, G]`` or ``[1, L, G]``."""
        if self.heads == OBSERVED:
            history = History.of(step.memory, "mass", self.rows)
            scores = history.sum[..., 0] / history.count
            return scores < self._cut(scores)
        scores = head_scores(self.heads, step.n_layers, step.visible.shape[2]).flatten()  # of the whole model
        streams = (scores < self._cut(scores)).view(step.n_layers, -1)
        return streams.to(step.visible.device)[None, list(step.places)]

    def _cut(self, scores: Tensor) -> Tensor | float:
        """Return the lowest score of a retrieval head."""
        if self.sparsity is None:
            return self.threshold
        if self.sparsity in (0, 1):
            return torch.inf if self.sparsity else -torch.inf
        return torch.quantile(scores, self.sparsity, dim=-1, keepdim=True)
