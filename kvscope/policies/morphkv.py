"""MorphKV: keys that the last few queries agree on, and the newest ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvscope.policies.base import Policy, Protection, Step, at_least, parameter, policy
from kvscope.policies.history import History


@policy("morphkv")
@dataclass(frozen=True)
class MorphKV(Policy):
    """Keep the older keys that any of the last `window` queries attends to most, and the newest ones.

    With ``W = min(window, B // 2)``: the rows of the ``W`` queries before the current one are taken over the keys
    older than the newest ``W + 1`` and made to sum to one; a key's score is the largest (``fuse=max``) or the sum
    (``fuse=sum``) of its weights in them. The newest ``W + 1`` keys stay. Of grouped heads the logits are added, so
    their probabilities are multiplied. arXiv:2503.00979; code ghadiaravi13/MorphKV, ``patch_llama.py``.

    That code keeps ``CAP + 1`` keys, the current one included, so ``B = CAP + 1``. It evicts before the current query
    attends, which changes no choice, so here a query sees one key more; it spares the prompt until the first decoding
    step, where here the choice falls at the prompt's end. Not taken over: its ``evict_after``, which lets the cache
    grow past its budget, and its masks per query head, which grouped heads have there in the step that evicts.

    Example: budget 3, ``window=1``. At row 3 the keys beyond the newest two are 0 and 1; row 2 has .1 and .6 for them,
    so key 0 goes, whatever row 3 has.

    >>> from kvscope.replay.example import held
    >>> rows = [[1.0], [0.5, 0.5], [0.1, 0.6, 0.3], [0.7, 0.1, 0.1, 0.1]]
    >>> held(MorphKV(window=1), rows, budget=3, prompt=1)[3]
    [1, 2, 3]
    """

    paper = "arXiv:2503.00979"

    window: int = parameter(200, "queries before the current one that are asked, at most half of the budget")
    fuse: Literal["max", "sum"] = parameter("max", "how their rows become one: max or sum")

    def __post_init__(self) -> None:
        at_least("window", self.window, 1)

    def protect(self, budget: int) -> Protection:
        return Protection(recent=min(min(self.window, budget // 2) + 1, budget))

    def observe(self, step: Step, score: Tensor) -> Tensor:
        memory = step.memory
        if "morphkv_window" not in memory:
            memory["morphkv_window"] = (step.budget // 2).clamp(max=self.window)  # [R, L, G]
            memory["morphkv_most"] = max(int(memory["morphkv_window"].max()), 1)
        history = History.of(memory, "morphkv", memory["morphkv_most"])
        if step.compresses and history.count:
            score = self._fused(step, history.rows, memory["morphkv_window"][..., None]).to(score.dtype)
        assert step.live is not None
        history.push(step.grouped(step.live.log(), "sum"))
        return score

    def _fused(self, step: Step, rows: Tensor, window: Tensor) -> Tensor:
        """Return the score of every key from the rows before this one, oldest first: ``[R, L, G, n]``."""
        key = torch.arange(step.t, device=rows.device)
        age = torch.arange(rows.shape[-2], 0, -1, device=rows.device)
        older = step.visible[..., :-1] & (key < step.t - window)  # [R, L, G, n - 1]
        share = torch.softmax(rows.masked_fill(~older[..., None, :], -torch.inf), -1)
        share = share.nan_to_num(0.0).masked_fill(age[:, None] > window[..., None], 0.0)  # [R, L, G, rows, n - 1]
        fused = share.amax(-2) if self.fuse == "max" else share.sum(-2)
        return torch.nn.functional.pad(fused, (0, 1))
