"""What a simulation is stepped through: the sizes of a group of layers, and its rows, block by block."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """Sizes of a group of layers of one sequence, and the numbers of both.

    Attributes
    ----------
    layers : tuple of int
        Layer numbers, ``L`` of them; draws depend on the number, not on the grouping.
    heads, kv_heads : int
        ``H`` and ``G``.
    prompt, length : int
        ``P`` and ``T``.
    sequence : int
        Number of the sequence.
    windows : tuple of int or None
        For each layer, the number of newest keys the model itself can see (sliding-window layers), or None.
    n_layers : int
        Layers of the model; 0 where the group has all of them.
    """

    layers: tuple[int, ...]
    heads: int
    kv_heads: int
    prompt: int
    length: int
    sequence: int = 0
    windows: tuple[int | None, ...] = ()
    n_layers: int = 0

    def reach(self) -> list[int]:
        """Return how many keys each layer can see at most, ``L`` numbers."""
        windows = self.windows or (None,) * len(self.layers)
        return [self.length if window is None else min(window, self.length) for window in windows]


class Block:
    """Rows of successive steps, and what all simulations of them share.

    Parameters
    ----------
    rows : Tensor
        Full rows ``[L, H, b, n]`` of steps `start` to ``start + b - 1``; a leading ``R`` where runs differ.
    start : int
        First step.
    missing : Tensor or None
        ``[L, H, b]``, mass that a learned sink takes; a leading ``R`` as the rows.
    """

    def __init__(self, rows: Tensor, start: int, missing: Tensor | None = None) -> None:
        self.rows, self.start, self.missing = rows, start, missing

    def row(self, t: int) -> Tensor:
        """Return the row of step `t`, ``[., L, H, t + 1]``."""
        return self.rows[..., t - self.start, : t + 1]

    def normalised_row(self, t: int) -> Tensor:
        """Return the live row of step `t` if nothing has been evicted, ``[1 or R, L, H, t + 1]``."""
        row = self._normalised[..., t - self.start, : t + 1]
        return row if row.ndim == 4 else row[None]

    @cached_property
    def _normalised(self) -> Tensor:
        return renormalise(self.rows, None if self.missing is None else self.missing[..., None])


def renormalise(kept: Tensor, missing: Tensor | None = None) -> Tensor:
    """Return rows divided by their sum over the last axis, plus the mass a learned sink takes.

    A row without any mass stays zero: recorded weights can underflow. Sums are made in double, so that their order, and
    with it the number of threads or the kernel, changes no decision.
    """
    total = kept.sum(-1, keepdim=True, dtype=torch.float64)
    if missing is not None:
        total = total + missing
    total = total.to(kept.dtype)
    return kept / torch.where(total > 0, total, 1)
