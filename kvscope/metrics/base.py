"""What a metric is: a number for every step and query head, from the full rows and what the policy left of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from kvscope.registry import Registry

Direction = Literal["higher", "lower", "none"]


@dataclass
class Rows:
    """A block of steps of one policy, with what metrics share computed once.

    Attributes
    ----------
    full : Tensor
        ``p``: full-cache attention, ``[L, H, b, n]`` for ``b`` steps and ``n`` keys, zero above the diagonal; in the
        closed loop each run has its own, ``[R, L, H, b, n]``, and so `rank` and `missing`.
    visible : Tensor
        ``V``: bool ``[R, L, G, b, n]``.
    held : Tensor
        ``R``: bool ``[R, L, G, b, n]``.
    rank : Tensor
        int ``[L, H, b, n]``: place of each key in its row without the current key, 0 for the heaviest; of equal
        weights the newer comes first.
    budget : Tensor
        int ``[R]``: ``B`` of each run.
    steps : Tensor
        int ``[b]``: positions of the queries.
    missing : Tensor or None
        ``[L, H, b]``: mass that a learned sink takes.
    """

    full: Tensor
    visible: Tensor
    held: Tensor
    rank: Tensor
    budget: Tensor
    steps: Tensor
    missing: Tensor | None = None

    @cached_property
    def seen(self) -> Tensor:
        """``V`` for query heads, bool ``[R, L, H, b, n]``."""
        return self._per_query_head(self.visible)

    @cached_property
    def live(self) -> Tensor:
        """Live rows: full rows on ``V``, divided by their sum, ``[R, L, H, b, n]``."""
        return self._share(self.full * self.seen)

    @cached_property
    def current(self) -> Tensor:
        """Where a key is the query's own, bool ``[b, n]``."""
        return torch.arange(self.full.shape[-1], device=self.full.device) == self.steps[:, None]

    @cached_property
    def past(self) -> Tensor:
        """Keys that exist at each step, bool ``[b, n]``."""
        return torch.arange(self.full.shape[-1], device=self.full.device) <= self.steps[:, None]

    @cached_property
    def ideal_mask(self) -> Tensor:
        """The current key and the ``B`` heaviest others of each row, bool ``[R, L, H, b, n]`` (A2SF section 4.3)."""
        top = self.rank < self.budget[:, None, None, None, None]
        return (top | self.current) & self.past

    @cached_property
    def ideal(self) -> Tensor:
        """Ideal rows: full rows on the ideal mask, divided by their sum, ``[R, L, H, b, n]``."""
        return self._share(self.full * self.ideal_mask)

    def _per_query_head(self, mask: Tensor) -> Tensor:
        return mask.repeat_interleave(self.full.shape[-3] // mask.shape[2], dim=2)

    def _share(self, kept: Tensor) -> Tensor:
        total = kept.sum(-1, keepdim=True)
        if self.missing is not None:
            total = total + self.missing[..., None]
        return kept / torch.where(total > 0, total, 1)


def ranks(full: Tensor, steps: Tensor) -> Tensor:
    """Return the place of each key in its row, int64 ``[L, H, b, n]``: 0 for the heaviest, the current key last.

    Of equal weights the newer key comes first, as in eviction the oldest goes first.
    """
    n = full.shape[-1]
    key = torch.arange(n, device=full.device)
    others = torch.where(key < steps[:, None], full, -1.0)
    order = others.flip(-1).sort(dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(-1, order, key.expand_as(order).contiguous())
    return rank.flip(-1)


@dataclass(frozen=True)
class Metric:
    """A named metric and its properties.

    Attributes
    ----------
    name : str
        Column name.
    direction : {"higher", "lower", "none"}
        Which way is better.
    range : tuple
        Smallest and largest value; None where there is no bound.
    when_nothing_evicted : float or None
        Its value when the policy left everything in place; None where that depends on the sequence.
    compute : callable
        From `Rows` to ``[R, L, H, b]``; with `pooled`, to ``[R, L, H, b, 3]``.
    pooled : bool
        Whether the steps of a head are pooled before the value is formed: ``compute`` gives the terms
        ``x·y, x·x, y·y`` of a cosine over all steps, and every step of the head carries that one cosine.
    summary : str
        First line of the function's docstring.
    """

    name: str
    direction: Direction
    range: tuple[float | None, float | None]
    when_nothing_evicted: float | None
    compute: Callable[[Rows], Tensor]
    pooled: bool = False
    summary: str = ""

    def declaration(self) -> dict[str, object]:
        """Return the properties as they are written into results."""
        return {
            "direction": self.direction,
            "range": list(self.range),
            "when_nothing_evicted": self.when_nothing_evicted,
            "summary": self.summary,
        }


METRICS: Registry[Metric] = Registry("metric", "kvscope.metrics")


def metric(
    name: str,
    *,
    direction: Direction,
    range: tuple[float | None, float | None],
    when_nothing_evicted: float | None,
    pooled: bool = False,
) -> Callable[[Callable[[Rows], Tensor]], Callable[[Rows], Tensor]]:
    """Return a decorator that registers a function from `Rows` to values as a metric."""

    def register(function: Callable[[Rows], Tensor]) -> Callable[[Rows], Tensor]:
        summary = (function.__doc__ or "").strip().split("\n", 1)[0]
        METRICS.register(name, Metric(name, direction, range, when_nothing_evicted, function, pooled, summary))
        return function

    return register
