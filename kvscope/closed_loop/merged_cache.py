"""The cache of a decoder whose evicted keys are merged into those that stay, before they are removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from kvscope.closed_loop.like_layers import LikeLayers
from kvscope.closed_loop.merged import merging_of
from kvscope.core.merge_scheme import MergeScheme
from kvscope.merging.layer import MergingLayer
from kvscope.model.short_cache import HeldKeys, ShortLayer


class MergedCache:
    """Merges what some layers evict, at the end of each step of decoding.

    Parameters
    ----------
    scheme : MergeScheme
        The rule.
    layers : mapping of int to ShortLayer
        The cache of each layer.
    exact : torch.dtype
        In which it computes.
    """

    def __init__(self, scheme: MergeScheme, layers: Mapping[int, ShortLayer], exact: torch.dtype) -> None:
        self._scheme, self._layers, self._exact = scheme, layers, exact
        self._merging: dict[int, MergingLayer] = {}  # by layer

    def before(self, t: int, parts: Sequence[LikeLayers]) -> None:
        """Merge the keys that are evicted at the end of step `t`."""
        for part in parts:
            for caches, held, _ in part.groups:
                oldest = t + 2 - caches.within(t + 2) if caches.window or caches.chunk else 0
                for place, number in enumerate(caches.layers):
                    self._merge(part, number, held, place, t, oldest)

    def after(self, tokens: int, parts: Sequence[LikeLayers]) -> None:
        """Nothing more is done once the evicted keys have left."""

    def _merge(self, part: LikeLayers, number: int, held: HeldKeys, place: int, t: int, oldest: int) -> None:
        """Merge what layer `number` of a simulation evicts; `place` is its place among the layers of `held`."""
        shape = part.simulation.shape
        layer = shape.layers[number]
        cache = self._layers[layer]
        assert cache.pairs is not None, "nothing is evicted before the first token"
        heads = (part.runs, shape.kv_heads)
        if layer not in self._merging:
            size = (*heads, shape.length)
            self._merging[layer] = merging_of(self._scheme, shape.sequence, layer, size, self._exact, cache.pairs)
            self._merging[layer].mass = part.mass[:, number]  # a view: the decoder adds each row to it
        positions, there = (each[place].view(*heads, -1) for each in (held.positions, held.there))  # [R, G, n]
        leave = part.simulation.state.leave[:, number].expand(-1, shape.kv_heads, -1)
        left = leave.gather(-1, positions.clamp(min=0))
        pairs = cache.pairs.view(*heads, positions.shape[-1], -1)
        d = cache.newest[0].shape[-1]
        evicted, stays = there & (left == t), there & (left > t) & (positions >= oldest)
        if bool(evicted.any()):
            self._merging[layer].merge(pairs[..., :d], pairs[..., d:], positions, evicted, stays)
