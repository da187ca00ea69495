"""The input of a simulation: the sizes of a group of layers, and its attention rows in blocks of steps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvscope.kernels.totals import row_totals


@dataclass(frozen=True)
class Shape:
    """Sizes of a group of layers of one sequence, with the layers' and the sequence's numbers.

    Attributes
    ----------
    layers : tuple of int
        Numbers of the ``L`` layers. Random draws depend on a layer's number, not on its place in the group.
    heads, kv_heads : int
        ``H`` and ``G``.
    prompt, length : int
        ``P`` and ``T``.
    sequence : int
        Number of the sequence.
    windows : tuple of int or None
        For each layer how many newest keys the model can attend to (sliding-window layers), or None for all; empty if
        that is None everywhere.
    n_layers : int
        Layers that share a budget: those of the model that have attention; 0 if the group has all of them.
    places : tuple of int
        Place of each layer of the group among these; empty if it is the layer's number.
    chunks : tuple of int or None
        For each layer the size of the chunks in which the model attends (a query sees the earlier keys of its own
        chunk), or None; empty if that is None everywhere.
    kv_heads_of : tuple of int
        ``G`` of every layer that shares a budget with these, where layers differ; empty if all have equally many.
    """

    layers: tuple[int, ...]
    heads: int
    kv_heads: int
    prompt: int
    length: int
    sequence: int = 0
    windows: tuple[int | None, ...] = ()
    n_layers: int = 0
    places: tuple[int, ...] = ()
    chunks: tuple[int | None, ...] = ()
    kv_heads_of: tuple[int, ...] = ()

    def seen(self, steps: Tensor) -> Tensor:
        """Return how many keys the queries at some positions ``[b]`` can attend to in each layer, int64 ``[L, b]``."""
        whole = steps.long() + 1
        counts = []
        for window, chunk in zip(self._windows, self.chunks or (None,) * len(self.layers), strict=True):
            count = whole if chunk is None else (whole - 1) % chunk + 1
            counts.append(count if window is None else count.clamp(max=window))
        return torch.stack(counts)

    @property
    def _windows(self) -> tuple[int | None, ...]:
        return self.windows or (None,) * len(self.layers)


def own_counts(counts: Iterable[int]) -> tuple[int, ...]:
    """Return the number of heads of each layer, or nothing where all layers have equally many."""
    found = tuple(counts)
    return found if len(set(found)) > 1 else ()


class Block:
    """Rows of consecutive steps; all simulations share their normalised form, which is computed once.

    Parameters
    ----------
    rows : Tensor
        Full rows ``[L, H, b, n]`` of steps `start` to ``start + b - 1``; with a leading axis ``R`` if runs differ.
    start : int
        First step.
    missing : Tensor or None
        ``[L, H, b]``: attention mass on a learned sink; with a leading axis ``R`` if the rows have one.
    """

    def __init__(self, rows: Tensor, start: int, missing: Tensor | None = None) -> None:
        self.rows, self.start, self.missing = rows, start, missing

    def row(self, t: int) -> Tensor:
        """Return the row of step `t`, ``[L, H, t + 1]`` or ``[R, L, H, t + 1]``."""
        return self.rows[..., t - self.start, : t + 1]

    def normalised_row(self, t: int) -> Tensor:
        """Return what the live row of step `t` is while nothing has been evicted, ``[1 or R, L, H, t + 1]``."""
        row = self._normalised[..., t - self.start, : t + 1]
        return row if row.ndim == 4 else row[None]

    @cached_property
    def _normalised(self) -> Tensor:
        return renormalise(self.rows, None if self.missing is None else self.missing[..., None])


def renormalise(kept: Tensor, missing: Tensor | None = None) -> Tensor:
    """Return rows divided by their total: the sum over the last axis plus the attention mass on a learned sink.

    A row whose total is zero, as when recorded weights underflow, remains zero. The order of additions, which depends
    on the number of threads and on the kernel, changes no decision.
    """
    total = row_totals(kept)
    if missing is not None:
        total = total + missing
    total = total.to(kept.dtype)
    return kept / torch.where(total > 0, total, 1)
