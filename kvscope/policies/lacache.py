"""LaCache: older keys are thinned out step by step, other ones in each layer."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvscope.core.errors import UsageError
from kvscope.policies.base import Policy, Protection, Step, at_least, parameter, policy
from kvscope.policies.citation import Citation


@policy("lacache")
@dataclass(frozen=True)
class LaCache(Policy):
    """Retain the first and the newest keys, and some keys in between, which differ from layer to layer.

    With ``L`` layers, each ``before = 1 + ceil((L - span) / (span - overlap))`` neighbouring keys of the cache are
    reduced to ``after = ceil(span / (span - overlap))``, at most ``before - 1``. Layer ``i`` retains those from the
    ``i``-th on, counted modulo ``before - after + 1``. So a key is held by about `span` layers, and its neighbours by
    the next ones: a ladder. A cursor moves through the cache, ``after`` keys at a time, from the `sinks` to the newest
    ``L`` keys. When it arrives there, it starts again and reduces what is left.

    arXiv:2507.14204; code GATECH-EIC/LaCache, ``kv_cache.py``, whose `span` of 16 is half of 32 layers; here half of
    the layers is the default. That code evicts ``before - after`` keys at once when its cache exceeds the budget, and
    lets the cache grow again. Here keys are evicted one at a time, so that the budget is kept exactly; both hold the
    same keys whenever that code's cache is full. That code reduces a long prompt in one pass with wider steps. Here the
    keys of the prompt are evicted as if they had arrived one by one.

    Sinks are at most a quarter of the budget, the newest keys at most half. If each layer has its own budget, the order
    of evictions is that for their mean. The rule reads no signal.

    >>> from kvscope.replay.example import held
    >>> held("lacache:sinks=1", [[1 / n] * n for n in range(1, 9)], budget=5)[-3:]  # of 1, 2 goes 2; of 3, 4 goes 4
    [[0, 1, 3, 4, 5], [0, 1, 3, 5, 6], [0, 1, 3, 5, 7]]
    """

    needs = frozenset()
    scope = "layer"
    formula = "of `before` neighbours in the cache `after` stay, from the one with number i on in layer i"
    paper = "arXiv:2507.14204"
    citation = Citation(
        key="shi2025lacache",
        title="LaCache: Ladder-Shaped KV Caching for Efficient Long-Context Modeling of Large Language Models",
        authors=(
            "Shi, Dachuan and Fu, Yonggan and Yuan, Xiangchi and Yu, Zhongzhi and You, Haoran and Li, Sixu and"
            " Dong, Xin and Kautz, Jan and Molchanov, Pavlo and Lin, Yingyan Celine"
        ),
        booktitle="International Conference on Machine Learning",
        year=2025,
        arxiv="2507.14204",
    )
    proven = "authors' decisions"

    span: int | None = parameter(None, "layers that hold a key of a ladder; by default half of the layers")
    overlap: int = parameter(0, "layers by which neighbouring ladders overlap, below span")
    sinks: int = parameter(4, "first keys that are never evicted, at most a quarter of the budget")

    def __post_init__(self) -> None:
        at_least("overlap", self.overlap, 0)
        at_least("sinks", self.sinks, 0)
        if self.span is not None:
            at_least("span", self.span, self.overlap + 1)

    def fit(self, layers: Sequence[int], kv_heads: int, n_layers: int) -> None:
        span = self._span(n_layers)
        if span >= max(n_layers, 2) or span <= self.overlap:
            raise UsageError(
                f"{self.label} makes no ladder in a model of {n_layers} layers",
                f"Set span from {self.overlap + 1} to {max(n_layers - 1, 1)}; overlap is less than span.",
            )

    def protect(self, budget: int) -> Protection:
        return Protection(sinks=min(self.sinks, budget // 4))

    def observe(self, step: Step, score: Tensor) -> Tensor:
        if "order" not in step.memory:
            orders = [self._orders(step, budget) for budget in step.budgets]
            step.memory["order"] = torch.tensor(orders, dtype=score.dtype, device=score.device)[:, :, None]
        order: Tensor = step.memory["order"]  # [R, L, 1, T]
        return order[..., : step.t + 1].expand(score.shape)

    def _span(self, n_layers: int) -> int:
        return max(1, n_layers // 2) if self.span is None else self.span

    def _orders(self, step: Step, budget: int) -> list[list[int]]:
        """Return for each layer the place of every key in the order of evictions, ``T`` for one that is never evicted.

        Layers whose ladders begin at the same key have the same list.
        """
        span = self._span(step.n_layers)
        each = max(1, span - self.overlap)
        before = max(2, 1 + math.ceil((step.n_layers - span) / each))
        after = max(1, min(math.ceil(span / each), before - 1))
        end = budget - min(step.n_layers, budget // 2)
        made: dict[int, list[int]] = {}
        for first in {place % (before - after + 1) for place in step.places}:
            made[first] = [step.length] * step.length
            ladder = Ladder(before, after, first, self.protect(budget).sinks, end)
            for rank, key in enumerate(ladder.evictions(budget, step.length)):
                made[first][key] = rank
        return [made[place % (before - after + 1)] for place in step.places]


@dataclass
class Ladder:
    """The steps in which one layer's cache is thinned out.

    Attributes
    ----------
    before, after : int
        How many neighbouring keys become how many.
    first : int
        Which of them is the first to stay.
    start, end : int
        The places in the cache between which the cursor goes.
    """

    before: int
    after: int
    first: int
    start: int
    end: int

    def evictions(self, budget: int, length: int) -> list[int]:
        """Return the keys that leave a cache of `budget` keys while keys up to `length` arrive, in order."""
        cache, leaving, cursor = list(range(min(budget, length))), deque[int](), self.start
        evicted = []
        for key in range(budget, length):
            cache.append(key)
            if not leaving:
                if cursor + self.after > self.end:
                    cursor = self.start
                leaving.extend(self._leaving(cursor, len(cache)))
                cursor += self.after
            evicted.append(cache.pop(leaving.popleft()))
        return evicted

    def _leaving(self, cursor: int, size: int) -> list[int]:
        """Return which places of the cache leave, one after the other: each counts the earlier ones as gone."""
        stay = range(cursor + self.first, cursor + self.first + self.after)
        places = [place for place in range(cursor, min(cursor + self.before, size)) if place not in stay]
        return [place - gone for gone, place in enumerate(places)] or [cursor]
