"""From attention calls to the blocks of a trace: rows, norms, similarities, mean queries, vectors."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from kvscope.errors import ModelError
from kvscope.model.attention_hook import Call
from kvscope.trace.schema import MAPS, STORES, VECTORS
from kvscope.trace.writer import TraceWriter

HELD_STEPS = 32  # decoding steps of a layer that are rebuilt and written as one block
HIDDEN = -1e4  # what an additive mask adds to a hidden logit is below this, in every dtype


@dataclass
class _Layer:
    """What one layer has of the current sequence: how far it is, and the decoding steps that wait for each other."""

    seen: int = 0
    directions: Tensor | None = None  # unit keys [G, seen, D], in a buffer that grows by doubling
    queries: list[Tensor] = field(default_factory=list)  # of the steps that wait, [1, H, 1, D] each
    hidden: list[Tensor] = field(default_factory=list)  # and their inputs, [1, 1, hidden] each
    newest: Call | None = None  # the call of the last of them; its keys are those of all


class Recorder:
    """Writes what it observes, for one sequence at a time.

    Decoding steps are rebuilt together: a cache that only grows holds, at the last of them, the keys of all.

    Parameters
    ----------
    writer : TraceWriter
        Where blocks go.
    layers : collection of int
        Layers to record.
    query_block : int
        Queries whose rows exist at a time; the memory for rows is ``H x query_block x T``.
    store : str
        One of `STORES`: rows and what follows from vectors, or these themselves, or both.
    hidden : bool
        Whether to write layer inputs too.
    """

    def __init__(
        self,
        writer: TraceWriter,
        layers: Collection[int],
        query_block: int = 128,
        *,
        store: str = MAPS,
        hidden: bool = False,
    ) -> None:
        self.writer, self.query_block, self._stored = writer, query_block, frozenset(STORES[store])
        self._inputs = hidden
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
            self._flush(self._layers[layer])

    def __call__(self, call: Call) -> None:
        """Record one attention call of batch size one.

        Raises
        ------
        ModelError
            If rows are not stored and would not follow from the vectors: the mask is not causal within the window.
        """
        if call.layer not in self._wanted:
            return
        state = self._layers[call.layer]
        if call.query.shape[2] == 1 and call.mask is None and call.sliding_window is None:
            state.queries.append(call.query)
            state.hidden += [] if call.hidden is None else [call.hidden]
            state.newest = call
            if len(state.queries) >= min(HELD_STEPS, self.query_block):
                self._flush(state)
            return
        self._flush(state)
        self._write(call, state)

    def _flush(self, state: _Layer) -> None:
        if state.newest is not None:
            hidden = torch.cat(state.hidden, 1) if state.hidden else None
            together = replace(state.newest, query=torch.cat(state.queries, 2), hidden=hidden)
            state.queries, state.hidden, state.newest = [], [], None
            self._write(together, state)

    def _write(self, call: Call, state: _Layer) -> None:
        first, count = state.seen, call.query.shape[2]
        state.seen += count
        for start in range(0, count, self.query_block):
            stop = min(start + self.query_block, count)
            if "maps" in self._stored:
                self._write_rows(call, first, start, stop)
                self._write_signals(call, state, first, start, stop)
            else:
                _require_causal(call, start, stop)
            if "vectors:keys" in self._stored:
                self._write_vectors(call, first, start, stop)
            if self._inputs:
                self._write_hidden(call, first, start, stop)

    def _write_rows(self, call: Call, first: int, start: int, stop: int) -> None:
        """Write the rows of queries `start` to `stop` - 1 of a call whose first query is position `first`."""
        offset = first + call.query.shape[2] - call.key.shape[2]  # keys that a sliding-window cache has dropped
        rows = _placed(call.rows(start, stop)[0], offset)[..., : first + stop]
        sums, half = rows.sum(-1), rows.half()
        del rows  # twice as large as what is written
        self.writer.attention(call.layer, self._sequence, first + start, half.cpu().numpy(), row_sum=sums.cpu().numpy())

    def _write_signals(self, call: Call, state: _Layer, first: int, start: int, stop: int) -> None:
        """Write what follows from the vectors of the same queries."""
        query, key, value = _vectors(call, start, stop)
        self.writer.keys(call.layer, self._sequence, first + start, **self._signals(state, key, value, first + start))
        self.writer.queries(call.layer, self._sequence, first + start, query.mean(0).cpu().numpy())

    def _write_vectors(self, call: Call, first: int, start: int, stop: int) -> None:
        """Write the vectors of the same queries, exactly: float32 holds every number of a 16-bit model."""
        parts = zip(VECTORS, _vectors(call, start, stop), strict=True)
        given = {name: part.cpu().numpy() for name, part in parts}
        self.writer.vectors(call.layer, self._sequence, first + start, **given)

    def _write_hidden(self, call: Call, first: int, start: int, stop: int) -> None:
        """Write the layer inputs of the same queries, exactly."""
        if call.hidden is None:
            raise ModelError(
                f"layer {call.layer} does not show the input of its attention", "Record the trace without --hidden."
            )
        self.writer.hidden(call.layer, self._sequence, first + start, call.hidden[0, start:stop].float().cpu().numpy())

    def _signals(self, state: _Layer, key: Tensor, value: Tensor, first: int) -> dict[str, NDArray[Any]]:
        """Return norms ``[G, n]`` of new keys and values, and cosines with all keys so far ``[G, n, first + n]``."""
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
            "similarity": cosines.clamp_(-1, 1).half().cpu().numpy(),
        }


def _vectors(call: Call, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries `start` to `stop` - 1 of a call, and their own keys and values, ``[heads, n, D]`` in float32."""
    count = call.query.shape[2]
    key, value = (part[0, :, -count:][:, start:stop].float() for part in (call.key, call.value))
    return call.query[0, :, start:stop].float(), key, value


def _require_causal(call: Call, start: int, stop: int) -> None:
    """Raise ModelError if queries `start` to `stop` - 1 see other keys than those up to their own, in their window."""
    if call.mask is None:
        return
    count, keys = call.query.shape[2], call.key.shape[2]
    mask = call.mask[:, :, start:stop, :keys]
    own = torch.arange(start, stop, device=mask.device)[:, None] + keys - count
    key = torch.arange(keys, device=mask.device)
    seen = key <= own
    if call.sliding_window is not None:
        seen &= key > own - call.sliding_window
    right = mask == seen if mask.dtype == torch.bool else torch.where(seen, mask == 0, mask < HIDDEN)
    if not bool(right.all()):
        raise ModelError(
            f"layer {call.layer} has a mask that is not causal within a window: rows do not follow from vectors alone",
            "Record the rows themselves: --store maps.",
        )


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
