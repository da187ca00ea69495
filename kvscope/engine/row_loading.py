"""Load attention rows of a trace on a device: read and checked on a CPU, by any thread, then copied and unpacked there.

Every weight is copied once, in the type in which it is stored, in one copy for a block of all layers of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from kvscope.core.errors import ReplayError
from kvscope.kernels import shared
from kvscope.kernels.device import staging, to_device
from kvscope.trace.reader import Trace


class Placed(NamedTuple):
    """A block of rows on a device.

    Attributes
    ----------
    rows : Tensor
        float32 ``[L, H, b, n]``, zero above the diagonal.
    sums : Tensor or None
        float32 ``[L, H, b]``: sum of every row before rounding, where that was computed with the rows.
    """

    rows: Tensor
    sums: Tensor | None = None


@dataclass(frozen=True)
class HostBlock:
    """A block of rows in the memory of the CPU.

    Attributes
    ----------
    start, stop : int
        Range of steps.
    place : callable
        Returns the rows on the device; called once, on the thread that uses them.
    """

    start: int
    stop: int
    place: Callable[[], Placed]


class RowLoader(Protocol):
    """Reads blocks of rows of some layers of one sequence."""

    def bytes(self, start: int, stop: int) -> int:
        """Return about how many bytes a `HostBlock` of these steps takes."""

    def read(self, start: int, stop: int) -> HostBlock:
        """Read steps `start` to `stop` - 1, on any thread.

        Raises
        ------
        TraceError, ReplayError
            If the trace is damaged, or a weight is negative or not a finite number.
        """


@dataclass(frozen=True)
class LayersOnDisk:
    """The layers of one sequence whose rows are loaded.

    Attributes
    ----------
    trace : Trace
        Recorded attention.
    sequence : int
        Number of the sequence.
    layers : sequence of int
        Numbers of the ``L`` layers.
    device : torch.device
        Device of the rows.
    """

    trace: Trace
    sequence: int
    layers: Sequence[int]
    device: torch.device


@dataclass(frozen=True)
class WholeRows(LayersOnDisk):
    """Loads float32 rows with their zeros: what the CPU computes on, and rows that are rebuilt (store ``topk``)."""

    def bytes(self, start: int, stop: int) -> int:
        """Return how many bytes the rows of these steps take."""
        return 4 * len(self.layers) * self.trace.heads_of(self.layers[0]).heads * (stop - start) * stop

    def read(self, start: int, stop: int) -> HostBlock:
        """Read steps `start` to `stop` - 1; raises as `layer_rows`."""
        positions = range(len(self.layers))
        rows = list(shared(lambda position: self.layer_rows(position, start, stop), positions))
        shape = (len(rows), *rows[0].shape)
        stacked = torch.stack(rows, out=staging(shape, torch.float32, self.device))
        return HostBlock(start, stop, lambda: Placed(to_device(stacked, self.device)))

    def layer_rows(self, position: int, start: int, stop: int) -> Tensor:
        """Return the rows of the layer at `position`, ``[H, stop - start, stop]``, on the CPU.

        Raises
        ------
        ReplayError
            If a weight is negative, or not a finite number.
        """
        rows = torch.from_numpy(self.trace.attention(self.sequence, self.layers[position], start, stop))
        low, high = (float(extreme) for extreme in torch.aminmax(rows))
        if not (low >= 0 and high < torch.inf):  # written so that NaN is refused too
            what = "negative weights" if low < 0 else "weights that are not numbers"
            raise ReplayError(
                f"{self.trace.path} holds {what} between steps {start} and {stop - 1}",
                f"Check it with: kvscope info {self.trace.path} --verify, or record it again.",
            )
        return rows


@dataclass(frozen=True)
class PackedRows(LayersOnDisk):
    """Loads rows of a trace that `holds_rows` as they are stored, without zeros, and unpacks them on the device."""

    def bytes(self, start: int, stop: int) -> int:
        """Return about how many bytes the weights of these steps take."""
        return 2 * len(self.layers) * self.trace.heads_of(self.layers[0]).heads * (stop - start) * stop

    def read(self, start: int, stop: int) -> HostBlock:
        """Read steps `start` to `stop` - 1; raises as `RowLoader.read`."""
        parts = [self.trace.stored_rows(self.sequence, layer, start, stop) for layer in self.layers]
        ends = np.cumsum([part.weights.size for part in parts])
        weights = staging((int(ends[-1]),), torch.float16, self.device)
        place = staging((2, len(parts), *parts[0].first.shape), torch.int64, self.device)  # first weight, and count
        for number, (part, end) in enumerate(zip(parts, ends.tolist(), strict=True)):
            start_of = end - part.weights.size
            weights.numpy()[start_of:end] = part.weights
            place.numpy()[0, number] = part.first + start_of
            place.numpy()[1, number] = part.sizes
        return HostBlock(start, stop, lambda: self._place(weights, place, stop))

    def _place(self, weights: Tensor, place: Tensor, stop: int) -> Placed:
        first, count = to_device(place, self.device).unbind()
        return Placed(unpacked(to_device(weights, self.device), first, count, stop))


def unpacked(weights: Tensor, first: Tensor, count: Tensor, n: int) -> Tensor:
    """Return rows ``[..., n]`` in float32 from lists of weights, with zeros after the end of each list.

    Parameters
    ----------
    weights : Tensor
        ``[N]``: all lists.
    first, count : Tensor
        int64 ``[...]``: place of the first weight of each row, and its number of weights; at most `n`.
    n : int
        Number of keys.
    """
    key = torch.arange(n, device=weights.device)
    inside = key < count[..., None]
    index = torch.where(inside, first[..., None] + key, 0)
    padded = weights if weights.numel() else weights.new_zeros(1)
    return torch.where(inside, padded[index], 0).to(torch.float32)
