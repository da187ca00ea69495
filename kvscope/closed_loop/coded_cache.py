"""The quantised cache of a decoder: what it holds is replaced by what is read back from codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvscope.closed_loop.like_layers import LikeLayers
from kvscope.core.cache_scheme import CacheScheme
from kvscope.model.derotation import Derotation
from kvscope.model.short_cache import ShortLayer
from kvscope.quantisation.layer import Rotation, read_keys, read_values


@dataclass(frozen=True)
class Quantised:
    """How a cache is quantised.

    Attributes
    ----------
    scheme : CacheScheme
        The scheme.
    rotations : mapping of int to Rotation
        Of each layer with attention, where keys are quantised without their position; otherwise empty.
    """

    scheme: CacheScheme
    rotations: Mapping[int, Rotation] = field(default_factory=dict)

    @classmethod
    def of(cls, scheme: CacheScheme | None, unrotated: Mapping[int, Derotation]) -> Quantised | None:
        """Return how a cache is quantised; None for a cache in full precision."""
        if scheme is None:
            return None
        turns = {layer: Rotation(turn.off, turn.on) for layer, turn in unrotated.items()}
        return cls(scheme, turns if scheme.before_rotation else {})


class CodedCache:
    """Quantises what some layers hold, after each step of decoding.

    A key or a value is replaced by what is read back of its code, which is what attention is given from then on.

    Parameters
    ----------
    how : Quantised
        The scheme.
    layers : mapping of int to ShortLayer
        The cache of each layer.
    prompt : int
        Tokens that go through one pass, before the others are decoded: 0 with streaming prefill.
    exact : torch.dtype
        In which codes are computed.
    """

    def __init__(self, how: Quantised, layers: Mapping[int, ShortLayer], prompt: int, exact: torch.dtype) -> None:
        self._how, self._layers, self._prompt, self._exact = how, layers, prompt, exact

    def before(self, t: int, parts: Sequence[LikeLayers]) -> None:
        """Nothing is quantised before the evicted keys have left."""

    def after(self, tokens: int, parts: Sequence[LikeLayers]) -> None:
        """Quantise what becomes codes once so many tokens have come, after the keys that leave have been removed."""
        scheme = self._how.scheme
        first = tokens <= max(1, self._prompt)
        keys, values = (
            (0 if first else count(tokens - 1, self._prompt), count(tokens, self._prompt))
            for count in (scheme.coded_keys, scheme.coded_values)
        )
        for part in parts:
            for caches, held, _ in part.groups:
                for place, number in enumerate(caches.layers):
                    layer = part.simulation.shape.layers[number]
                    self._quantise(layer, held.positions[place], held.there[place], keys, values)

    def _quantise(
        self, layer: int, positions: Tensor, there: Tensor, keys: tuple[int, int], values: tuple[int, int]
    ) -> None:
        """Quantise keys and values of one layer, those at positions within ``[first, last)`` of each pair."""
        cache, scheme = self._layers[layer], self._how.scheme
        assert cache.pairs is not None, "nothing is quantised before the first token"
        size, kind = cache.newest[0].shape[-1], cache.pairs.dtype
        key, value = cache.pairs[..., :size].to(self._exact), cache.pairs[..., size:].to(self._exact)

        def among(ends: tuple[int, int]) -> Tensor:
            return there & (positions >= max(ends[0], scheme.whole)) & (positions < ends[1])

        if values[1] > values[0]:
            read, _ = read_values(torch.nan_to_num(value), scheme, kind)
            value = torch.where(among(values)[..., None], read, value)
        if keys[1] > keys[0]:
            members = among(keys)
            if scheme.per_token:
                read, _ = read_values(torch.nan_to_num(key), scheme, kind)
                key = torch.where(members[..., None], read, key)
            else:
                key, _, _ = read_keys(key, members, positions, scheme, self._how.rotations.get(layer), kind)
        cache.pairs = torch.cat([key, value], -1).to(kind)
