"""Cosines of the keys of a layer with its earlier keys, as they come."""

from __future__ import annotations

import torch
from torch import Tensor

from kvscope.core.errors import ModelError
from kvscope.model.attention_hook import Call


class KeyCosines:
    """The cosines of one layer in the current sequence.

    Directions are computed anew for each block from the keys in the cache: to keep them in 32 bit would take as much
    memory as the whole cache of a 16-bit model. They are kept where a cache drops keys, as that of a window does.
    """

    def __init__(self) -> None:
        self._norms: Tensor | None = None  # [G, seen], in a buffer that grows by doubling
        self._directions: Tensor | None = None  # [G, seen, D] likewise, if the cache drops keys

    def of(self, call: Call, key: Tensor, norm: Tensor, first: int, seen: int) -> Tensor:
        """Return the cosines of new keys with all keys so far, float16 ``[G, n, first + n]``.

        Parameters
        ----------
        call : Call
            The call that brought the keys.
        key, norm : Tensor
            The new keys, float32 ``[G, n, D]``, and their lengths ``[G, n]``.
        first : int
            Position of the first of them.
        seen : int
            Number of tokens up to the end of the call.

        Raises
        ------
        ModelError
            If the cache of a layer without a window dropped keys.
        """
        last, whole = first + key.shape[1], call.key.shape[2] == seen
        self._norms = _grown(self._norms, norm, last)
        self._norms[:, first:last] = norm
        if whole and call.sliding_window is None and call.chunk is None:
            directions = _directions(call.key[0, :, :last].float(), self._norms[:, :last])
        elif first > 0 and self._directions is None:
            raise ModelError(
                f"the cache of layer {call.layer} dropped keys, although the layer names no sliding window",
                "Record what does not need earlier keys: --store qkv.",
            )
        else:
            self._directions = _grown(self._directions, key, last)
            self._directions[:, first:last] = _directions(key, norm)
            directions = self._directions[:, :last]
        return (directions[:, first:] @ directions.transpose(1, 2)).clamp_(-1, 1).half()


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
