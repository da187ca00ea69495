"""R-KV: attention of the last queries, minus redundancy among the keys."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kvscope.core.errors import UsageError
from kvscope.policies.base import Policy, Protection, Step, at_least, parameter, policy
from kvscope.policies.cache import at, without_gaps
from kvscope.policies.citation import Citation

BLOCK = 2**24  # numbers in one block of cosines between keys


@policy("r-kv")
@dataclass(frozen=True)
class RKV(Policy):
    """Retain the keys that the last queries attend to and that no other key resembles, and the newest `window`.

    ``score = mix_lambda * attention - (1 - mix_lambda) * redundancy``.

    Attention: each of the last `window` queries has logits on the keys before the window, divided by the root of the
    head size; of the query heads of a group, the largest logit counts. A softmax turns them into weights, which are
    averaged over the queries and max-pooled over `pooling` retained neighbours.

    Redundancy: ``c_ij`` are the cosines of all retained keys. ``c_ii`` is excluded, and for each ``i`` the newest ``j``
    with ``c_ij > similar``. The mean of the others over ``i``, passed through a softmax over ``j``, is the redundancy
    of key ``j``.

    It evicts at the end of the prompt and then every 128 steps; in between the cache grows beyond its budget. The
    window is at most half of the budget. arXiv:2505.24133, section 3; code Zefan-Cai/R-KV, ``r1_kv.py``. If a key
    resembles no other, that code excludes ``c_i0``; here nothing is excluded. It counts all tokens, those of the prompt
    included, and evicts after the query at position 128, 256 and so on. Here the 128 steps are counted from the end of
    the prompt, so decisions are the same only if the prompt has 1, 129, 257 ... tokens. After its first eviction it
    stores keys in the order of their scores, so it pools over other neighbours; here keys remain in the order of their
    positions. As in that code, the logits equal the model's only if the model scales by the root of the head size.

    Example: budget 3, so a window of one key. Keys 0 and 1 are equal, so each makes the other redundant. Key 2
    resembles only key 3, which is not counted. Of keys 0 and 1 the older is evicted.

    >>> from kvscope.replay.example import held
    >>> keys, queries = [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.6, 0.8]], [[0.0, 0.1]] * 4
    >>> held(RKV(), [[1.0], [0.5] * 2, [0.3] * 3, [0.25] * 4], budget=3, prompt=4, keys=keys, queries=queries)[-1]
    [1, 2, 3]
    """

    needs = frozenset({"keys", "queries"})
    phase = "every:128"
    formula = "S[j] = mix_lambda * attention[j] - (1 - mix_lambda) * redundancy[j]"
    paper = "arXiv:2505.24133 section 3"
    citation = Citation(
        key="cai2025rkv",
        title="R-KV: Redundancy-aware KV Cache Compression for Reasoning Models",
        authors=(
            "Cai, Zefan and Xiao, Wen and Sun, Hanshi and Luo, Cheng and Zhang, Yikai and Wan, Ke and Li, Yucheng and"
            " Zhou, Yeyang and Chang, Li-Wen and Gu, Jiuxiang and Dong, Zhen and Anandkumar, Anima and Asi, "
            "Abedelkadir and Hu, Junjie"
        ),
        booktitle="Advances in Neural Information Processing Systems",
        year=2025,
        arxiv="2505.24133",
    )
    proven = "authors' decisions"

    window: int = parameter(8, "newest keys, never evicted, whose queries count; at most half of the budget")
    mix_lambda: float = parameter(0.07, "share of attention in the score; the rest is redundancy")
    pooling: int = parameter(7, "width of the max-pooling of attention, odd; 1: none")
    similar: float = parameter(0.5, "cosine above which keys count as similar")

    def __post_init__(self) -> None:
        at_least("window", self.window, 1)
        at_least("mix_lambda", self.mix_lambda, 0, 1)
        at_least("similar", self.similar, -1, 1)
        at_least("pooling", self.pooling, 1)
        if self.pooling % 2 == 0:
            raise UsageError(f"pooling={self.pooling} is even", "pooling must be odd: a key in the middle.")

    def protect(self, budget: int) -> Protection:
        return Protection(recent=min(self.window, budget // 2))

    def observe(self, step: Step, score: Tensor) -> Tensor:
        queries = self._remember(step)
        if not (step.compresses and step.exceeds):
            return score
        place, there = without_gaps(step.visible, step.most_visible)
        # In double: the order in which a product adds must decide nothing.
        keys = at(place, step.signals["keys"].double())
        attention = self._attention(step, queries.double(), keys, there, place)
        mixed = self.mix_lambda * attention - (1 - self.mix_lambda) * redundancy(keys, there, self.similar)
        return score.scatter(-1, place, torch.where(there, mixed, 0).to(score.dtype))

    def _remember(self, step: Step) -> Tensor:
        """Return the last `window` queries, newest first, ``[., L, H, window or fewer, D]``, and keep them."""
        newest = step.signals["queries"][..., None, :]
        older = step.memory.get("queries")
        queries = newest if older is None else torch.cat([newest, older[..., : self.window - 1, :]], -2)
        step.memory["queries"] = queries
        return queries

    def _attention(self, step: Step, queries: Tensor, keys: Tensor, there: Tensor, place: Tensor) -> Tensor:
        """Return the pooled attention of the last queries on the keys before the window, ``[R, L, G, m]``."""
        runs, layers, _, count, size = queries.shape
        grouped = queries.reshape(runs, layers, step.kv_heads, -1, count, size)
        logits = (grouped @ keys[:, :, :, None].transpose(-1, -2)).amax(3) / math.sqrt(size)  # [R, L, G, count, m]
        window = (step.budget // 2).clamp(max=self.window)[..., None]  # [R, L, G, 1]
        before = there & (place <= step.t - window)
        weights = logits.masked_fill(~before[..., None, :], -torch.inf).softmax(-1)
        counted = torch.arange(count, device=window.device) < window.clamp(min=1)
        mean = (weights * counted[..., None]).sum(-2) / counted.sum(-1, keepdim=True)
        mean = mean.masked_fill(~before, -torch.inf)
        pooled = functional.max_pool1d(mean.flatten(0, 2), self.pooling, stride=1, padding=self.pooling // 2)
        return pooled.view_as(mean).masked_fill(~before, 0)


def redundancy(keys: Tensor, there: Tensor, similar: float) -> Tensor:
    """Return how much each key resembles the others, ``[R, L, G, m]``, summing to one over the keys that are `there`.

    Cosines are made a block of keys at a time: memory does not grow with the square of their number.
    """
    unit = functional.normalize(keys, dim=-1) * there[..., None]
    total = (unit @ unit.sum(-2)[..., None])[..., 0] - (unit * unit).sum(-1)  # of each column, without the diagonal
    m = unit.shape[-2]
    column = torch.arange(m, device=keys.device)
    rows = max(1, BLOCK // max(1, unit[..., 0].numel()))
    for start in range(0, m, rows):
        block = unit[..., start : start + rows, :] @ unit.transpose(-1, -2)
        alike = (block > similar) & there[..., None, :] & there[..., start : start + rows, None]
        alike &= column != column[start : start + rows, None]
        newest = torch.where(alike, column, -1).amax(-1, keepdim=True)
        value = block.gather(-1, newest.clamp(min=0)).masked_fill(newest < 0, 0)
        total = total.scatter_add(-1, newest.clamp(min=0)[..., 0], -value[..., 0])
    mean = total / there.sum(-1, keepdim=True).clamp(min=1)
    return mean.masked_fill(~there, -torch.inf).softmax(-1)
