"""The rotary embedding of a model on vectors, from the signal ``rotary``: off, and its mean over future positions."""

from __future__ import annotations

import torch
from torch import Tensor


class Rotation:
    """Rotations of some layers, in float64.

    Parameters
    ----------
    signal : Tensor
        ``rotary``, ``[., L, 4, D]``: radians per position, the other dimension of the pair, the sign of the sine and
        the factor of each dimension.
    """

    def __init__(self, signal: Tensor) -> None:
        frequencies, partners, self._sign, self._factor = signal.double().unbind(-2)  # [., L, D] each
        self._frequency, self._partner = frequencies, partners.long()

    def off(self, vectors: Tensor, first: int) -> Tensor:
        """Return vectors ``[., L, heads, n, D]`` of positions `first`, `first` + 1, ... as before their rotation."""
        position = torch.arange(first, first + vectors.shape[-2], device=vectors.device)
        angle = (position[:, None] * self._frequency[..., None, :])[:, :, None]  # [., L, 1, n, D]
        partner = self._partner[:, :, None, None].expand(vectors.shape)
        beside = vectors.double().gather(-1, partner) * self._sign[:, :, None, None]
        # the inverse of a rotation turns back; its factor is divided by
        return (vectors * angle.cos() - beside * angle.sin()) / self._factor[:, :, None, None]

    def mean(self, first: int, count: int) -> Tensor:
        """Return the mean of the rotations of `count` positions from `first` on, ``[., L, D, D]``, for columns."""
        position = torch.arange(first, first + count, device=self._frequency.device)[:, None, None, None]
        angle = position * self._frequency  # [count, ., L, D]
        cosine, sine = angle.cos().mean(0) * self._factor, angle.sin().mean(0) * self._factor * self._sign
        return torch.diag_embed(cosine).scatter_add(-1, self._partner[..., None], sine[..., None])
