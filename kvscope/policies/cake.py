"""CAKE: keys whose weight is large or varies, and more budget for layers that spread their attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvscope.policies.base import GroupReduction, Policy, Protection, Step, at_least, parameter, policy
from kvscope.policies.citation import Citation
from kvscope.policies.grouped_scores import GROUP_HELP, REDUCE_HELP, Reduce
from kvscope.policies.history import History
from kvscope.policies.snapkv import Pooling, odd, pooled, voting


@policy("cake")
@dataclass(frozen=True)
class CAKE(Policy):
    """Retain the keys with a large or varying weight in the last rows of the prompt; later, in the newest row.

    At the end of the prompt each query head scores key ``j`` by ``mean + gamma * variance`` of its weights in the last
    `window` rows. At later steps the score is the weight in the newest row. Scores are pooled over `kernel` neighbours,
    and `group` reduces those of the query heads of a group to one. With ``reduce=rows`` the rows of the query heads are
    reduced before anything else. The newest `window` keys are protected (at most half of the budget). The budget is
    allocated as by ``--allocate cake``.

    arXiv:2503.12491, sections 4.1 and 4.2; code antgroup/cakekv. As in that code, the variance divides by one row less.
    That code evicts nothing from a prompt of up to ``B + window`` keys; here the budget is `B`. After the prompt it
    pools over keys in the order in which it stores them, by score; here neighbours are those in the text.

    >>> from kvscope.replay.example import held
    >>> rows = [[1], [.5, .5], [.3, .3, .4], [.3, .1, .5, .1], [.3, .4, .1, .1, .1]]
    >>> held("cake:window=2,kernel=1,gamma=10", rows, budget=4, prompt=5)[-1]  # the weights of keys 1 and 2 vary
    [1, 2, 3, 4]
    """

    allocate: ClassVar[str] = "cake"
    prefills: ClassVar[frozenset[str]] = frozenset({"full"})
    formula: ClassVar[str] = "S[j] = pool(mean of w_q[j] + gamma * variance of w_q[j], over the last `window` rows)"
    paper: ClassVar[str] = "arXiv:2503.12491 sections 4.1, 4.2"
    citation: ClassVar[Citation] = Citation(
        key="qin2025cake",
        title="CAKE: Cascading and Adaptive KV Cache Eviction with Layer Preferences",
        authors=(
            "Qin, Ziran and Cao, Yuchen and Lin, Mingbao and Hu, Wen and Fan, Shixuan and Cheng, Ke and Lin, Weiyao "
            "and Li, Jianguo"
        ),
        booktitle="International Conference on Learning Representations",
        year=2025,
        arxiv="2503.12491",
    )
    proven: ClassVar[str] = "authors' decisions"

    window: int = parameter(
        32, "last rows of the prompt, which give the scores; their keys are protected; at most half of the budget"
    )
    gamma: float = parameter(200.0, "factor of the variance, which is added to the mean")
    kernel: int = parameter(5, "width of the pooling over neighbouring keys, an odd number")
    pooling: Pooling = parameter("avg", "kind of pooling: avg, max or none")
    group: GroupReduction = parameter("mean", GROUP_HELP)
    reduce: Reduce = parameter("scores", REDUCE_HELP)

    def __post_init__(self) -> None:
        at_least("window", self.window, 1)
        at_least("gamma", self.gamma, 0)
        odd("kernel", self.kernel)

    def protect(self, budget: int) -> Protection:
        return Protection(recent=min(self.window, budget // 2))

    def observe(self, step: Step, score: Tensor) -> Tensor:
        rows = step.head_weights() if self.reduce == "scores" else step.weights(self.group)
        history = History.of(step.memory, "rows", self.window)
        if step.t < step.prompt:
            history.push(rows)
        if not step.compresses:
            return score
        used = voting(self, step)
        votes = rows if step.t >= step.prompt else self._votes(history.rows, used)
        if self.reduce == "rows":
            return pooled(votes, step, step.visible, used, self.kernel, self.pooling)
        if self.pooling != "max" and self.group != "max":  # pooling and reducing are linear: one of each is cheaper
            return pooled(step.grouped(votes, self.group), step, step.visible, used, self.kernel, self.pooling)
        return step.grouped(pooled(votes, step, step.visible_to_heads(), used, self.kernel, self.pooling), self.group)

    def _votes(self, rows: Tensor, used: Tensor) -> Tensor:
        """Return mean and variance of the newest `used` of the rows ``[R, L, H, w, n]`` as one score."""
        newest = torch.arange(rows.shape[-2], 0, -1, device=rows.device) <= used[:, None]  # [R, w]
        count = newest.sum(-1)[:, None, None, None]
        newest = newest[:, None, None, :, None]
        mean = (rows * newest).sum(-2, dtype=torch.float64) / count.clamp(min=1)
        deviations = (rows - mean[..., None, :]) * newest
        votes = mean + self.gamma * (deviations**2).sum(-2) / (count - 1).clamp(min=1)
        return votes.to(rows.dtype)
