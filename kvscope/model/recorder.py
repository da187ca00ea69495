"""Turn attention calls into the blocks of a trace: rows or their heaviest keys, norms, similarities, vectors."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from kvscope.core.errors import ModelError
from kvscope.model.attention_hook import Call
from kvscope.model.call_parts import Heads, is_causal, own_vectors, placed, refuse_other_masks
from kvscope.model.copies import HostCopies
from kvscope.model.key_cosines import KeyCosines
from kvscope.model.outputs import OutputProjection
from kvscope.model.packed_rows import PackedRows
from kvscope.model.packing import VECTOR_DTYPES, Packer, copied_vectors, fits
from kvscope.model.pipeline import BLOCK, Pipeline, Write
from kvscope.trace.columns import VectorType
from kvscope.trace.schema import MAPS, STORES, STRETCH, TOPK, VECTORS, parse_store
from kvscope.trace.writer import TraceWriter

NONE: Mapping[int, OutputProjection] = MappingProxyType({})
HELD_STEPS = 32  # decoding steps of a layer that are recomputed and written as one block


@dataclass
class _Layer:
    """State of one layer in the current sequence: tokens seen, and decoding steps that wait to be written together."""

    cosines: KeyCosines
    seen: int = 0
    queries: list[Tensor] = field(default_factory=list)  # of the waiting steps, [1, H, 1, D] each
    hidden: list[Tensor] = field(default_factory=list)  # layer inputs of the waiting steps, [1, 1, hidden] each
    newest: Call | None = None  # the last waiting call; its keys include those of the others
    sums: Tensor | None = None  # [2, H, seen]: column sums since the last stretch, of whole rows and outside the top K


class Recorder:
    """An observer that writes the attention calls of a model to a trace, one sequence at a time.

    Several decoding steps are recomputed together from the last call: the full cache then holds the keys of all.

    Parameters
    ----------
    writer : TraceWriter
        Writes the blocks.
    layers : collection of int
        Layers to record.
    query_block : int
        Most queries whose rows are computed at a time; rows take ``H x query_block x T`` numbers. Blocks are smaller
        where they would not fit into `BLOCK` bytes.
    store : str
        One of `STORES`, or ``topk:K``.
    hidden : bool
        Whether to write layer inputs too.
    heads : sequence of int
        Query heads to record, in whole groups that share keys and values; empty for all.
    query_stride : int
        Record every n-th row.
    vector_dtype : {"float32", "float16", "bfloat16"}
        Type in which vectors and layer inputs are written, as in the header.
    projections : mapping of int to OutputProjection
        Output projection of each layer, to write the norms of values after it; empty to write none.
    pipeline : Pipeline, optional
        Writes blocks in threads; without it each block is written before the model continues.
    """

    def __init__(
        self,
        writer: TraceWriter,
        layers: Collection[int],
        query_block: int = 128,
        *,
        store: str = MAPS,
        hidden: bool = False,
        heads: Sequence[int] = (),
        query_stride: int = 1,
        vector_dtype: VectorType = "float32",
        projections: Mapping[int, OutputProjection] = NONE,
        pipeline: Pipeline | None = None,
    ) -> None:
        name, self._top = parse_store(store)
        self.writer, self.query_block, self._stored = writer, query_block, frozenset(STORES[name])
        self._inputs, self._stride, self._dtype = hidden, query_stride, vector_dtype
        self._heads = Heads(heads) if heads else None
        self._projections = {layer: own.of_heads(heads) if heads else own for layer, own in projections.items()}
        self._put = _write_now if pipeline is None else pipeline.put
        self._packer, self._rows = Packer(), PackedRows()
        self._selected = frozenset(layers)
        self._layers: dict[int, _Layer] = {}
        self._sequence = self._prompt = 0

    @property
    def reads_inputs(self) -> bool:
        """Whether calls must have `Call.hidden`."""
        return self._inputs

    def begin(self, sequence: int, prompt: int = 0) -> None:
        """Start a sequence with `prompt` tokens of prompt; call `end` for the previous sequence first."""
        self._sequence, self._prompt = sequence, prompt
        self._layers = {layer: _Layer(KeyCosines(self._heads)) for layer in self._selected}

    def end(self) -> None:
        """Write the waiting steps and column sums of the sequence."""
        for layer, state in sorted(self._layers.items()):
            self._flush(state)
            self._write_columns(layer, state)

    def __call__(self, call: Call) -> None:
        """Record one attention call of batch size one.

        Raises
        ------
        ModelError
            If rows are not stored and cannot be recomputed from vectors: the mask is not causal within the window. With
            a pipeline a later call of it raises this.
        """
        if call.layer not in self._selected:
            return
        state = self._layers[call.layer]
        full = call.key.shape[2] == state.seen + len(state.queries) + 1  # not so if the cache is a window's
        if full and call.query.shape[2] == 1 and call.mask is None and call.sliding_window is None:
            state.queries.append(call.query)
            state.hidden += [] if call.hidden is None else [call.hidden]
            state.newest = call
            if "similarity" in self._stored:
                state.cosines.hold(call, state.seen + len(state.queries))
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
        part = call if self._heads is None else self._heads.of(call)
        if "similarity" in self._stored:
            state.cosines.hold(call, state.seen)
        for start, stop in self._blocks(first, count, part):
            if "maps" in self._stored:
                self._write_rows(part, first, start, stop)
            elif TOPK in self._stored:
                self._write_topk(part, state, first, start, stop)
            else:
                self._require_causal(call, start, stop)
            if "value_l1" in self._stored:
                self._write_signals(call, part, state, first, start, stop)
            if "vectors:keys" in self._stored:
                self._write_vectors(part, first, start, stop)
            if self._projections:
                self._write_outputs(part, first, start, stop)
            if self._inputs:
                self._write_hidden(call, first, start, stop)

    def _blocks(self, first: int, count: int, call: Call) -> Iterator[tuple[int, int]]:
        """Yield the first and last query of each block; with store topk, blocks also end where a stretch ends."""
        size = max(1, min(self.query_block, BLOCK // self._bytes(call, first + count)))
        start = 0
        while start < count:
            stop = min(start + size, count)
            if self._top is not None:
                ends = (self._prompt, (first + start) // STRETCH * STRETCH + STRETCH)
                stop = min(stop, *(end - first for end in ends if end > first + start))
            yield start, stop
            start = stop

    def _bytes(self, call: Call, keys: int) -> int:
        """Return the most bytes that one query passes to the pipeline in one call."""
        heads, size = call.query.shape[1], call.query.shape[3]
        vectors = VECTOR_DTYPES[self._dtype].itemsize * size * (heads + 2 * call.key.shape[1])
        rows = 2 * heads * keys if "maps" in self._stored else 0
        return max(vectors, rows, 6 * heads * min(self._top or 0, keys))

    def _write_rows(self, call: Call, first: int, start: int, stop: int) -> None:
        """Write the rows of queries `start` to `stop` - 1 of a call whose first query is position `first`."""
        skipped = -(first + start + 1) % self._stride  # rows before the next recorded one
        wanted = range(start + skipped, stop, self._stride)
        if wanted:
            tensors, position = self._rows.of(call, first, start, wanted), first + wanted.start
            write = partial(self.writer.packed_attention, call.layer, self._sequence, position, stride=self._stride)
            self._put(("attention", call.layer), write, tensors)

    def _write_topk(self, call: Call, state: _Layer, first: int, start: int, stop: int) -> None:
        """Write the heaviest keys of these queries, and the column sums where a stretch of rows ends."""
        assert self._top is not None
        rows, log_sums = call.rows_and_log_sums(start, stop)
        rows, last = placed(rows[0], call, first)[..., : first + stop], first + stop
        position = torch.arange(first + start, last, device=rows.device)
        row_sum, sums = rows.sum(-1), rows.sum(1)
        rows = rows.masked_fill(torch.arange(last, device=rows.device) > position[:, None], -1)
        keys = rows.topk(min(self._top, last), sorted=False).indices.sort(-1).values  # later keys come last
        weights = rows.gather(-1, keys)
        rows.scatter_(-1, keys, 0).clamp_(min=0)
        tensors = {
            "keys": keys.int(),
            "weights": weights.half(),
            "row_sum": row_sum,
            "residual": rows.sum(-1),
            "log_sum_exp": log_sums[0],
        }
        self._put((TOPK, call.layer), partial(self.writer.topk, call.layer, self._sequence, first + start), tensors)
        both = torch.stack([sums, rows.sum(1)])
        if state.sums is not None:
            both[..., : state.sums.shape[-1]] += state.sums
        state.sums = both
        if last == self._prompt or last % STRETCH == 0:
            self._write_columns(call.layer, state)

    def _write_columns(self, layer: int, state: _Layer) -> None:
        if state.sums is not None:
            write = partial(self.writer.columns, layer, self._sequence, state.sums.shape[-1] - 1)
            self._put(("columns", layer), write, {"sums": state.sums[0], "outside": state.sums[1]})
            state.sums = None

    def _write_signals(self, call: Call, part: Call, state: _Layer, first: int, start: int, stop: int) -> None:
        """Write norms and cosines of the keys and values of `part`, and the mean over all query heads of `call`."""
        position = first + start
        key, value = (tensor.float() for tensor in own_vectors(part, start, stop))
        signals = {"value_l1": value.abs().sum(-1), "value_l2": value.norm(dim=-1), "key_l2": key.norm(dim=-1)}
        if "similarity" in self._stored:
            cosines = state.cosines.of(part, key, signals["key_l2"], position, state.seen)
            signals["cosines"] = self._packer.packed(cosines, range(position, position + key.shape[1]))
        self._put(("keys", call.layer), partial(self.writer.keys, call.layer, self._sequence, position), signals)
        mean = {"mean_query": call.query[0, :, start:stop].float().mean(0)}
        self._put(("queries", call.layer), partial(self.writer.queries, call.layer, self._sequence, position), mean)

    def _write_outputs(self, call: Call, first: int, start: int, stop: int) -> None:
        """Write the norms of the values at these positions after the output projection."""
        values = own_vectors(call, start, stop)[1].to(call.exact)
        write = partial(self.writer.key_numbers, "outputs", call.layer, self._sequence, first + start)
        self._put(("outputs", call.layer), write, {"value_out_l1": self._projections[call.layer].norms(values)})

    def _write_hidden(self, call: Call, first: int, start: int, stop: int) -> None:
        """Write the layer inputs of these queries, exactly."""
        if call.hidden is None:
            raise ModelError(
                f"the input of the attention of layer {call.layer} cannot be observed",
                "Record the trace without --hidden.",
            )
        self._require_exact(call.layer, call.hidden.dtype)
        write = partial(self.writer.hidden, call.layer, self._sequence, first + start)
        inputs = copied_vectors(call.hidden[:, start:stop], self._dtype)[0]
        self._put(("hidden", call.layer), write, {"inputs": inputs})

    def _write_vectors(self, call: Call, first: int, start: int, stop: int) -> None:
        """Write queries `start` to `stop` - 1 of a call, and the keys and values at their positions, exactly."""
        parts = call.query[0, :, start:stop], *own_vectors(call, start, stop)
        vectors: dict[str, Tensor] = dict(zip(VECTORS, parts, strict=True))
        for part in vectors.values():
            self._require_exact(call.layer, part.dtype)
        write = partial(self.writer.vectors, call.layer, self._sequence, first + start)
        tensors = {name: copied_vectors(part, self._dtype) for name, part in vectors.items()}
        self._put(("states", call.layer), write, tensors)

    def _require_exact(self, layer: int, dtype: torch.dtype) -> None:
        if not fits(dtype, self._dtype):
            raise ModelError(
                f"layer {layer} has vectors of {dtype}, which {self._dtype} does not represent exactly",
                "Record the trace with --dtype float32.",
            )

    def _require_causal(self, call: Call, start: int, stop: int) -> None:
        """Raise ModelError unless queries `start` to `stop` - 1 see exactly the keys up to their own in the window.

        The mask is compared on its device, and the answer is read by the thread that writes the vectors of the layer.
        """
        if call.mask is not None:
            correct = is_causal(call, call.mask, start, stop)
            self._put(("states", call.layer), partial(refuse_other_masks, call.layer), {"correct": correct})


def _write_now(key: Hashable, write: Write, tensors: Mapping[str, Tensor]) -> None:
    write(**HostCopies().start(tensors).wait())
