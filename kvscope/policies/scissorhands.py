"""Scissorhands: the keys that were pivotal stay pivotal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvscope.policies.base import Group, Policy, Protection, Step, Traits, at_least, parameter, policy
from kvscope.policies.history import History
from kvscope.policies.lru import even_share


@policy("scissorhands")
@dataclass(frozen=True)
class Scissorhands(Policy):
    """Evict the key that was least often pivotal in the last rows: most of them gave it less than its even share.

    Score of key ``j``: minus the number of rows ``q`` among the last `history` with ``w_q[j] < mean of w_q over V_q``,
    which is ``1 / |V_q|`` for a row that sums to one. arXiv:2305.17118, algorithms 1 and 2, with one key evicted at a
    time; the newest `recent` keys stay, at most half of the budget.

    ``variant=released`` is what the authors published instead, code lzcemma/Scissorhands, ``hf_opt_dropkv.py``: no
    budget, but a threshold. Row ``q`` marks the keys above its own 90th percentile, taken over the whole row with the
    zeros of the future (``T`` numbers, so it depends on the length of the text) before anything is evicted. From row
    `start` on a query sees the keys marked by any of the `lru_window` rows before it, and the `position_window` keys
    before it. Text and prompt are treated alike, hence streaming prefill. The code leaves the first five layers whole;
    here all layers are treated alike.

    Example
    -------
    Key 1 fell short in steps 1 and 2; then key 2 in steps 2 and 3.

    >>> from kvscope.replay.example import held
    >>> held(Scissorhands(history=2), [[1], [0.7, 0.3], [0.5, 0.2, 0.3], [0.1, 0.3, 0.2, 0.4]], 2)
    [[0], [0, 1], [0, 2], [0, 3]]
    """

    paper = "arXiv:2305.17118 algorithms 1 and 2"
    proven = "authors' decisions (released), plain-loop twin"

    history: int = parameter(400, "rows that are looked back on")
    recent: int = parameter(10, "newest keys that always stay, at most half of the budget")
    group: Group = parameter("mean", "how the query heads of a group become one: mean, max or sum")
    variant: Literal["plain", "released"] = parameter(
        "plain", "plain: the paper's, held to a budget; released: the authors' code, a threshold without a budget"
    )
    lru_window: int = parameter(100, "released: rows in which a key must be marked once to stay")
    position_window: int = parameter(10, "released: keys before a query that it always sees")
    start: int = parameter(100, "released: first row that is cut")

    def __post_init__(self) -> None:
        at_least("history", self.history, 1)
        at_least("recent", self.recent, 0)
        at_least("lru_window", self.lru_window, 1)
        at_least("position_window", self.position_window, 0)
        at_least("start", self.start, 0)

    @property
    def traits(self) -> Traits:
        if self.variant == "plain":
            return self.with_traits()
        return self.with_traits(
            needs=frozenset({"weights", "full_weights"}),
            bounded=False,
            prefills=frozenset({"stream"}),
            published=True,
        )

    def protect(self, budget: int) -> Protection:
        if self.variant == "released":
            return Protection()
        return Protection(recent=min(self.recent, budget // 2))

    def observe(self, step: Step, score: Tensor) -> Tensor:
        if self.variant == "released":
            return self._threshold(step, score)
        weights = step.weights(self.group)
        rows = History.of(step.memory, "below", self.history)
        rows.push((weights < even_share(step, weights)) & step.visible)
        return -rows.sum.to(score.dtype)

    def _threshold(self, step: Step, score: Tensor) -> Tensor:
        """Return -inf for the keys that no row of the window has marked and that are not among the newest."""
        full = step.grouped(step.signals["full_weights"], self.group)
        # where nothing is gone yet the row is the full one to the bit, and so is the key that is the threshold
        row = torch.where(step.visible.all(-1, keepdim=True), full, step.weights(self.group))
        marks = History.of(step.memory, "marked", self.lru_window)
        marks.push((row > _percentile(full, step.length)).expand(step.visible.shape))
        n = step.t + 1  # also the number of the next row, which is the one that is cut
        if n < self.start:
            return torch.zeros_like(score)
        old = torch.arange(n, device=score.device) < n - self.position_window
        return torch.zeros_like(score).masked_fill_((marks.sum == 0) & old, -torch.inf)


def _percentile(rows: Tensor, length: int) -> Tensor:
    """Return the weight at 90 % of the sorted row of `length` keys, those to come being zero: ``[R, L, S, 1]``."""
    place = int(0.9 * length) - (length - rows.shape[-1])
    if place < 0:
        return torch.zeros_like(rows[..., :1])
    return rows.kthvalue(place + 1, dim=-1, keepdim=True).values
