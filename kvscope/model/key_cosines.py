"""Cosines of the keys of a layer with its earlier keys, as they come."""

from __future__ import annotations

import torch
from torch import Tensor

from kvscope.model.attention_hook import Call
from kvscope.model.call_parts import Heads


class KeyCosines:
    """The cosines of one layer in the current sequence.

    Directions are computed anew for each block from the keys in the cache: to keep them in 32 bit would take as much
    memory as the whole cache of a 16-bit model. They are kept from the first call on whose cache has dropped keys, as
    that of a window does.

    Parameters
    ----------
    heads : Heads or None
        The heads to which calls are restricted; None for all.
    """

    def __init__(self, heads: Heads | None = None) -> None:
        self._heads = heads
        self._norms: Tensor | None = None  # [G, seen], in a buffer that grows by doubling
        self._directions: Tensor | None = None  # [G, seen, D] likewise, if the cache has dropped keys
        self._whole: tuple[Tensor, int] | None = None  # keys of the last call that had all, and heads that share one

    def hold(self, call: Call, seen: int) -> None:
        """Hold the keys of a call if they are all `seen` so far; of all heads, so that the memory is that of the cache.

        It must be told of every call, since the keys of an older one are no longer in the cache.
        """
        if self._directions is None and call.key.shape[2] == seen:
            self._whole = call.key, call.query.shape[1] // call.key.shape[1]

    def of(self, call: Call, key: Tensor, norm: Tensor, first: int, seen: int) -> Tensor:
        """Return the cosines of new keys with all keys so far, float16 ``[G, n, first + n]``.

        Parameters
        ----------
        call : Call
            The call that brought the keys, with the heads that count.
        key, norm : Tensor
            The new keys, float32 ``[G, n, D]``, and their lengths ``[G, n]``.
        first : int
            Position of the first of them.
        seen : int
            Number of tokens up to the end of the call.
        """
        last = first + key.shape[1]
        self._norms = _grown(self._norms, norm, last)
        self._norms[:, first:last] = norm
        if self._directions is None and call.key.shape[2] == seen:
            directions = _directions(call.key[0, :, :last].float(), self._norms[:, :last])
        else:
            if self._directions is None and first:
                self._directions = _directions(self._earlier(first), self._norms[:, :first])
                self._whole = None
            self._directions = _grown(self._directions, key, last)
            self._directions[:, first:last] = _directions(key, norm)
            directions = self._directions[:, :last]
        return (directions[:, first:] @ directions.transpose(1, 2)).clamp_(-1, 1).half()

    def _earlier(self, count: int) -> Tensor:
        """Return the first keys, float32 ``[G, count, D]``, from the last call that had them."""
        assert self._whole is not None, "the first call of a sequence has all keys"
        key, together = self._whole
        own = key if self._heads is None else self._heads.keys(key, together)
        return own[0, :, :count].float()


def _directions(key: Tensor, norm: Tensor) -> Tensor:
    """Return keys ``[G, n, D]`` of lengths ``[G, n]`` as unit vectors; a zero stays a zero."""
    return key / norm.clamp(min=torch.finfo(norm.dtype).tiny)[..., None]


def _grown(buffer: Tensor | None, like: Tensor, size: int) -> Tensor:
    """Return the buffer ``[G, ., ...]``, with the last axes of `like`, enlarged if it has not `size` positions."""
    if buffer is not None and buffer.shape[1] >= size:
        return buffer
    places = max(size, 2 * (0 if buffer is None else buffer.shape[1]), 256)
    grown = like.new_zeros(like.shape[0], places, *like.shape[2:])
    if buffer is not None:
        grown[:, : buffer.shape[1]] = buffer
    return grown
