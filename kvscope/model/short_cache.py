"""A cache of transformers from which keys are really taken out, each key/value head for itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import Cache, DynamicLayer

from kvscope.core.errors import ReplayError
from kvscope.core.model_types import KeyValueCache
from kvscope.model.derotation import Derotation


class ShortLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """The cache of one layer of one sequence; key/value heads may hold different keys, and different numbers of them.

    Parameters
    ----------
    rotary : Derotation, optional
        Takes the position off every key that comes in; `update` then hands keys out at the positions 0, 1, ... that
        they have in the cache, oldest first. Without it keys stay as they came.

    Attributes
    ----------
    head_keys, head_values : list of Tensor
        For each of ``G`` heads ``[n, D]``, oldest first; nothing else is kept.
    positions : list of Tensor
        For each head int64 ``[n]``: where in the text they are from.
    came : tuple of Tensor
        Keys and values ``[1, G, q, D]`` of the newest tokens, as the model gave them.
    seen : int
        Tokens that have come in.
    """

    def __init__(self, rotary: Derotation | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rotary = rotary
        self.head_keys: list[Tensor] = []
        self.head_values: list[Tensor] = []
        self.positions: list[Tensor] = []
        self.came: tuple[Tensor, ...] = ()
        self.seen = 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Add the newest tokens, ``[1, G, q, D]``, and return all that is held, ``[1, G, n, D]``.

        The ends of heads that hold fewer are NaN: whoever reads beyond a head's keys cannot miss it.
        """
        self.came = (key_states, value_states)
        fresh = torch.arange(self.seen, self.seen + key_states.shape[2], device=key_states.device)
        keys = key_states if self.rotary is None else self.rotary.off(key_states, fresh)
        self.seen += len(fresh)
        self.positions = _joined(self.positions, [fresh] * key_states.shape[1])
        self.head_keys = _joined(self.head_keys, keys[0])
        self.head_values = _joined(self.head_values, value_states[0])
        return _side_by_side([self._placed(held) for held in self.head_keys]), _side_by_side(self.head_values)

    def cut(self, stays: Tensor) -> None:
        """Keep only the keys of the positions in `stays`, bool ``[G, seen]``; memory of the others is given back.

        Raises
        ------
        ReplayError
            If a key should stay that is not there any more.
        """
        for head, own in enumerate(stays):
            keep = own[self.positions[head]]
            if int(keep.sum()) != int(own.sum()):
                raise ReplayError(
                    "a policy keeps a key that has left the cache", "An evicted key never returns: check the policy."
                )
            self.positions[head] = self.positions[head][keep]
            self.head_keys[head] = self.head_keys[head][keep]
            self.head_values[head] = self.head_values[head][keep]

    def longest(self) -> int:
        """Return how many keys the fullest head holds."""
        return max(len(held) for held in self.head_keys)

    def get_seq_length(self) -> int:
        """Return how many tokens have come in: the position of the next one, however many are held."""
        return self.seen

    def _placed(self, keys: Tensor) -> Tensor:
        if self.rotary is None:
            return keys
        return self.rotary.on(keys[None, None], torch.arange(len(keys), device=keys.device))[0, 0]


def short_cache(layers: int, rotary: Sequence[Derotation] | None = None) -> KeyValueCache:
    """Return a cache with a `ShortLayer` for each layer, to pass as ``past_key_values``."""
    return Cache(layers=[ShortLayer(rotary[layer] if rotary else None) for layer in range(layers)])


def _joined(held: Sequence[Tensor], more: Sequence[Tensor] | Tensor) -> list[Tensor]:
    return [torch.cat(pair) for pair in zip(held, more, strict=True)] if held else list(more)


def _side_by_side(heads: list[Tensor]) -> Tensor:
    return pad_sequence(heads, batch_first=True, padding_value=torch.nan)[None]
