"""From attention calls to the blocks of a trace: rows, norms, similarities, mean queries."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvscope.model.attention_hook import Call
from kvscope.trace.writer import TraceWriter

HELD_STEPS = 32  # decoding steps of a layer that are written as one block


@dataclass
class _Layer:
    """What one layer has of the current sequence: how far it is, and the steps that wait to be written."""

    seen: int = 0
    directions: Tensor | None = None  # unit keys [G, seen, D], in a buffer that grows by doubling
    first: int = 0
    waiting: list[dict[str, NDArray[Any]]] = field(default_factory=list)


class Recorder:
    """Writes what it observes, for one sequence at a time.

    Parameters
    ----------
    writer : TraceWriter
        Where blocks go.
    layers : collection of int
        Layers to record.
    query_block : int
        Queries whose rows exist at a time; the memory for rows is ``H x query_block x T``.
    """

    def __init__(self, writer: TraceWriter, layers: Collection[int], query_block: int = 128) -> None:
        self.writer, self.query_block = writer, query_block
        self._wanted = frozenset(layers)
        self._layers: dict[int, _Layer] = {}
        self._sequence = 0

    def begin(self, sequence: int) -> None:
        """Start a sequence; the one before has been finished with `end`."""
        self._sequence = sequence
        self._layers = {layer: _Layer() for layer in self._wanted}

    def end(self) -> None:
        """Write what still waits."""
        for layer in sorted(self._layers):
            self._flush(layer)

    def __call__(self, call: Call) -> None:
        """Record one attention call of batch size one."""
        if call.layer not in self._wanted:
            return
        state = self._layers[call.layer]
        first, count = state.seen, call.query.shape[2]
        state.seen += count
        offset = state.seen - call.key.shape[2]  # a sliding-window cache has dropped this many keys
        if count == 1:
            self._hold(call, state, first, offset)
            return
        self._flush(call.layer)
        for start in range(0, count, self.query_block):
            stop = min(start + self.query_block, count)
            rows = _placed(call.rows(start, stop)[0], offset)[..., : first + stop]
            self.writer.attention(call.layer, self._sequence, first + start, rows.cpu().numpy())
            key, value = (part[0, :, -count:][:, start:stop].float() for part in (call.key, call.value))
            self._write(
                call.layer, first + start, self._signals(state, key, value, call.query[0, :, start:stop], first + start)
            )

    def _hold(self, call: Call, state: _Layer, first: int, offset: int) -> None:
        if not state.waiting:
            state.first = first
        row = _placed(call.rows(0, 1)[0], offset)
        key, value = call.key[0, :, -1:].float(), call.value[0, :, -1:].float()
        block = self._signals(state, key, value, call.query[0], first)
        state.waiting.append({"rows": row.cpu().numpy(), **block})
        if len(state.waiting) >= HELD_STEPS:
            self._flush(call.layer)

    def _flush(self, layer: int) -> None:
        state = self._layers[layer]
        if not state.waiting:
            return
        last = state.first + len(state.waiting)
        joined: dict[str, NDArray[Any]] = {}
        for name in state.waiting[0]:
            parts = [step[name] for step in state.waiting]
            if name in ("rows", "similarity"):
                parts = [np.pad(part, ((0, 0), (0, 0), (0, last - part.shape[2]))) for part in parts]
            joined[name] = np.concatenate(parts, axis=0 if name == "mean_query" else 1)
        state.waiting = []
        self.writer.attention(layer, self._sequence, state.first, joined.pop("rows"))
        self._write(layer, state.first, joined)

    def _write(self, layer: int, first: int, block: dict[str, NDArray[Any]]) -> None:
        mean_query = block.pop("mean_query")
        self.writer.keys(layer, self._sequence, first, **block)
        self.writer.queries(layer, self._sequence, first, mean_query)

    def _signals(self, state: _Layer, key: Tensor, value: Tensor, query: Tensor, first: int) -> dict[str, NDArray[Any]]:
        """Return norms ``[G, n]``, cosines with the keys so far ``[G, n, first + n]``, mean queries ``[n, D]``."""
        norm = key.norm(dim=-1)
        unit = key / norm.clamp(min=torch.finfo(norm.dtype).tiny)[..., None]
        last = first + key.shape[1]
        state.directions = _room(state.directions, unit, last)
        state.directions[:, first:last] = unit
        cosines = unit @ state.directions[:, :last].transpose(1, 2)
        return {
            "value_l1": value.abs().sum(-1).cpu().numpy(),
            "value_l2": value.norm(dim=-1).cpu().numpy(),
            "key_l2": norm.cpu().numpy(),
            "similarity": cosines.clamp_(-1, 1).cpu().numpy(),
            "mean_query": query.float().mean(0).cpu().numpy(),
        }


def _placed(rows: Tensor, offset: int) -> Tensor:
    """Put rows over the newest keys to their positions: zeros for the keys that the cache has dropped."""
    return torch.nn.functional.pad(rows, (offset, 0)) if offset else rows


def _room(buffer: Tensor | None, like: Tensor, size: int) -> Tensor:
    """Return the buffer, with room for `size` positions."""
    if buffer is not None and buffer.shape[1] >= size:
        return buffer
    grown = like.new_zeros(like.shape[0], max(size, 2 * (0 if buffer is None else buffer.shape[1]), 256), like.shape[2])
    if buffer is not None:
        grown[:, : buffer.shape[1]] = buffer
    return grown
