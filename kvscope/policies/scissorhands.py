"""Scissorhands: keys that were pivotal before are expected to remain pivotal."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvscope.policies.base import (
    GroupReduction,
    Policy,
    Protection,
    Step,
    at_least,
    parameter,
    policy,
    variant_parameter,
)
from kvscope.policies.citation import Citation
from kvscope.policies.grouped_scores import GROUP_HELP, REDUCE_HELP, Reduce
from kvscope.policies.history import History
from kvscope.policies.lru import even_share


@policy("scissorhands")
@dataclass(frozen=True)
class Scissorhands(Policy):
    """Evict the key that got less than its even share of attention in most of the last rows.

    Score of key ``j``: minus the number of rows ``q`` among the last `history` with ``w_q[j] < mean of w_q over V_q``.
    This mean is ``1 / |V_q|`` for a row that sums to one. The newest `recent` keys are protected, at most half of the
    budget. With ``reduce=scores`` each query head counts its own rows, and `group` reduces the scores: ``max`` retains
    a key that any head would retain.

    arXiv:2305.17118, algorithms 1 and 2; here one key is evicted at a time. The paper has no grouped heads. The
    authors' code has another rule, which is the variant.

    Example
    -------
    Key 1 fell short in steps 1 and 2; then key 2 in steps 2 and 3.

    >>> from kvscope.replay.example import held
    >>> held(Scissorhands(history=2), [[1], [0.7, 0.3], [0.5, 0.2, 0.3], [0.1, 0.3, 0.2, 0.4]], 2)
    [[0], [0, 1], [0, 2], [0, 3]]
    """

    formula = "S[j] = -number of rows q among the last `history` with w_q[j] < 1 / |V_q|"
    paper = "arXiv:2305.17118 algorithms 1 and 2"
    citation = Citation(
        key="liu2023scissorhands",
        title=(
            "Scissorhands: Exploiting the Persistence of Importance Hypothesis for LLM KV Cache Compression at Test "
            "Time"
        ),
        authors=(
            "Liu, Zichang and Desai, Aditya and Liao, Fangshuo and Wang, Weitao and Xie, Victor and Xu, Zhaozhuo and "
            "Kyrillidis, Anastasios and Shrivastava, Anshumali"
        ),
        booktitle="Advances in Neural Information Processing Systems",
        year=2023,
        arxiv="2305.17118",
    )
    proven = "paper"

    history: int = parameter(400, "newest rows that count")
    recent: int = parameter(10, "newest keys that are never evicted, at most half of the budget")
    group: GroupReduction = parameter("mean", GROUP_HELP)
    reduce: Reduce = parameter("rows", REDUCE_HELP)
    variant: str = variant_parameter()
    # Read by the variant alone; stored with every replay of the policy, by which runs are compared.
    lru_window: int = parameter(
        100, "released: number of earlier rows, any of which can make a key visible by marking it"
    )
    position_window: int = parameter(10, "released: newest keys that a query always sees")
    start: int = parameter(100, "released: first row to which the threshold applies")

    def __post_init__(self) -> None:
        at_least("history", self.history, 1)
        at_least("recent", self.recent, 0)
        at_least("lru_window", self.lru_window, 1)
        at_least("position_window", self.position_window, 0)
        at_least("start", self.start, 0)

    def protect(self, budget: int) -> Protection:
        return Protection(recent=min(self.recent, budget // 2))

    def observe(self, step: Step, score: Tensor) -> Tensor:
        by_head = self.reduce == "scores"
        weights = step.head_weights() if by_head else step.weights(self.group)
        visible = step.visible_to_heads() if by_head else step.visible
        rows = History.of(step.memory, "below", self.history)
        rows.push((weights < even_share(weights, visible)) & visible)
        counts = -rows.sum.to(score.dtype)
        return step.grouped(counts, self.group) if by_head else counts
