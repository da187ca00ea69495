"""Random numbers that depend only on seed, sequence, layer, head and position, not on the order of the draws."""

from __future__ import annotations

import torch
from torch import Tensor


class Draws:
    """Uniform numbers in [0, 1) for the layers and heads of one sequence.

    Counter-based (SplitMix64, Steele et al. 2014). What does not depend on the position is computed once for each seed.

    Parameters
    ----------
    sequence : int
        Number of the sequence.
    layers : Tensor
        int64 ``[L]``: numbers of the layers.
    length : int
        ``T``.
    """

    def __init__(self, sequence: int, layers: Tensor, length: int) -> None:
        self._sequence, self._layers = sequence, layers
        self._key = torch.arange(length, dtype=torch.int64, device=layers.device)
        self._states: dict[tuple[int, int], Tensor] = {}  # seed and number of heads -> [L, heads]
        self._of_keys: dict[tuple[int, int], Tensor] = {}  # the same -> [T, L, heads]

    def of_key(self, seed: int, heads: int, position: int) -> Tensor:
        """Return one number for each layer and head for the key at `position`, float64 ``[L, heads]``."""
        if (seed, heads) not in self._of_keys:
            state = self._state(seed, heads)
            self._of_keys[seed, heads] = _uniform(_mix(state ^ self._key[:, None, None]))
        return self._of_keys[seed, heads][position]

    def of_row(self, seed: int, heads: int, position: int) -> Tensor:
        """Return one number for each layer, head and key up to `position`, float64 ``[L, heads, n]``."""
        state = _mix(self._state(seed, heads) ^ position)
        return _uniform(_mix(state[..., None] ^ self._key[: position + 1]))

    def _state(self, seed: int, heads: int) -> Tensor:
        if (seed, heads) not in self._states:
            self._states[seed, heads] = _heads(seed, self._sequence, self._layers, heads)
        return self._states[seed, heads]


def draws(seed: int, sequence: int, layers: Tensor, heads: int, positions: Tensor) -> Tensor:
    """Return what `Draws.of_key` returns for each of the positions ``[b]``, float64 ``[L, heads, b]``."""
    return _uniform(_mix(_heads(seed, sequence, layers, heads)[..., None] ^ positions))


def _heads(seed: int, sequence: int, layers: Tensor, heads: int) -> Tensor:
    head = torch.arange(heads, dtype=torch.int64, device=layers.device)
    value = _mix(_mix(torch.full((1, 1), seed, dtype=torch.int64, device=layers.device)) ^ sequence)
    for part in (layers[:, None], head[None, :]):
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
