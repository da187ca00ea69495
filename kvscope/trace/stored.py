"""Read the signals that a trace stores; every row is checked, so that a file that lacks or changes one is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from kvscope.core.errors import TraceError
from kvscope.trace.blocks import Array, are_weights
from kvscope.trace.columns import VectorType, layer_file
from kvscope.trace.derive import Floats
from kvscope.trace.files import TraceFiles, scatter
from kvscope.trace.members import TOKENS_FILE
from kvscope.trace.record import SequenceRecord, TraceHeader
from kvscope.trace.row_checks import faults_of_sums, faults_of_weights, misplaced
from kvscope.trace.schema import TOPK, Which
from kvscope.trace.vectors import are_finite, from_column, widened

NORMS = ("value_l1", "value_l2", "key_l2")
UNKNOWN_TOKEN = -1  # number of an imported token of which only the text is known
COSINE_TOLERANCE = 1e-2  # by which a cosine of 16 bit may be above 1


class StoredRows(NamedTuple):
    """Some rows of one layer as they are stored: without the zeros above the diagonal.

    Attributes
    ----------
    weights : array
        float16 ``[N]``: the weights of all rows, row after row, in any order of the rows.
    first, sizes : array
        int64 ``[H, b]``: place of a row's first weight in `weights`, and how many weights it has; a row that is not
        stored has none.
    """

    weights: NDArray[np.float16]
    first: NDArray[np.int64]
    sizes: NDArray[np.int64]


class StoredSignals:
    """Reads stored signals of one trace; the methods are those of `Trace`, and raise TraceError for a damaged file."""

    def __init__(self, header: TraceHeader, sequences: Sequence[SequenceRecord], files: TraceFiles) -> None:
        self._header, self._sequences, self._files = header, sequences, files

    def positions(self, start: int, stop: int) -> Array:
        """Return the positions from `start` to `stop` - 1 whose rows were recorded."""
        stride = self._header.query_stride
        return np.arange(start - start % stride + stride - 1, stop, stride)

    def attention(self, sequence: int, layer: int, start: int, stop: int) -> Floats:
        """Return rows `start` to `stop` - 1, float32 ``[H, stop - start, stop]``."""
        name, table = self._of_attention(sequence, layer, start, stop)
        rows = np.zeros((self._header.heads_of(layer).heads, stop - start, stop), np.float32)
        for part in table.to_batches():
            self._weights(name, part)
            scatter(rows, part["head"].to_numpy(), part["position"].to_numpy() - start, part["weights"])
        head, position = table["head"].to_numpy(), table["position"].to_numpy()
        sums = rows.sum(-1)[head, position - start]  # of 32 bit: adding those of 16 bit takes ten times as long
        self._require_sums(name, head, position, sums, table["row_sum"].to_numpy())
        window = self._window(layer)
        if window is not None:
            for query, before in enumerate(range(start - window + 1, stop - window + 1)):
                if before > 0 and rows[:, query, :before].any():
                    raise self._outside(name, window)
        return rows

    def rows(self, sequence: int, layer: int, start: int, stop: int) -> StoredRows:
        """Return rows `start` to `stop` - 1 as they are stored, after the same checks as of `attention`."""
        name, table = self._of_attention(sequence, layer, start, stop)
        first, sizes = np.zeros((2, self._header.heads_of(layer).heads, stop - start), np.int64)
        if table.num_rows == 0:
            return StoredRows(np.empty(0, np.float16), first, sizes)
        part = table.combine_chunks().to_batches()[0]
        weights = self._weights(name, part)
        head, position, window = part["head"].to_numpy(), part["position"].to_numpy(), self._window(layer)
        size = position + 1
        begin = np.cumsum(size, dtype=np.int64) - size
        sums = np.add.reduceat(weights.astype(np.float32), begin)
        self._require_sums(name, head, position, sums, part["row_sum"].to_numpy())
        first[head, position - start], sizes[head, position - start] = begin, size
        if window is not None:
            key = np.arange(len(weights)) - np.repeat(begin, size)
            if weights[key < np.repeat(size - window, size)].any():
                raise self._outside(name, window)
        return StoredRows(weights, first, sizes)

    def of_rows(self, column: str, sequence: int, layer: int) -> Floats:
        """Return a column of the rows of attention, float32 ``[H, T]``; NaN for rows that were not recorded."""
        top = TOPK in self._header.stored
        name = layer_file("topk" if top else "attention", layer)
        length = self._sequences[sequence].length
        recorded = np.arange(length) if top else self.positions(0, length)
        return self._grid(name, "head", column, self._header.heads_of(layer).heads, sequence, recorded)

    def norms(self, column: str, sequence: int, layer: int) -> Floats:
        """Return ``value_l1``, ``value_l2``, ``key_l2``, ``value_out_l1`` or ``reconstruction``, float32 ``[G, T]``."""
        every = np.arange(self._sequences[sequence].length)
        heads = self._header.heads_of(layer).kv_heads
        kind = {"value_out_l1": "outputs", "reconstruction": "readings"}.get(column, "keys")
        return self._grid(layer_file(kind, layer), "kv_head", column, heads, sequence, every)

    def similarity(self, sequence: int, layer: int) -> Floats:
        """Return the cosines of all pairs of keys, float32 ``[G, T, T]``, 1 on the diagonal."""
        name, length = layer_file("keys", layer), self._sequences[sequence].length
        heads = self._header.heads_of(layer).kv_heads
        table = self._files.of_sequence(name, sequence, ["kv_head", "position", "similarity"])
        head, position = table["kv_head"].to_numpy(), table["position"].to_numpy()
        self._require_places(name, head, position, heads, np.arange(length))
        below = np.zeros((heads, length, length), np.float32)
        for part in table.to_batches():
            self._require_lengths(name, part["similarity"], part["position"].to_numpy())
            numbers = part["similarity"].flatten().to_numpy(zero_copy_only=False)
            if len(numbers) and not (np.abs(numbers) <= 1 + COSINE_TOLERANCE).all():
                raise self._files.damaged(name, "a cosine is not between -1 and 1")
            scatter(below, part["kv_head"].to_numpy(), part["position"].to_numpy(), part["similarity"])
        return below + below.transpose(0, 2, 1) + np.eye(length, dtype=np.float32)

    def mean_queries(self, sequence: int, layer: int) -> Floats:
        """Return mean queries, float32 ``[T, D]``."""
        return self._per_token("queries", "mean_query", sequence, layer, "float32")

    def hidden(self, sequence: int, layer: int) -> Floats:
        """Return layer inputs, float32 ``[T, hidden]``."""
        return self._per_token("hidden", "hidden", sequence, layer, self._header.vector_dtype)

    def vectors(self, sequence: int, layer: int, which: Which, start: int, stop: int) -> Floats:
        """Return queries, keys or values of positions `start` to `stop` - 1, float32 ``[heads, stop - start, D]``."""
        flat = self._numbers(layer_file("states", layer), which, sequence, start, stop, self._header.vector_dtype)
        own = self._header.heads_of(layer)
        heads = own.heads if which == "queries" else own.kv_heads
        known = self._header.source == "model"  # vectors of an import may differ in size
        width = heads * (own.value_size if which == "values" else own.head_dim) if known else flat.shape[1]
        if flat.shape[1] != width or width % heads or not width:
            name = layer_file("states", layer)
            raise self._files.damaged(name, f"its {which} have {flat.shape[1]} numbers for {heads} heads")
        return np.ascontiguousarray(flat.reshape(stop - start, heads, -1).transpose(1, 0, 2))

    def tokens(self) -> pd.DataFrame:
        """Return all tokens: the columns of ``tokens.parquet``."""
        table = self._files.whole(TOKENS_FILE)
        self.require_tokens(table)
        frame: pd.DataFrame = table.to_pandas()
        return frame

    def require_tokens(self, table: pa.Table) -> None:
        """Raise TraceError unless the tokens are those of the recorded sequences, with the recorded prompts."""
        sequence, position = table["sequence"].to_numpy(), table["position"].to_numpy()
        is_prompt = table["is_prompt"].to_numpy()
        if len(sequence) and table["token_id"].to_numpy().min() < UNKNOWN_TOKEN:
            raise self._files.damaged(TOKENS_FILE, "a token has a negative number")
        for number, item in enumerate(self._sequences):
            mine = sequence == number
            if not np.array_equal(position[mine], np.arange(item.length)):
                raise self._files.damaged(TOKENS_FILE, f"sequence {number} has not {item.length} tokens in order")
            if not np.array_equal(is_prompt[mine], np.arange(item.length) < item.prompt):
                raise self._files.damaged(TOKENS_FILE, f"the prompt of sequence {number} has not {item.prompt} tokens")

    def _of_attention(self, sequence: int, layer: int, start: int, stop: int) -> tuple[str, pa.Table]:
        """Return the name of a layer's file, and a table that has each recorded row exactly once."""
        name = layer_file("attention", layer)
        table = self._files.rows(name, sequence, start, stop, ["head", "position", "row_sum", "weights"])
        table = _inside(table, start, stop)
        head, position = table["head"].to_numpy(), table["position"].to_numpy()
        self._require_places(name, head, position, self._header.heads_of(layer).heads, self.positions(start, stop))
        return name, table

    def _window(self, layer: int) -> int | None:
        return self._header.sliding_window[self._header.layers.index(layer)]

    def _outside(self, name: str, window: int) -> TraceError:
        return self._files.damaged(name, f"a row has weights outside the window of {window} keys")

    def _weights(self, name: str, part: pa.RecordBatch) -> NDArray[np.float16]:
        """Return the weights of all rows of a part, row after row: none is missing, negative or not finite."""
        self._require_lengths(name, part["weights"], part["position"].to_numpy() + 1)
        weights: NDArray[np.float16] = part["weights"].flatten().to_numpy(zero_copy_only=False)
        if not are_weights(weights):
            raise self._files.damaged(name, "a weight is negative or not finite")
        return weights

    def _require_sums(self, name: str, head: Array, position: Array, sums: Array, recorded: Array) -> None:
        """Raise TraceError for the first row that is not attention, or not the one that was recorded."""
        faults = {
            "has another sum than was recorded": faults_of_weights(sums, recorded, position + 1),
            **faults_of_sums(recorded, self._header.learned_sinks),
        }
        for what, where in faults.items():
            if where.any():
                row = int(where.argmax())
                place = f"the row of head {head[row]}, position {position[row]}"
                raise self._files.damaged(name, f"{place} {what} (sum {sums[row]:.4f})")

    def _grid(self, name: str, head: str, column: str, heads: int, sequence: int, recorded: Array) -> Floats:
        table = self._files.of_sequence(name, sequence, [head, "position", column])
        place, position = table[head].to_numpy(), table["position"].to_numpy()
        self._require_places(name, place, position, heads, recorded)
        values = table[column].to_numpy()
        if not (np.isfinite(values) & ((values >= 0) | (column == "log_sum_exp"))).all():
            raise self._files.damaged(name, f"{column} is negative or not finite")
        if column == "row_sum":
            self._require_sums(name, place, position, values, values)
        grid = np.full((heads, self._sequences[sequence].length), np.nan, np.float32)
        grid[place, position] = values
        return grid

    def _per_token(self, kind: str, column: str, sequence: int, layer: int, dtype: VectorType) -> Floats:
        length = self._sequences[sequence].length
        return np.array(self._numbers(layer_file(kind, layer), column, sequence, 0, length, dtype), np.float32)

    def _numbers(self, name: str, column: str, sequence: int, start: int, stop: int, dtype: VectorType) -> Floats:
        """Return a list column of a file with one row for each position, float32 ``[stop - start, n]``."""
        table = self._files.rows(name, sequence, start, stop, ["position", column])
        table = _inside(table, start, stop)
        if not np.array_equal(table["position"].to_numpy(), np.arange(start, stop)):
            raise self._files.damaged(name, f"it lacks positions of sequence {sequence} before {stop}")
        lists = table[column].combine_chunks()
        lists = lists.chunk(0) if isinstance(lists, pa.ChunkedArray) else lists
        flat = from_column(lists.flatten())
        width = len(flat) // max(stop - start, 1)
        self._require_lengths(name, lists, np.full(stop - start, width))
        if not are_finite(flat, dtype):
            raise self._files.damaged(name, f"a number of {column} is not finite")
        return widened(flat, dtype).reshape(stop - start, width)

    def _require_places(self, name: str, head: Array, position: Array, heads: int, expected: Array) -> None:
        fault = misplaced(head, position, heads, expected)
        if fault is not None:
            raise self._files.damaged(name, fault)

    def _require_lengths(self, name: str, lists: pa.ListArray, lengths: Array) -> None:
        if not np.array_equal(np.diff(lists.offsets.to_numpy()), lengths):
            raise self._files.damaged(name, "a row has not as many numbers as it must have")


def _inside(table: pa.Table, start: int, stop: int) -> pa.Table:
    """Return the rows of positions `start` to `stop` - 1; a row group may contain others."""
    position = table["position"].to_numpy()
    inside = (position >= start) & (position < stop)
    return table if inside.all() else table.filter(pa.array(inside))
