"""A transformers cache from which evicted keys are removed, separately for each key/value head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from kvscope.core.errors import ReplayError
from kvscope.core.model_types import KeyValueCache
from kvscope.model.derotation import Derotation


class ShortLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """The cache of one layer for one sequence; key/value heads may hold different keys, and different numbers of keys.

    A head that holds fewer keys than another one is padded at the front, with NaN, so that reading the padding shows
    in the output. `HeldKeys` stores what is held, and removes keys.

    Parameters
    ----------
    rotary : Derotation, optional
        Removes the position from every new key; `update` then returns the keys rotated to their index in the cache:
        0, 1, ..., oldest first. Without it keys are stored and returned as the model computes them.

    Attributes
    ----------
    pairs : Tensor
        Keys and values of ``G`` heads, each key beside its value, ``[G, n, 2 D]``, oldest first.
    places : Tensor or None
        int64 ``[G, n]``: index of each key in its head's cache, negative for padding; needed with `rotary`.
    newest : tuple of Tensor
        Keys and values ``[1, G, q, D]`` of the latest call of `update`, as the model computed them.
    seen : int
        Tokens added so far.
    """

    def __init__(self, rotary: Derotation | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rotary = rotary
        self.pairs: Tensor | None = None
        self.places: Tensor | None = None
        self.newest: tuple[Tensor, ...] = ()
        self.seen = 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Add the keys and values of new tokens ``[1, G, q, D]`` and return all that are held, ``[1, G, n, D]``."""
        self.newest = (key_states, value_states)
        size = key_states.shape[-1]
        keys, kind = key_states, value_states.dtype
        if self.rotary is not None:
            fresh = torch.arange(self.seen, self.seen + key_states.shape[2], device=key_states.device)
            keys = self.rotary.off(key_states, fresh)
        self.seen += key_states.shape[2]
        pairs = torch.cat([keys, value_states.to(keys.dtype)], -1)[0]  # [G, q, 2 D]
        self.pairs = pairs if self.pairs is None else torch.cat([self.pairs, pairs], 1)
        return self._placed(self.pairs[..., :size])[None], self.pairs[None, ..., size:].to(kind)

    def longest(self) -> int:
        """Return the number of keys that the cache has room for: that of the head that holds the most."""
        return 0 if self.pairs is None else self.pairs.shape[1]

    def get_seq_length(self) -> int:
        """Return the number of tokens added so far, which is the position of the next token, evicted keys included."""
        return self.seen

    def _placed(self, keys: Tensor) -> Tensor:
        """Return keys ``[G, n, D]`` at their positions: those in the cache if they are compacted."""
        if self.rotary is None:
            return keys
        places = torch.arange(keys.shape[1], device=keys.device).expand(keys.shape[:2])
        places = places if self.places is None else self.places
        return self.rotary.on(keys.reshape(1, 1, -1, keys.shape[-1]), places.clamp(min=0).flatten())[0, 0].view_as(keys)


class HeldKeys:
    """What some layers hold that have room for equally many keys; it cuts them together, and never waits for a GPU.

    Parameters
    ----------
    layers : sequence of ShortLayer
        The ``L`` layers.
    heads : int
        ``G``.
    device : torch.device
        Device of the cache.

    Attributes
    ----------
    positions : Tensor
        int64 ``[L, G, n]``: position in the text of each key, oldest first; -1 for padding, which is at the front.
    there : Tensor
        bool ``[L, G, n]``: false for padding.
    """

    def __init__(self, layers: Sequence[ShortLayer], heads: int, device: torch.device) -> None:
        self._layers = list(layers)
        self.positions = torch.empty(len(self._layers), heads, 0, dtype=torch.int64, device=device)
        self.there = self.positions >= 0
        self._returned = torch.zeros((), dtype=torch.bool, device=device)

    def append(self, start: int, stop: int) -> None:
        """Note that the next call of every layer's `update` adds the tokens `start` to `stop` - 1."""
        fresh = torch.arange(start, stop, device=self.positions.device).expand(*self.positions.shape[:2], -1)
        self._set(torch.cat([self.positions, fresh], -1))

    def cut(self, retained: Tensor, most: int | None, oldest: int = 0) -> Tensor:
        """Remove all keys but those at the positions in `retained`, and free their memory.

        Parameters
        ----------
        retained : Tensor
            bool ``[L, G, seen]``.
        most : int or None
            How many keys a head retains at most; None: read from the device.
        oldest : int
            First position that is not removed all the same, because the next query's window reaches it.

        Returns
        -------
        Tensor
            int64 ``[]``: the largest number of keys that a head retains, those before `oldest` included.
        """
        keep = self.there & retained.gather(-1, self.positions.clamp(min=0))
        count = keep.sum(-1)
        self._returned |= (count != retained.sum(-1)).any()
        if oldest > 0:
            keep = keep & (self.positions >= oldest)
        most = int(keep.sum(-1).max()) if most is None else most
        order = keep.byte().argsort(dim=-1, stable=True)[..., self.positions.shape[-1] - most :]  # what is kept is last
        there = keep.gather(-1, order)
        self._returned |= (there.sum(-1) != keep.sum(-1)).any()
        self._set(torch.where(there, self.positions.gather(-1, order), -1))
        for layer, index, held in zip(self._layers, order, there, strict=True):
            assert layer.pairs is not None, "nothing is cut before the first token"
            pairs = layer.pairs.gather(1, index[..., None].expand(-1, -1, layer.pairs.shape[-1]))
            layer.pairs = pairs.masked_fill_(~held[..., None], torch.nan)
        return count.max()

    def check(self) -> None:
        """Raise ReplayError if a key was to be retained that is not in the cache."""
        if bool(self._returned):
            raise ReplayError(
                "a policy retains a key that is already evicted", "Fix the policy: an evicted key never returns."
            )

    def _set(self, positions: Tensor) -> None:
        self.positions, self.there = positions, positions >= 0
        if any(layer.rotary is not None for layer in self._layers):
            places = self.there.cumsum(-1) - 1
            for layer, own in zip(self._layers, places, strict=True):
                layer.places = own


def short_cache(layers: int, rotary: Sequence[Derotation] | None = None) -> KeyValueCache:
    """Return a cache with a `ShortLayer` for each layer, to pass as ``past_key_values``."""
    return Cache(layers=[ShortLayer(rotary[layer] if rotary else None) for layer in range(layers)])
