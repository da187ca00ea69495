"""SnapKV: the keys that the end of the prompt attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from kvscope.policies.base import GroupReduction, Phase, Policy, Protection, Step, at_least, parameter, policy
from kvscope.policies.cache import without_gaps
from kvscope.policies.citation import Citation
from kvscope.policies.grouped_scores import GROUP_HELP, REDUCE_HELP, Reduce
from kvscope.policies.history import History

Pooling = Literal["avg", "max", "none"]


@policy("snapkv")
@dataclass(frozen=True)
class SnapKV(Policy):
    """Retain the keys that the last rows of the prompt attend to, with their neighbours, and the last keys.

    Score of key ``j``: the sum of its weights over the last `window` rows, pooled over `kernel` neighbouring keys; the
    keys of the window are protected and not pooled. arXiv:2404.14469, section 4.2; code FasterDecoding/SnapKV, class
    ``SnapKVCluster`` and its defaults. That code scores query heads. Here a group is reduced as in
    Zefan-Cai/KVCache-Factory, ``_grouped_window_attn_cache``: the weights of each query head are summed over the
    window, then the heads become one, then the sums are pooled. ``reduce=rows`` reduces each row before it is summed;
    the result differs only for ``max``. The window is at most half of the budget. Pooled scores tie often: here the
    older key is evicted; in the code that depends on its sort.

    >>> from kvscope.replay.example import held
    >>> rows = [[1], [.5, .5], [.6, .1, .3], [.1, .5, .2, .2]]
    >>> held("snapkv:window=1,pooling=none", rows, budget=2, prompt=4)[-1]
    [1, 3]
    """

    phase: ClassVar[Phase] = "prefill"
    prefills: ClassVar[frozenset[str]] = frozenset({"full"})
    formula: ClassVar[str] = "S[j] = pool(sum of w_q[j] over the last `window` rows)"
    paper: ClassVar[str] = "arXiv:2404.14469 section 4.2"
    citation: ClassVar[Citation] = Citation(
        key="li2024snapkv",
        title="SnapKV: LLM Knows What You are Looking for Before Generation",
        authors=(
            "Li, Yuhong and Huang, Yingbing and Yang, Bowen and Venkitesh, Bharat and Locatelli, Acyr and Ye, Hanchen"
            " and Cai, Tianle and Lewis, Patrick and Chen, Deming"
        ),
        booktitle="Advances in Neural Information Processing Systems",
        year=2024,
        arxiv="2404.14469",
    )
    proven: ClassVar[str] = "authors' decisions"

    window: int = parameter(
        64, "last rows of the prompt, which give the scores; their keys are protected; at most half of the budget"
    )
    kernel: int = parameter(5, "width of the pooling over neighbouring keys, an odd number")
    pooling: Pooling = parameter("avg", "kind of pooling: avg, max or none")
    group: GroupReduction = parameter("mean", GROUP_HELP)
    reduce: Reduce = parameter("scores", REDUCE_HELP)

    def __post_init__(self) -> None:
        at_least("window", self.window, 1)
        odd("kernel", self.kernel)

    def protect(self, budget: int) -> Protection:
        return Protection(recent=min(self.window, budget // 2))

    def observe(self, step: Step, score: Tensor) -> Tensor:
        history = History.of(step.memory, "rows", self.window)
        by_head = self.reduce == "scores" and self.group == "max"  # of a mean or sum, the order makes no difference
        history.push(step.head_weights() if by_head else step.weights(self.group))
        if not step.compresses:
            return score
        used = voting(self, step)
        votes = sum_of_newest(history.rows, used)
        votes = step.grouped(votes, "max") if by_head else votes
        return pooled(votes, step, step.visible, used, self.kernel, self.pooling)


def voting(policy: Policy, step: Step) -> Tensor:
    """Return how many of the newest keys each run protects, int64 ``[R]``: the window that votes."""
    if "voting" not in step.memory:  # remembered, because every copy to a GPU waits for it
        recent = [policy.protect(budget).recent for budget in step.budgets]
        step.memory["voting"] = torch.tensor(recent, device=step.budget.device)
    used: Tensor = step.memory["voting"]
    return used


def sum_of_newest(rows: Tensor, used: Tensor) -> Tensor:
    """Return the sum of the newest `used` ``[R]`` of the rows ``[R, L, S, w, n]``, ``[R, L, S, n]``."""
    newest = torch.arange(rows.shape[-2], 0, -1, device=rows.device) <= used[:, None]  # [R, w]
    return (rows * newest[:, None, None, :, None]).sum(-2)


def pooled(votes: Tensor, step: Step, visible: Tensor, window: Tensor, kernel: int, pooling: Pooling) -> Tensor:
    """Return votes ``[R, L, S, n]`` pooled over neighbours in the cache; the newest `window` ``[R]`` keys get none.

    `visible`, bool of the same shape, is ``step.visible``, or that of the query heads where `votes` has theirs.
    """
    place, there = without_gaps(visible, step.most_visible)
    n = votes.shape[-1]
    older = there & (place < n - window[:, None, None, None])
    compact = torch.where(older, votes.gather(-1, place), 0).flatten(1, 2)  # [R, L * S, m]
    if pooling == "avg":
        # In the rows' own type: the neighbours of each key are added from left to right on every processor.
        compact = functional.avg_pool1d(compact, kernel, stride=1, padding=kernel // 2)
    elif pooling == "max":
        compact = functional.max_pool1d(compact, kernel, stride=1, padding=kernel // 2)
    compact = torch.where(older, compact.view(place.shape), 0)
    return torch.zeros_like(votes).scatter_(-1, place, compact)


def odd(name: str, value: int) -> None:
    """Raise UsageError unless `value` is an odd number above zero."""
    at_least(name, value, 1)
    at_least(f"{name} (an odd number): the remainder of {value} by 2,", value % 2, 1)
