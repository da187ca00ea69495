"""H2O: heavy hitters, the keys that have gathered most attention, and the newest ones."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvscope.policies.base import (
    GroupReduction,
    Policy,
    Protection,
    Recurrence,
    Step,
    at_least,
    parameter,
    policy,
    variant_parameter,
)
from kvscope.policies.citation import Citation
from kvscope.policies.grouped_scores import GROUP_HELP, REDUCE_HELP, Reduce, accumulated, recurrence_of_rows


@policy("h2o")
@dataclass(frozen=True)
class H2O(Policy):
    """Retain the keys with the largest sum of attention since they arrived, and the newest half.

    ``S_t[j] = S_{t-1}[j] + w_t[j]``, with ``w_t`` the live row. arXiv:2306.14048, algorithm 1; code FMInference/H2O,
    ``utils_real_drop``: it removes keys from the cache, and does not count the current key in the budget. That code has
    scores per query head, each with its own key/value head. With grouped heads, `group` reduces the scores of a group's
    query heads to one, as Zefan-Cai/KVCache-Factory does. ``reduce=rows`` reduces each row before it is added; the
    result differs only for ``max``. The variants are the two other rules of H2O's code.

    Example
    -------
    Sums after step 2 are 2.1, 0.7 and 0.2; key 2 is recent, so key 1 is evicted.

    >>> from kvscope.replay.example import held
    >>> held(H2O(recent=1), [[1], [0.6, 0.4], [0.5, 0.3, 0.2], [0.1, 0.1, 0.2, 0.6]], 2)
    [[0], [0, 1], [0, 2], [0, 3]]
    """

    formula = "S_t[j] = S_{t-1}[j] + w_t[j]"
    paper = "arXiv:2306.14048 algorithm 1"
    citation = Citation(
        key="zhang2023h2o",
        title="H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
        authors=(
            "Zhang, Zhenyu and Sheng, Ying and Zhou, Tianyi and Chen, Tianlong and Zheng, Lianmin and Cai, Ruisi and "
            "Song, Zhao and Tian, Yuandong and Ré, Christopher and Barrett, Clark and Wang, Zhangyang and Chen, Beidi"
        ),
        booktitle="Advances in Neural Information Processing Systems",
        year=2023,
        arxiv="2306.14048",
    )
    proven = "authors' decisions"

    recent: int | None = parameter(None, "newest keys that are never evicted; None: half of the budget, rounded down")
    group: GroupReduction = parameter("mean", GROUP_HELP)
    reduce: Reduce = parameter("scores", REDUCE_HELP)
    variant: str = variant_parameter("drop")

    def __post_init__(self) -> None:
        at_least("recent", 0 if self.recent is None else self.recent, 0)

    def protect(self, budget: int) -> Protection:
        return Protection(recent=budget // 2 if self.recent is None else self.recent)

    def recurrence(self) -> Recurrence | None:
        return recurrence_of_rows(self.group, self.reduce, decay=1.0)

    def observe(self, step: Step, score: Tensor) -> Tensor:
        return accumulated(step, score, self.group, self.reduce, lambda weights, score: score + weights)
