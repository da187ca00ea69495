"""KVzap: keys of which a small module predicts, from the layer's input, that the model would read them again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvscope.policies.base import Policy, Protection, Recurrence, Step, Traits, at_least, parameter, policy
from kvscope.policies.citation import Citation


@policy("kvzap")
@dataclass(frozen=True)
class KVzap(Policy):
    """Retain the keys with the highest predicted scores of ``kvzip``, without a second reading of the prompt.

    In each layer a scorer, linear or with one hidden layer, predicts the logarithm of the ``kvzip`` score for every
    key/value head from the input of the layer's attention. ``kvscope gate scorers TRACE TRACE`` trains scorers on
    prompts that were read twice (``kvscope trace --reread --hidden``); ``scorers=demo`` are those of the bundled model.
    arXiv:2601.07891; code NVIDIA/kvpress, ``kvzap_press.py``, ``dms_press.py`` and ``kvzap/train.py``.

    As published there is no budget: with a `threshold`, such as -4, a key with a lower score is evicted when `window`
    newer keys exist. Without a threshold, the keys with the highest scores and the newest keys are retained; this is
    the scorer of that code alone, for comparison at equal budgets. We differ in two points: scorers are trained on
    kvzip's weight itself, not on that weight times the norm of the projected value over the norm of the query's input,
    and at most half of the budget is protected.

    Example: budget 2; the predicted scores are -1, -5, -2 and -3.

    >>> from kvscope.replay.example import held
    >>> scores, rows = {"scorer:demo": [-1.0, -5.0, -2.0, -3.0]}, [[1], [0.5] * 2, [0.3] * 3, [0.25] * 4]
    >>> held("kvzap:window=1", rows, budget=2, prompt=4, **scores)[-1]
    [0, 3]
    >>> held("kvzap:window=1,threshold=-4", rows, budget=9, prompt=4, **scores)[-1]
    [0, 2, 3]
    """

    formula = "S[j] = predicted log of kvzip's score; with a threshold, evict j after j + window if below it"
    paper = "arXiv:2601.07891"
    citation = Citation(
        key="jeblick2026kvzap",
        title="KVzap: Fast, Adaptive, and Faithful KV Cache Pruning",
        authors="Jeblick, Maximilian and J{\\'e}gou, Simon",
        year=2026,
        arxiv="2601.07891",
    )
    proven = "kvpress's decisions"

    scorers: str = parameter("demo", "file of the scorers, or demo for the scorers of the bundled model")
    threshold: float | None = parameter(None, "score below which a key is evicted, instead of a budget")
    window: int = parameter(128, "newest keys that are never evicted; under a budget at most half of it")

    def __post_init__(self) -> None:
        at_least("window", self.window, 0)

    @property
    def traits(self) -> Traits:
        return self.with_traits(needs=frozenset({self._signal}), bounded=self.threshold is None)

    def protect(self, budget: int) -> Protection:
        return Protection(recent=min(self.window, budget // 2)) if self.threshold is None else Protection()

    def recurrence(self) -> Recurrence | None:
        return Recurrence("none", fixed=lambda keys: keys.signals[self._signal]) if self.threshold is None else None

    def observe(self, step: Step, score: Tensor) -> Tensor:
        found = step.signals[self._signal].expand(step.visible.shape).to(score.dtype)
        if self.threshold is None:
            return found
        older = torch.arange(step.t + 1, device=score.device) <= step.t - self.window
        return torch.where((found < self.threshold) & older, -torch.inf, found)

    @property
    def _signal(self) -> str:
        return f"scorer:{self.scorers}"
