"""Random numbers that depend only on seed, sequence, layer, head and position, not on the order of the draws."""

from __future__ import annotations

import torch
from torch import Tensor


def draw(seed: int, sequence: int, layers: Tensor, heads: int, position: int) -> Tensor:
    """Return one uniform number in [0, 1) for each layer and head, float64 ``[L, heads]``.

    Counter-based (SplitMix64, Steele et al. 2014).
    """
    return _uniform(_mix(_heads(seed, sequence, layers, heads) ^ position))


def draws(seed: int, sequence: int, layers: Tensor, heads: int, positions: Tensor) -> Tensor:
    """Return what `draw` returns for each of the positions ``[b]``, float64 ``[L, heads, b]``."""
    return _uniform(_mix(_heads(seed, sequence, layers, heads)[..., None] ^ positions))


def draw_row(seed: int, sequence: int, layers: Tensor, heads: int, position: int) -> Tensor:
    """Return one uniform number in [0, 1) for each layer, head and key up to `position`, float64 ``[L, heads, n]``."""
    key = torch.arange(position + 1, dtype=torch.int64, device=layers.device)
    state = _mix(_heads(seed, sequence, layers, heads) ^ position)
    return _uniform(_mix(state[..., None] ^ key))


def _heads(seed: int, sequence: int, layers: Tensor, heads: int) -> Tensor:
    head = torch.arange(heads, dtype=torch.int64, device=layers.device)
    value = _mix(torch.tensor(seed, dtype=torch.int64, device=layers.device))
    for part in (torch.tensor(sequence, device=layers.device), layers[:, None], head[None, :]):
        value = _mix(value ^ part)
    return value


def _uniform(value: Tensor) -> Tensor:
    return ((value >> 11) & (2**53 - 1)).to(torch.float64) / 2**53


def _mix(value: Tensor) -> Tensor:
    value = value + -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed integer
    value = (value ^ _shift(value, 30)) * -0x40A7B892E31B1A47
    value = (value ^ _shift(value, 27)) * -0x6B2FB644ECCEEE15
    return value ^ _shift(value, 31)


def _shift(value: Tensor, by: int) -> Tensor:
    """Return `value` shifted right logically; the shift of torch is arithmetic."""
    return (value >> by) & ((1 << (64 - by)) - 1)
