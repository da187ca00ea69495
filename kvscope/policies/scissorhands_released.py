"""Scissorhands as released: a threshold in place of a budget."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvscope.core.errors import UsageError
from kvscope.policies.base import Protection, Step, variant
from kvscope.policies.history import History
from kvscope.policies.scissorhands import Scissorhands


@variant("scissorhands", "released")
@dataclass(frozen=True)
class ScissorhandsReleased(Scissorhands):
    """Reproduce lzcemma/Scissorhands, ``hf_opt_dropkv.py``: no budget, but a threshold.

    Row ``q`` marks the keys above its own 90th percentile, before anything is evicted. The percentile is taken over the
    whole row with zeros for future keys: ``T`` numbers, so it depends on the length of the text. From row `start` on a
    query sees the keys that any of the `lru_window` rows before it marked, and the `position_window` keys before it.
    Prompt and later text are treated in the same way, hence streaming prefill. The code evicts nothing in the first
    five layers; here all layers are treated in the same way. `history` and `recent` are not used.

    Example
    -------
    Of eleven numbers only the largest is above the percentile: key 0 in every row. Key 1 is no longer among the two
    newest for row 4, and is evicted before it.

    >>> from kvscope.replay.example import held
    >>> rows = [[1.0], *([0.6] + [0.4 / t] * t for t in range(1, 11))]
    >>> policy = ScissorhandsReleased(lru_window=1, position_window=2, start=4)
    >>> held(policy, rows, budget=11, prefill="stream")[2:4]
    [[0, 1, 2], [0, 2, 3]]
    """

    needs = frozenset({"weights", "full_weights"})
    bounded = False
    prefills = frozenset({"stream"})
    published = True
    proven = "authors' decisions"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reduce == "scores":
            raise UsageError(
                "scissorhands: variant=released has a threshold and no scores that a group could reduce",
                "Omit reduce=scores.",
            )

    def protect(self, budget: int) -> Protection:
        return Protection()

    def observe(self, step: Step, score: Tensor) -> Tensor:
        """Return -inf for the keys that no row of the window has marked and that are not among the newest."""
        full = step.grouped(step.signals["full_weights"], self.group)
        # where nothing is evicted yet the row is the full one to the bit, and so is the key that is the threshold
        row = torch.where(step.visible.all(-1, keepdim=True), full, step.weights(self.group))
        marks = History.of(step.memory, "marked", self.lru_window)
        marks.push((row > _percentile(full, step.length)).expand(step.visible.shape))
        n = step.t + 1  # also the number of the next row, which is the one that is cut
        if n < self.start:
            return torch.zeros_like(score)
        old = torch.arange(n, device=score.device) < n - self.position_window
        return torch.zeros_like(score).masked_fill_((marks.sum == 0) & old, -torch.inf)


def _percentile(rows: Tensor, length: int) -> Tensor:
    """Return the weight at 90 % of the sorted row of `length` keys, later ones being zero: ``[R, L, S, 1]``."""
    place = int(0.9 * length) - (length - rows.shape[-1])
    if place < 0:
        return torch.zeros_like(rows[..., :1])
    return rows.kthvalue(place + 1, dim=-1, keepdim=True).values
