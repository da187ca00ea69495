"""Recompute attention rows on a device from the vectors of a trace: what `kvscope.trace.derive` does on a CPU.

Computed in float64 and rounded once, so that the order of summation, which differs between devices, changes a row only
where the error of float64 crosses a rounding boundary of float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvscope.engine.row_loading import HostBlock, Placed
from kvscope.kernels.device import staging, to_device
from kvscope.trace.layer_records import LayerAttention
from kvscope.trace.reader import Trace


class RecomputedRows:
    """Loads queries and keys, each once and exactly, and computes rows on the device.

    Parameters
    ----------
    trace : Trace
        A trace with queries and keys.
    sequence : int
        Number of the sequence.
    layers : sequence of int
        Numbers of the ``L`` layers.
    device : torch.device
        Device of the rows; it must have float64.
    """

    def __init__(self, trace: Trace, sequence: int, layers: Sequence[int], device: torch.device) -> None:
        self._trace, self._sequence, self._layers, self._device = trace, sequence, list(layers), device
        self._heads = trace.heads_of(layers[0])
        self._how = [trace.header.attention_of(layer) for layer in layers]
        self._keys: Tensor | None = None  # [L, G, T, D]
        self._known = 0  # keys up to this position are on the device
        self._sinks: list[Tensor | None] = []

    def bytes(self, start: int, stop: int) -> int:
        """Return how many bytes the queries and keys of these steps take."""
        own = self._heads
        return 4 * len(self._layers) * (own.heads + own.kv_heads) * (stop - start) * own.head_dim

    def read(self, start: int, stop: int) -> HostBlock:
        """Read queries and keys of steps `start` to `stop` - 1; raises as `RowLoader.read`."""
        vectors = self._read(("queries", "keys"), start, stop)
        return HostBlock(start, stop, lambda: self._place(vectors, start, stop))

    def _read(self, names: Sequence[str], start: int, stop: int) -> Tensor:
        """Return vectors of all layers, ``[L, heads of all names, stop - start, D]``."""
        trace, layers, own = self._trace, self._layers, self._heads
        heads = sum(own.heads if name == "queries" else own.kv_heads for name in names)
        buffer = staging((len(layers), heads, stop - start, own.head_dim), torch.float32, self._device)
        for number, layer in enumerate(layers):
            first = 0
            for name in names:
                part = trace.vectors(self._sequence, layer, "queries" if name == "queries" else "keys", start, stop)
                buffer.numpy()[number, first : first + len(part)] = part
                first += len(part)
        return buffer

    def _place(self, vectors: Tensor, start: int, stop: int) -> Placed:
        vectors = to_device(vectors, self._device)
        heads = self._heads.heads
        queries, keys = vectors[:, :heads], self._with_keys(vectors[:, heads:], start, stop)
        rows = vectors.new_zeros(*queries.shape[:3], stop)
        sums = vectors.new_empty(queries.shape[:3])
        for number, how in enumerate(self._how):
            sums[number] = attend(queries[number], keys[number], start, how, rows[number], self._sinks[number])
        return Placed(rows, sums)

    def _with_keys(self, new: Tensor, start: int, stop: int) -> Tensor:
        """Return the keys before `stop`, ``[L, G, stop, D]``, after storing those of the block."""
        if self._keys is None:
            length = self._trace.sequences[self._sequence].length
            self._keys = new.new_empty(*new.shape[:2], length, new.shape[3])
            self._sinks = [
                None if how.sinks is None else torch.tensor(how.sinks, dtype=torch.float64, device=self._device)
                for how in self._how
            ]
        if start > self._known:  # a block was skipped
            skipped = self._read(("keys",), self._known, start)
            self._keys[:, :, self._known : start] = to_device(skipped, self._device)
        self._keys[:, :, start:stop] = new
        self._known = max(self._known, stop)
        return self._keys[:, :, :stop]


def attend(
    query: Tensor, key: Tensor, first: int, layer: LayerAttention, rows: Tensor, sinks: Tensor | None = None
) -> Tensor:
    """Write the attention of some queries into `rows`, and return the sum of each row, float32 ``[H, b]``.

    Parameters
    ----------
    query : Tensor
        float32 ``[H, b, D]``, queries of positions `first` to ``first + b - 1``.
    key : Tensor
        float32 ``[G, first + b, D]``, keys from position 0 on.
    first : int
        Position of the first query.
    layer : LayerAttention
        How the layer turns logits into weights.
    rows : Tensor
        float32 zeros ``[H, b, first + b]``; row ``i`` is filled with the weights on keys ``0..first + i``.
    sinks : Tensor or None
        float64 ``[H]``: the layer's learned sinks, on the device.
    """
    (heads, count, size), (groups, last, _) = query.shape, key.shape
    window = layer.sliding_window
    begin = 0 if window is None else max(0, first - window + 1)
    queries = (query.double() * layer.scaling).view(groups, -1, size)
    out = (queries @ key[:, begin:].double().transpose(1, 2)).view(heads, count, last - begin)
    if layer.softcap is not None:
        out.div_(layer.softcap).tanh_().mul_(layer.softcap)
    position = torch.arange(first, last, device=key.device)[:, None]
    keys = torch.arange(begin, last, device=key.device)
    hidden = keys > position if window is None else (keys > position) | (keys <= position - window)
    peak = out.masked_fill_(hidden, -torch.inf).amax(-1, keepdim=True)  # [H, b, 1]
    if sinks is not None:
        peak = torch.maximum(peak, sinks[:, None, None])
    out.sub_(peak).exp_()
    total = on_keys = out.sum(-1, keepdim=True)
    if sinks is not None:
        total = on_keys + torch.exp(sinks[:, None, None] - peak)
    rows[..., begin:] = out.div_(total)
    return (on_keys / total)[..., 0].to(torch.float32)
