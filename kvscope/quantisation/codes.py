"""Codes of keys and values, and what is read back from them.

Everything is computed in the dtype of the vectors, and scales and zero points are rounded to float16, as a cache stores
them; with ``quanto`` both are in the dtype of the cache. A code is ``round((x - zero) / scale)``, cut to
``0..2**bits - 1``, halves to the even code; read back it is ``code * scale + zero``, with ``zero`` the least number
that shares the scale and ``scale`` the range divided by the largest code. Where all numbers are the same the code is 0,
and ``zero`` is read back.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvscope.core.cache_scheme import CacheScheme

LARGEST_E4M3 = 448.0


class CodedKeys(NamedTuple):
    """Keys that were quantised together.

    Attributes
    ----------
    read : Tensor
        ``[..., n, D]``: what is read back of the members; other keys as they were.
    group : Tensor
        int64 ``[..., n]``: number of the group of each member, from 0 on in its head; -1 for other keys.
    outliers : Tensor
        int64 ``[..., n]``: numbers of each key that stay in full precision.
    """

    read: Tensor
    group: Tensor
    outliers: Tensor


def code_keys(key: Tensor, members: Tensor, scheme: CacheScheme) -> CodedKeys:
    """Return some keys of each head as they are read back from codes with a scale for each channel of a group.

    A group is so many consecutive members of a head, oldest first; the last one may be smaller.

    Parameters
    ----------
    key : Tensor
        ``[..., n, D]``.
    members : Tensor
        bool ``[..., n]``: the keys to quantise.
    scheme : CacheScheme
        Of kind ``kivi`` or ``kvquant``.
    """
    groups = -(-key.shape[-2] // scheme.group)
    group = torch.where(members, (members.cumsum(-1) - 1) // scheme.group, groups)  # [..., n]; others: a group too many
    x = torch.where(members[..., None], key, 0)
    kept = torch.zeros_like(x, dtype=torch.bool)
    if scheme.kind == "kvquant" and scheme.outliers:
        kept = _outliers_of_groups(x, group, groups, scheme.outliers)
    index = group[..., None].expand(x.shape)
    low, high = _extremes(x, kept, index, groups + 1)
    scale = ((high - low) / scheme.levels).half().to(x.dtype).gather(-2, index)
    zero = low.half().to(x.dtype).gather(-2, index)
    read = torch.where(kept, x.half().to(x.dtype), _rounded(x, zero, scale, scheme.levels))
    inside = members[..., None]
    return CodedKeys(torch.where(inside, read, key), torch.where(members, group, -1), (kept & inside).sum(-1))


def code_values(value: Tensor, scheme: CacheScheme, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return values ``[..., D]`` as they are read back from codes with scales for each token, and their outliers.

    In ``kivi`` and ``quanto`` each group of channels has a scale, the last may be smaller; in ``kvquant`` the whole
    vector has one. ``quanto`` computes and stores in the dtype of the cache, `kind`. The second tensor is
    int64 ``[...]``: numbers of each vector that stay in full precision.
    """
    if scheme.kind in ("kivi", "quanto"):
        stored = kind if scheme.kind == "quanto" else torch.float16
        exact = value.to(kind) if scheme.kind == "quanto" else value
        parts = [
            _per_vector(part, torch.zeros_like(part, dtype=torch.bool), scheme.levels, stored)
            for part in torch.split(exact, scheme.group, -1)
        ]
        return torch.cat(parts, -1).to(value.dtype), value.new_zeros(value.shape[:-1], dtype=torch.int64)
    off = value - value.mean(-1, keepdim=True)
    distance = _deviations(off, off.square().mean(-1, keepdim=True).sqrt())
    kept = _largest(
        distance, torch.full(value.shape[:-1], _count(scheme.outliers, value.shape[-1]), device=value.device)
    )
    return _per_vector(value, kept, scheme.levels), kept.sum(-1)


def code_fp8(vectors: Tensor) -> Tensor:
    """Return vectors ``[..., D]`` as they are read back from float8 (e4m3), with a float16 scale for each vector.

    The scale is the largest size in the vector divided by 448, the largest number of the format.
    """
    scale = (vectors.abs().amax(-1, keepdim=True) / LARGEST_E4M3).half().to(vectors.dtype)
    sized = (vectors / torch.where(scale > 0, scale, 1)).clamp(-LARGEST_E4M3, LARGEST_E4M3)
    codes = sized.to(torch.float32).to(torch.float8_e4m3fn)
    return codes.to(vectors.dtype) * scale


def _per_vector(x: Tensor, kept: Tensor, levels: int, stored: torch.dtype = torch.float16) -> Tensor:
    low = torch.where(kept, torch.inf, x).amin(-1, keepdim=True)
    high = torch.where(kept, -torch.inf, x).amax(-1, keepdim=True)
    scale, zero = ((high - low) / levels).to(stored).to(x.dtype), low.to(stored).to(x.dtype)
    return torch.where(kept, x.half().to(x.dtype), _rounded(x, zero, scale, levels))


def _rounded(x: Tensor, zero: Tensor, scale: Tensor, levels: int) -> Tensor:
    code = ((x - zero) / torch.where(scale > 0, scale, 1)).round().clamp(0, levels)
    return code * scale + zero


def _extremes(x: Tensor, kept: Tensor, index: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return the least and largest number of each channel of each group, without outliers, ``[..., groups, D]``."""
    size = (*x.shape[:-2], groups, x.shape[-1])
    low = x.new_full(size, torch.inf).scatter_reduce(-2, index, torch.where(kept, torch.inf, x), "amin")
    high = x.new_full(size, -torch.inf).scatter_reduce(-2, index, torch.where(kept, -torch.inf, x), "amax")
    there = low <= high  # not so of a group without members, or of a channel whose numbers are all outliers
    return torch.where(there, low, 0), torch.where(there, high, 0)


def _outliers_of_groups(x: Tensor, group: Tensor, groups: int, share: float) -> Tensor:
    """Return which numbers of each group's keys stay in full precision, bool ``[..., n, D]``.

    They are the farthest from the mean of their channel, in units of the channel's standard deviation in the group.
    """
    kept = torch.zeros_like(x, dtype=torch.bool)
    for number in range(groups):
        inside = (group == number)[..., None]  # [..., n, 1]
        count = inside.sum(-2, keepdim=True).clamp(min=1)
        off = torch.where(inside, x - torch.where(inside, x, 0).sum(-2, keepdim=True) / count, 0)
        spread = (off.square().sum(-2, keepdim=True) / count).sqrt()
        distance = torch.where(inside, _deviations(off, spread), -1).flatten(-2)
        most = (inside.sum((-2, -1)) * x.shape[-1] * share + 0.5).long()
        kept |= _largest(distance, most).view_as(x)
    return kept


def _deviations(off: Tensor, spread: Tensor) -> Tensor:
    """Return distances from the mean in units of the spread, in steps of 1/4096.

    Of two numbers both are equally far from their mean: the steps make that a tie, which rounding does not decide.
    """
    return (off.abs() / torch.where(spread > 0, spread, 1) * 4096).round()


def _largest(distance: Tensor, most: Tensor) -> Tensor:
    """Return which `most` ``[...]`` entries of the last axis are the largest, of equal ones the first."""
    order = distance.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    return rank < most[..., None]


def _count(share: float, entries: int) -> int:
    """Return how many of so many numbers a share is, rounded to the nearest."""
    return int(share * entries + 0.5)
