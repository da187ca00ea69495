"""One layer's merging over a text: what a rule reads of earlier steps, and its effect on keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from kvscope.core.merge_scheme import MergeScheme
from kvscope.merging.rules import Held, Merged, cam, d2o, kvmerger


class MergingLayer:
    """Merges what the heads of one layer evict, for all runs of a batch.

    Parameters
    ----------
    scheme : MergeScheme
        The rule.
    draw : Tensor
        ``[G, T]``: a uniform number in [0, 1) for each head and key.
    runs : int
        ``R``.
    exact : torch.dtype
        In which it computes.
    kind : torch.dtype
        Dtype of the cache, to which merged keys and values are rounded.

    Attributes
    ----------
    mass : Tensor
        ``[R, G, T]``: attention that each key has received so far, as a mean over the query heads of its group.
    """

    def __init__(self, scheme: MergeScheme, draw: Tensor, runs: int, exact: torch.dtype, kind: torch.dtype) -> None:
        self.scheme, self._draw, self._exact, self._kind = scheme, draw, exact, kind
        self.mass = torch.zeros(runs, *draw.shape, dtype=exact, device=draw.device)
        self._threshold = torch.full((runs,), torch.nan, dtype=exact, device=draw.device)

    def observe(self, row: Tensor) -> None:
        """Add the live row of a query, ``[R, H, n]``, to the attention that its keys have received."""
        runs, groups, _ = self.mass.shape
        self.mass[..., : row.shape[-1]] += row.view(runs, groups, -1, row.shape[-1]).mean(2)

    def merge(self, key: Tensor, value: Tensor, positions: Tensor, evicted: Tensor, stays: Tensor) -> None:
        """Add the evicted keys and values to those that stay, in place.

        Parameters
        ----------
        key, value : Tensor
            ``[R, G, n, D]``, in the dtype of the cache or a higher one; where neither `evicted` nor `stays` is set they
            are not read.
        positions : Tensor
            int64 ``[R, G, n]``: positions in the text, ascending where keys are there.
        evicted, stays : Tensor
            As of `Held`.
        """
        present = evicted | stays
        most = int(present.sum(-1).max())
        order = (~present).byte().argsort(dim=-1, stable=True)[..., :most]  # [R, G, m]: oldest first, then the empty
        there = present.gather(-1, order)
        at = positions.clamp(min=0).gather(-1, order)

        def of(vectors: Tensor) -> Tensor:
            chosen = vectors.gather(2, order[..., None].expand(-1, -1, -1, vectors.shape[-1])).to(self._exact)
            return chosen.masked_fill(~there[..., None], 0)

        merged = self._rule(
            Held(
                of(key),
                of(value),
                evicted.gather(-1, order),
                stays.gather(-1, order),
                self.mass.gather(-1, at),
                self._draw.expand(len(key), -1, -1).gather(-1, at),
            )
        )

        for vectors, new in ((key, merged.key), (value, merged.value)):
            where = order[..., None].expand(-1, -1, -1, vectors.shape[-1])
            fresh = new.to(self._kind).to(vectors.dtype)
            vectors.scatter_(2, where, torch.where(merged.changed[..., None], fresh, vectors.gather(2, where)))

    def _rule(self, held: Held) -> Merged:
        scheme = self.scheme
        if scheme.kind == "cam":
            return cam(held, scheme.tokens, scheme.chance)
        if scheme.kind == "kvmerger":
            return kvmerger(held, scheme.threshold)
        merged, self._threshold = d2o(held, scheme.beta, self._threshold)
        return merged
