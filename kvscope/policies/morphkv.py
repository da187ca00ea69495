"""MorphKV: keys that the last few queries agree on, and the newest ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvscope.policies.base import Policy, Protection, Step, at_least, compute_once_if_shared, parameter, policy
from kvscope.policies.cache import without_gaps
from kvscope.policies.citation import Citation
from kvscope.policies.history import History


@policy("morphkv")
@dataclass(frozen=True)
class MorphKV(Policy):
    """Retain the older keys that any of the last `window` queries attends to most, and the newest ones.

    With ``W = min(window, B // 2)``, the newest ``W + 1`` keys are protected. The rows of the ``W`` queries before the
    current one are restricted to the older keys and divided by their sum. The score of a key is the largest
    (``fuse=max``) or the sum (``fuse=sum``) of its weights in these rows. For grouped heads the logits of the query
    heads are added, so their probabilities are multiplied.

    arXiv:2503.00979; code ghadiaravi13/MorphKV, ``patch_llama.py``. That code retains ``CAP + 1`` keys, the current one
    included, so ``B = CAP + 1``. It evicts before the current query attends, which changes no decision, so here a query
    sees one key more. It first evicts from the prompt at the first decoding step; here this is at the end of the
    prompt. Two things are not reproduced: its ``evict_after``, which lets the cache grow beyond its budget, and its
    masks per query head, which grouped heads have there in the step that evicts.

    Example: budget 3, ``window=1``. At row 3 the keys older than the newest two are 0 and 1. Row 2 gives them .1 and
    .6, so key 0 is evicted, whatever row 3 is.

    >>> from kvscope.replay.example import held
    >>> rows = [[1.0], [0.5, 0.5], [0.1, 0.6, 0.3], [0.7, 0.1, 0.1, 0.1]]
    >>> held(MorphKV(window=1), rows, budget=3, prompt=1)[3]
    [1, 2, 3]
    """

    formula = "S[j] = max over the last `window` rows q of w_q[j] / sum of w_q over the older keys"
    paper = "arXiv:2503.00979"
    citation = Citation(
        key="ghadia2025morphkv",
        title="Dialogue Without Limits: Constant-Sized KV Caches for Extended Responses in LLMs",
        authors="Ghadia, Ravi and Kumar, Avinash and Jain, Gaurav and Nair, Prashant and Das, Poulami",
        booktitle="International Conference on Machine Learning",
        year=2025,
        arxiv="2503.00979",
    )
    proven = "authors' decisions"

    window: int = parameter(200, "number of earlier queries whose rows count, at most half of the budget")
    fuse: Literal["max", "sum"] = parameter("max", "how their rows are reduced to one: max or sum")

    def __post_init__(self) -> None:
        at_least("window", self.window, 1)

    def protect(self, budget: int) -> Protection:
        return Protection(recent=min(min(self.window, budget // 2) + 1, budget))

    def observe(self, step: Step, score: Tensor) -> Tensor:
        history = History.of(step.memory, "morphkv", max(1, min(self.window, max(step.budgets) // 2)))
        if step.compresses and history.count:
            score = self._fused(step, history, score)
        assert step.live is not None
        history.push(compute_once_if_shared(step.live, lambda live: self._together(step, live)))
        return score

    def _together(self, step: Step, live: Tensor) -> Tensor:
        """Return the rows of groups, their query heads' logits added, ``[., L, G, n]``; the largest weight is one."""
        logits = step.grouped(live.double().log(), "sum")  # up to a constant per row, which the shares do not see
        return (logits - logits.amax(-1, keepdim=True)).exp().nan_to_num(0.0)  # a row without mass is zero

    def _fused(self, step: Step, history: History, score: Tensor) -> Tensor:
        """Return the score of every key from the rows before this one, ``[R, L, G, n]``."""
        if step.one_by_one:
            return self._fused_by_run(step, history, score)
        window = self._windows(step)
        index, there = without_gaps(step.visible[..., :-1], step.most_visible - 1)  # [R, L, G, m]
        rows, newer = history.with_age()
        counted = newer < window[:, None]  # [R, W]
        older = there & (index < step.t - window[:, None, None, None])
        return torch.zeros_like(score).scatter_(-1, index, self._shares(rows, counted, index, older).to(score.dtype))

    def _fused_by_run(self, step: Step, history: History, score: Tensor) -> Tensor:
        """Return the same run by run: windows and caches of the runs differ in size, and none is padded."""
        fused = torch.zeros_like(score)
        for run, budget in enumerate(step.budgets):
            window = min(self.window, budget // 2)
            older = step.visible[run : run + 1, ..., : max(0, step.t - window)]
            most = int(older.sum(-1).max()) if older.numel() else 0
            if not window or not most:
                continue
            index, there = without_gaps(older, most)  # [1, L, G, m]
            rows = history.newest(window, run)[None]  # [1, L, G, W, n]
            counted = torch.ones(1, rows.shape[-2], dtype=torch.bool)
            fused[run].scatter_(-1, index[0], self._shares(rows, counted, index, there)[0].to(score.dtype))
        return fused

    def _shares(self, rows: Tensor, counted: Tensor, index: Tensor, older: Tensor) -> Tensor:
        """Return the largest or summed share of the keys at `index` in the rows that count, float64 ``[R, L, G, m]``.

        `rows` is ``[R, L, G, W, n]``, `counted` bool ``[R, W]``; keys that are not `older` get none.
        """
        rows = rows.gather(-1, index[..., None, :].expand(*rows.shape[:-1], -1))  # [R, L, G, W, m]
        rows, mask = rows.double(), older.double()  # one over a small float32 may be infinite
        total = (rows @ mask[..., None])[..., 0]  # [R, L, G, W]
        part = torch.where((total > 0) & counted[:, None, None], 1 / total, 0.0)
        best = (rows * part[..., None]).amax(-2) if self.fuse == "max" else (part[..., None, :] @ rows)[..., 0, :]
        return best * mask

    def _windows(self, step: Step) -> Tensor:
        """Return how many rows count in each run, int64 ``[R]``, and remember it."""
        if "windows" not in step.memory:
            counts = [min(self.window, budget // 2) for budget in step.budgets]
            step.memory["windows"] = torch.tensor(counts, device=step.visible.device)
        windows: Tensor = step.memory["windows"]
        return windows
