"""A group of layers of one recorded sequence: its sizes, rows and signals, on a device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvscope.core.errors import ReplayError
from kvscope.engine.rows import Shape
from kvscope.engine.signals import load_signal
from kvscope.kernels import shared
from kvscope.trace.reader import TokenSequence, Trace


class RecordedLayers:
    """Some layers of one sequence of a trace; rows and signals are read on demand.

    Parameters
    ----------
    trace : Trace
        Recorded attention.
    sequence : TokenSequence
        A sequence of the trace.
    layers : sequence of int
        Numbers of the ``L`` layers.
    device : torch.device
        Device of the rows and signals.

    Attributes
    ----------
    shape : Shape
        Sizes.
    missing : Tensor or None
        ``[L, H, T]``: what a learned sink takes from each row.
    """

    def __init__(self, trace: Trace, sequence: TokenSequence, layers: Sequence[int], device: torch.device) -> None:
        self._trace, self._sequence, self._layers, self._device = trace, sequence.index, list(layers), device
        windows = tuple(trace.header.sliding_window[trace.layers.index(layer)] for layer in layers)
        self.shape = Shape(
            layers=tuple(layers),
            heads=trace.heads,
            kv_heads=trace.kv_heads,
            prompt=sequence.prompt,
            length=sequence.length,
            sequence=sequence.index,
            windows=windows if any(window is not None for window in windows) else (),
            n_layers=len(trace.layers),
        )
        self.missing = self._missing_mass()
        self._signals: dict[str, Tensor] = {}

    def rows(self, start: int, stop: int) -> Tensor:
        """Return full rows of steps `start` to `stop` - 1, ``[L, H, stop - start, stop]``; raises as `layer_rows`."""
        positions = range(len(self._layers))
        return torch.stack(list(shared(lambda position: self.layer_rows(position, start, stop), positions)))

    def layer_rows(self, position: int, start: int, stop: int) -> Tensor:
        """Return the full rows of the layer at `position` in the group, ``[H, stop - start, stop]``.

        Raises
        ------
        ReplayError
            If a weight is negative, or not a finite number.
        """
        rows = torch.from_numpy(self._trace.attention(self._sequence, self._layers[position], start, stop))
        low, high = (float(extreme) for extreme in torch.aminmax(rows))
        if not (low >= 0 and high < torch.inf):  # written so that NaN is refused too
            what = "negative weights" if low < 0 else "weights that are not numbers"
            raise ReplayError(
                f"{self._trace.path} holds {what} between steps {start} and {stop - 1}",
                f"Check it with: kvscope info {self._trace.path} --verify, or record it again.",
            )
        return rows.to(self._device)

    def signal(self, name: str) -> Tensor:
        """Return a signal as `kvscope.engine.signals.load_signal` reads it; later calls return the same tensor."""
        if name not in self._signals:
            self._signals[name] = load_signal(self._trace, name, self._sequence, self._layers).to(self._device)
        return self._signals[name]

    def _missing_mass(self) -> Tensor | None:
        if not self._trace.header.learned_sinks:
            return None
        sums = [self._trace.row_sums(self._sequence, layer) for layer in self._layers]
        return (1 - torch.from_numpy(np.stack(sums)).to(self._device)).clamp(min=0)
