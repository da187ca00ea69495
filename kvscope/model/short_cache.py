"""A transformers cache from which evicted keys are removed, separately for each key/value head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import Cache, DynamicLayer

from kvscope.core.errors import ReplayError
from kvscope.core.model_types import KeyValueCache
from kvscope.model.derotation import Derotation


class ShortLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """The cache of one layer for one sequence; key/value heads may hold different keys, and different numbers of keys.

    Parameters
    ----------
    rotary : Derotation, optional
        Removes the position from every new key; `update` then returns the keys rotated to their index in the cache:
        0, 1, ..., oldest first. Without it keys are stored and returned as the model computes them.

    Attributes
    ----------
    head_keys, head_values : list of Tensor
        The held keys and values of each of ``G`` heads, ``[n, D]``, oldest first.
    positions : list of Tensor
        For each head the positions of its keys in the text, int64 ``[n]``.
    newest : tuple of Tensor
        Keys and values ``[1, G, q, D]`` of the latest call of `update`, as the model computed them.
    seen : int
        Tokens added so far.
    """

    def __init__(self, rotary: Derotation | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rotary = rotary
        self.head_keys: list[Tensor] = []
        self.head_values: list[Tensor] = []
        self.positions: list[Tensor] = []
        self.newest: tuple[Tensor, ...] = ()
        self.seen = 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Add the keys and values of new tokens ``[1, G, q, D]`` and return all that are held, ``[1, G, n, D]``.

        Heads that hold fewer keys are padded with NaN, so that reading beyond a head's keys shows in the output.
        """
        self.newest = (key_states, value_states)
        fresh = torch.arange(self.seen, self.seen + key_states.shape[2], device=key_states.device)
        keys = key_states if self.rotary is None else self.rotary.off(key_states, fresh)
        self.seen += len(fresh)
        self.positions = _joined(self.positions, [fresh] * key_states.shape[1])
        self.head_keys = _joined(self.head_keys, keys[0])
        self.head_values = _joined(self.head_values, value_states[0])
        return _padded([self._placed(held) for held in self.head_keys]), _padded(self.head_values)

    def cut(self, retained: Tensor) -> None:
        """Remove all keys but those at the positions in `retained`, bool ``[G, seen]``, and free their memory.

        Raises
        ------
        ReplayError
            If a key in `retained` is not in the cache.
        """
        for head, positions in enumerate(retained):
            keep = positions[self.positions[head]]
            if int(keep.sum()) != int(positions.sum()):
                raise ReplayError(
                    "a policy retains a key that is already evicted", "Fix the policy: an evicted key never returns."
                )
            self.positions[head] = self.positions[head][keep]
            self.head_keys[head] = self.head_keys[head][keep]
            self.head_values[head] = self.head_values[head][keep]

    def longest(self) -> int:
        """Return the largest number of keys that a head holds."""
        return max(len(held) for held in self.head_keys)

    def get_seq_length(self) -> int:
        """Return the number of tokens added so far, which is the position of the next token, evicted keys included."""
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


def _padded(heads: list[Tensor]) -> Tensor:
    return pad_sequence(heads, batch_first=True, padding_value=torch.nan)[None]
