"""A group of layers of one recorded sequence: its sizes, rows and signals, on a device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from kvscope.engine.recomputed_rows import RecomputedRows
from kvscope.engine.row_loading import HostBlock, PackedRows, RowLoader, WholeRows
from kvscope.engine.rows import Shape, own_counts
from kvscope.engine.signals import load_signal
from kvscope.kernels import device as devices
from kvscope.trace.layer_records import LayerHeads
from kvscope.trace.reader import TokenSequence, Trace
from kvscope.trace.schema import TOPK
from kvscope.trace.shared_caches import caches_of, owner_of


class RecordedLayers:
    """Some layers of one sequence of a trace; rows and signals are read on demand.

    Parameters
    ----------
    trace : Trace
        Recorded attention.
    sequence : TokenSequence
        A sequence of the trace.
    layers : sequence of int
        Numbers of the ``L`` layers, which have the same heads (see `head_groups`). A layer that reads the cache of
        another comes after all that own one; with its owner, if what decides is asked for.
    device : torch.device
        Device of the rows and signals.

    Attributes
    ----------
    shape : Shape
        Sizes.
    missing : Tensor or None
        ``[L, H, T]``: what a learned sink takes from each row. Where rows are computed on the device, those of a step
        are known once `place` has returned its row.
    """

    def __init__(self, trace: Trace, sequence: TokenSequence, layers: Sequence[int], device: torch.device) -> None:
        self._trace, self._sequence, self._layers, self._device = trace, sequence.index, list(layers), device
        self._owners = [layer for layer in layers if owner_of(trace.header, layer) == layer]
        assert self._owners == self._layers[: len(self._owners)], "layers that own a cache come first"
        self._tokens, self.shape = sequence, shape_of(trace, sequence, layers, trace.layers)
        self._loader = row_loader(trace, sequence.index, layers, device)
        self.missing = self._missing_mass()
        self._signals: dict[str, Tensor] = {}

    @cached_property
    def caches(self) -> Shape:
        """Sizes of the layers that own a cache; they are the first of the layers."""
        sharing = list(caches_of(self._trace.header))
        if len(sharing) == len(self._trace.layers):
            return self.shape
        return shape_of(self._trace, self._tokens, self._owners, sharing)

    @cached_property
    def cache_of(self) -> list[int]:
        """For each layer the place of the one whose cache it reads."""
        return [self._owners.index(owner_of(self._trace.header, layer)) for layer in self._layers]

    def rows(self, start: int, stop: int) -> Tensor:
        """Return full rows of steps `start` to `stop` - 1, ``[L, H, stop - start, stop]``; raises as `layer_rows`."""
        return self.place(self._loader.read(start, stop))

    def place(self, block: HostBlock) -> Tensor:
        """Return the rows of a block that `row_loader` read, on the device."""
        rows, sums = block.place()
        if self.missing is not None and sums is not None:
            self.missing[..., block.start : block.stop] = (1 - sums).clamp(min=0)
        return rows

    def layer_rows(self, position: int, start: int, stop: int) -> Tensor:
        """Return the full rows of the layer at `position` in the group, ``[H, stop - start, stop]``, on the CPU.

        Raises
        ------
        ReplayError
            If a weight is negative, or not a finite number.
        """
        return WholeRows(self._trace, self._sequence, self._layers, self._device).layer_rows(position, start, stop)

    def signal(self, name: str) -> Tensor:
        """Return a signal as `kvscope.engine.signals.load_signal` reads it; later calls return the same tensor."""
        if name not in self._signals:
            self._signals[name] = load_signal(self._trace, name, self._sequence, self._layers).to(self._device)
        return self._signals[name]

    def _missing_mass(self) -> Tensor | None:
        if not self._trace.header.learned_sinks:
            return None
        if isinstance(self._loader, RecomputedRows):  # the sums come with the rows
            return torch.zeros(len(self._layers), self.shape.heads, self.shape.length, device=self._device)
        sums = [self._trace.row_sums(self._sequence, layer) for layer in self._layers]
        return (1 - torch.from_numpy(np.stack(sums)).to(self._device)).clamp(min=0)


def cache_groups(trace: Trace) -> list[list[list[int]]]:
    """Return the caches of a trace, those together whose layers have the same heads of the same sizes.

    A cache is the layers that read it, the one that owns it first.
    """
    groups: dict[LayerHeads, list[list[int]]] = {}
    for readers in caches_of(trace.header).values():
        groups.setdefault(trace.heads_of(readers[0]), []).append(readers)
    return list(groups.values())


def head_groups(trace: Trace) -> list[list[int]]:
    """Return the layers of a trace, those together that have the same heads, owners of caches first."""
    return [owners_first(trace, caches) for caches in cache_groups(trace)]


def owners_first(trace: Trace, caches: Sequence[Sequence[int]]) -> list[int]:
    """Return the layers that read some caches, those that own one first, each part in order."""
    layers = [layer for readers in caches for layer in readers]
    return sorted(layers, key=lambda layer: (owner_of(trace.header, layer) != layer, layer))


def shape_of(trace: Trace, sequence: TokenSequence, layers: Sequence[int], sharing: Sequence[int]) -> Shape:
    """Return the sizes of some layers of a sequence; `sharing` are the layers that share a budget."""
    windows = tuple(trace.header.sliding_window[trace.layers.index(layer)] for layer in layers)
    return Shape(
        layers=tuple(layers),
        heads=trace.heads_of(layers[0]).heads,
        kv_heads=trace.heads_of(layers[0]).kv_heads,
        prompt=sequence.prompt,
        length=sequence.length,
        sequence=sequence.index,
        windows=windows if any(window is not None for window in windows) else (),
        n_layers=len(sharing),
        places=tuple(sharing.index(layer) for layer in layers),
        chunks=trace.header.chunks_of(layers),
        kv_heads_of=own_counts(trace.heads_of(layer).kv_heads for layer in sharing),
    )


def row_loader(trace: Trace, sequence: int, layers: Sequence[int], device: torch.device) -> RowLoader:
    """Return what reads the rows of some layers of one sequence, and prepares them for a device."""
    if not devices.on_cpu(device):
        if trace.holds_rows:
            return PackedRows(trace, sequence, layers, device)
        if "maps" in trace.stored and TOPK not in trace.header.stored:
            return RecomputedRows(trace, sequence, layers, device)
    return WholeRows(trace, sequence, layers, device)
