"""A transformers cache from which evicted keys are removed, separately for each key/value head."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import DynamicCache, DynamicLayer

from kvscope.core.errors import ReplayError
from kvscope.core.model_types import CausalModel, KeyValueCache
from kvscope.model.derotation import Derotation

# Layers of a cache with states of a linear attention: transformers 5.2 has none.
STATES: type | None = getattr(cache_utils, "LinearAttentionCacheLayerMixin", None)


class ShortLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """The cache of one layer for a batch; key/value heads may hold different keys, and different numbers of keys.

    A head that holds fewer keys than another one is padded at the front, with NaN, so that reading the padding shows
    in the output. `HeldKeys` stores what is held, and removes keys. Where the model caches one latent vector per token,
    from which it computes the keys and values of all heads, there is one head here, and it holds a latent vector as
    long as any head holds its key.

    The ``R`` entries of a batch add their tokens at the same positions, and may hold different keys: the heads of all
    of them are stored one after the other, ``S = R G`` in all.

    Parameters
    ----------
    rotary : Derotation, optional
        Removes the position from every new key; `update` then returns the keys rotated to their index in the cache:
        0, 1, ..., oldest first. Without it keys are stored and returned as the model computes them.

    Attributes
    ----------
    pairs : Tensor
        Keys and values of the heads, each key beside its value, ``[S, n, 2 D]``, oldest first; of latent vectors
        one head for each entry, ``[R, n, .]``.
    places : Tensor or None
        int64 ``[S, n]``: index of each key in its head's cache, negative for padding; needed with `rotary`.
    newest : tuple of Tensor
        Keys and values ``[R, G, q, D]`` of the latest call of `update`, as the model computed them.
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
        """Add the keys and values of new tokens ``[R, G, q, D]`` and return all that are held, ``[R, G, n, D]``."""
        self.newest = (key_states, value_states)
        size, batch = key_states.shape[-1], len(key_states)
        keys, kind = key_states, value_states.dtype
        if self.rotary is not None:
            fresh = torch.arange(self.seen, self.seen + key_states.shape[2], device=key_states.device)
            keys = self.rotary.off(key_states, fresh)
        self.seen += key_states.shape[2]
        pairs = torch.cat([keys, value_states.to(keys.dtype)], -1).flatten(0, 1)  # [S, q, 2 D]
        self.pairs = pairs if self.pairs is None else torch.cat([self.pairs, pairs], 1)
        held, values = self._placed(self.pairs[..., :size]), self.pairs[..., size:].to(kind)
        entries = (batch, len(held) // batch, held.shape[1])
        return held.reshape(*entries, -1), values.reshape(*entries, -1)

    def repeat(self, runs: int) -> None:
        """Let each of so many entries of a batch hold what the single one holds so far."""
        if self.pairs is not None and runs > 1:
            self.pairs = self.pairs.repeat(runs, 1, 1)

    def longest(self) -> int:
        """Return the number of keys that the cache has room for: that of the head that holds the most."""
        return 0 if self.pairs is None else self.pairs.shape[1]

    def get_seq_length(self) -> int:
        """Return the number of tokens added so far, which is the position of the next token, evicted keys included."""
        return self.seen

    def _placed(self, keys: Tensor) -> Tensor:
        """Return keys ``[S, n, D]`` at their positions: those in the cache if they are compacted."""
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
    runs : int
        ``R``: entries of the batch; ``S = R G``.

    Attributes
    ----------
    positions : Tensor
        int64 ``[L, S, n]``: position in the text of each key, oldest first; -1 for padding, which is at the front.
    there : Tensor
        bool ``[L, S, n]``: false for padding, and for a latent vector whose key this head no longer holds.
    """

    def __init__(self, layers: Sequence[ShortLayer], heads: int, device: torch.device, runs: int = 1) -> None:
        self._layers, self._heads = list(layers), heads
        self.positions = torch.empty(len(self._layers), runs * heads, 0, dtype=torch.int64, device=device)
        self.there = self.positions >= 0
        self._returned = torch.zeros((), dtype=torch.bool, device=device)

    def append(self, start: int, stop: int) -> None:
        """Note that the next call of every layer's `update` adds the tokens `start` to `stop` - 1."""
        fresh = torch.arange(start, stop, device=self.positions.device).expand(*self.positions.shape[:2], -1)
        self._set(torch.cat([self.positions, fresh], -1), torch.cat([self.there, fresh >= 0], -1))

    def cut(self, retained: Tensor, most: int | None, oldest: int = 0) -> Tensor:
        """Remove all keys but those at the positions in `retained`, and free their memory.

        Parameters
        ----------
        retained : Tensor
            bool ``[L, S, seen]``.
        most : int or None
            How many keys a head retains at most; None: read from the device, as it is for latent vectors.
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
        stays = self._by_entry(keep) if self._latent else keep
        most = int(stays.sum(-1).max()) if most is None or self._latent else most
        order = stays.byte().argsort(dim=-1, stable=True)[..., self.positions.shape[-1] - most :]  # what stays is last
        there, held = keep.gather(-1, order), stays.gather(-1, order)
        self._returned |= (there.sum(-1) != keep.sum(-1)).any()
        self._set(torch.where(held, self.positions.gather(-1, order), -1), there)
        for layer, index, kept in zip(self._layers, order, held, strict=True):
            assert layer.pairs is not None, "nothing is cut before the first token"
            step = len(index) // len(layer.pairs)  # heads that share a cached vector
            pairs = layer.pairs.gather(1, index[::step, :, None].expand(-1, -1, layer.pairs.shape[-1]))
            layer.pairs = pairs.masked_fill_(~kept[::step, :, None], torch.nan)
        return count.max()

    def _by_entry(self, keep: Tensor) -> Tensor:
        """Return which keys any head of the same entry of the batch retains, for every head, ``[L, S, n]``."""
        of_entries = keep.view(len(keep), -1, self._heads, keep.shape[-1])  # [L, R, G, n]
        return of_entries.any(2, keepdim=True).expand_as(of_entries).flatten(1, 2)

    @property
    def _latent(self) -> bool:
        """Whether the heads of a layer share one cached vector per token."""
        pairs = self._layers[0].pairs
        return pairs is not None and len(pairs) < self.positions.shape[1]

    def check(self) -> None:
        """Raise ReplayError if a key was to be retained that is not in the cache."""
        if bool(self._returned):
            raise ReplayError(
                "a policy retains a key that is already evicted", "Fix the policy: an evicted key never returns."
            )

    def _set(self, positions: Tensor, there: Tensor) -> None:
        self.positions, self.there = positions, there
        if any(layer.rotary is not None for layer in self._layers):
            places = self.there.cumsum(-1) - 1
            for layer, own in zip(self._layers, places, strict=True):
                layer.places = own


@cache
def _with_state() -> Callable[[int, Derotation | None], ShortLayer]:
    """Return the class of a `ShortLayer` beside the states of a linear attention in the same layer."""
    linear: Any = cache_utils.LinearAttentionLayer  # of no type that is known to all versions of transformers

    class ShortLayerWithState(linear, ShortLayer):  # type: ignore[misc,no-untyped-call]
        is_compileable = False

        def __init__(self, number_of_states: int, rotary: Derotation | None = None) -> None:
            ShortLayer.__init__(self, rotary)
            linear.__init__(self, number_of_states=number_of_states)

    return ShortLayerWithState


def full_cache(model: CausalModel) -> KeyValueCache:
    """Return an empty cache of the kind that the model decodes with, to pass as ``past_key_values``."""
    own = [
        found
        for found in vars(sys.modules[type(model).__module__]).values()
        if isinstance(found, type) and issubclass(found, DynamicCache) and found.__module__ == type(model).__module__
    ]
    return own[0]() if own else DynamicCache(config=model.config)


def short_cache(
    model: CausalModel, layers: Sequence[int], rotary: Mapping[int, Derotation] | None = None
) -> tuple[KeyValueCache, dict[int, ShortLayer]]:
    """Return a cache to pass as ``past_key_values``, and its `ShortLayer` for each of `layers`.

    The other layers keep the states of the kinds that the model has.
    """
    made, turned = full_cache(model), rotary or {}
    short: dict[int, ShortLayer] = {}
    for layer in layers:
        before: Any = made.layers[layer] if made.layers else None
        if _holds_states(before):
            short[layer] = _with_state()(before.number_of_states, turned.get(layer))
        else:
            short[layer] = ShortLayer(turned.get(layer))
    if made.layers:
        for layer in layers:
            made.layers[layer] = short[layer]
    else:  # the model adds layers when it first uses them
        made.layer_class_to_replicate = lambda: short.get(len(made.layers)) or ShortLayer()
    return made, short


def holds_keys_alone(model: CausalModel) -> bool:
    """Return whether a model decodes with keys and values alone, and not with states of other layers too."""
    return not any(map(_holds_states, full_cache(model).layers))


def _holds_states(layer: object) -> bool:
    return STATES is not None and isinstance(layer, STATES)
