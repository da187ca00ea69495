"""Write a trace block by block; the folder gets its final name only when the trace is complete."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa

from kvscope.core.errors import TraceError
from kvscope.core.output import OutputFolder
from kvscope.core.printable import encodable
from kvscope.core.version import __version__
from kvscope.trace.blocks import (
    Array,
    are_weights,
    bad_weight,
    lower,
    norm_column,
    norm_columns,
    not_finite,
    own,
    places,
    token_columns,
    tokens_from,
)
from kvscope.trace.columns import ATTENTION, COLUMNS, FILES, HIDDEN, KEYS, QUERIES, STATES, TOKENS, TOP, layer_file
from kvscope.trace.members import member_of
from kvscope.trace.parquet import Column, LayerFile, closed
from kvscope.trace.record import SequenceRecord, TraceHeader, TraceRecord
from kvscope.trace.record_file import write_record, write_unfinished
from kvscope.trace.schema import HEADER, MEMBERS, TOPK, VECTORS
from kvscope.trace.storage_error import Outside
from kvscope.trace.vectors import are_finite, narrowed


class TraceWriter:
    """Writes one trace to ``PATH.incomplete``, which `finish` renames to ``PATH`` and an error removes.

    Parameters
    ----------
    path : Path
        Folder of the trace.
    header : TraceHeader
        What is known before the recording starts.
    force : bool
        Whether an existing trace is replaced when this one is complete.

    Raises
    ------
    TraceError
        If `path` exists, another process is writing it, or the folder cannot be written.
    """

    def __init__(self, path: Path, header: TraceHeader, *, force: bool = False) -> None:
        self.path, self.header = Path(path), header
        self._folder = OutputFolder(self.path, "trace", HEADER, MEMBERS, TraceError, force)
        self.work = self._folder.work
        self._files: dict[str, LayerFile] = {}
        self._outside = Outside()
        try:
            begun = self._folder.begin()
            with self._folder.abandoned_on_error(), self._folder.locked():
                write_unfinished(self.work, header, begun)
        except OSError as error:
            raise self._folder.unwritable(error) from error

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.abandon()
        if kind is not None:
            self._folder.abandon()

    @property
    def bytes_written(self) -> int:
        """Bytes of all files so far, including buffered row groups."""
        return sum(file.size for file in list(self._files.values()))

    def attention(
        self, layer: int, sequence: int, first: int, rows: Array, *, row_sum: Array | None = None, stride: int = 1
    ) -> None:
        """Write rows ``[H, q, n]``: query ``i`` is position ``t = first + stride * i`` and has ``t + 1 <= n`` weights.

        Write the blocks of one layer in ascending order of sequence and position. Pass `row_sum` ``[H, q]`` if the rows
        are already rounded to 16 bit.

        Raises
        ------
        TraceError
            If a weight is not finite or negative, or the disk is full.
        """
        heads, count, _ = rows.shape
        position = np.arange(first, first + stride * count, stride, dtype=np.int32)
        if row_sum is None:
            row_sum = np.where(own(position, rows), rows, 0).sum(-1, np.float32)
        weights = lower(rows, position + 1).reshape(heads, -1)
        self.packed_attention(layer, sequence, first, weights, row_sum, stride=stride)

    def packed_attention(
        self, layer: int, sequence: int, first: int, weights: Array, row_sum: Array, *, stride: int = 1
    ) -> None:
        """Write rows as `attention`, of which `weights` ``[H, total]`` has the ``t + 1`` weights of each query.

        `row_sum` is ``[H, q]``. Order and errors as in `attention`.
        """
        heads, count = row_sum.shape
        position = np.arange(first, first + stride * count, stride, dtype=np.int32)
        flat = weights.ravel()
        if not are_weights(flat):
            raise bad_weight(layer, position, weights)
        columns = {
            **places(layer, sequence, heads, position),
            "row_sum": row_sum.astype(np.float32).ravel(),
            "weights": (flat.astype(np.float16, copy=False), np.tile(position + 1, heads)),
        }
        self._add(layer_file("attention", layer), ATTENTION, columns)

    def topk(self, layer: int, sequence: int, first: int, keys: Array, weights: Array, **sums: Array) -> None:
        """Write the heaviest keys ``[H, q, K]``, ascending, and their weights, of the rows from position `first` on.

        A row of ``t + 1 < K`` keys uses the first ``t + 1`` entries. `sums` are ``row_sum``, ``residual`` and
        ``log_sum_exp``, each ``[H, q]``. Write the blocks in the order of `attention`.

        Raises
        ------
        TraceError
            If a weight is not finite or negative, or the disk is full.
        """
        heads, count, top = keys.shape
        position = np.arange(first, first + count, dtype=np.int32)
        lengths = np.minimum(position + 1, top)
        stored = np.broadcast_to(np.arange(top) < lengths[:, None], keys.shape)
        flat = weights[stored].astype(np.float16, copy=False)
        if not are_weights(flat):
            raise not_finite(layer, first, count, "weights")
        columns = {
            **places(layer, sequence, heads, position),
            **{name: values.astype(np.float32).ravel() for name, values in sums.items()},
            "keys": (keys[stored].astype(np.int32), np.tile(lengths, heads)),
            "weights": (flat, np.tile(lengths, heads)),
        }
        self._outside.add(layer, sequence, sums["residual"] / np.maximum(sums["row_sum"], np.finfo(np.float32).tiny))
        self._add(layer_file("topk", layer), TOP, columns)

    def columns(self, layer: int, sequence: int, last: int, sums: Array, outside: Array) -> None:
        """Write the column sums ``[H, last + 1]`` of the rows since the last call, up to position `last`.

        `sums` are over whole rows, `outside` only over the weights that are not stored.
        """
        heads, length = sums.shape
        columns = {
            **places(layer, sequence, heads, np.array([last], np.int32)),
            "sums": (sums.astype(np.float32).ravel(), np.full(heads, length)),
            "outside": (outside.astype(np.float32).ravel(), np.full(heads, length)),
        }
        self._add(layer_file("columns", layer), COLUMNS, columns)

    def keys(
        self,
        layer: int,
        sequence: int,
        first: int,
        *,
        value_l1: Array | None = None,
        value_l2: Array | None = None,
        key_l2: Array | None = None,
        similarity: Array | None = None,
        cosines: Array | None = None,
    ) -> None:
        """Write norms ``[G, n]`` of keys and values from position `first` on, and cosines with all earlier keys.

        Cosines are given as `similarity` ``[G, n, >= first + n]``, or as `cosines` ``[G, total]``, which has only the
        ``t`` numbers of each position ``t``, and needs a norm beside it.
        """
        given = next(array for array in (value_l1, value_l2, key_l2, similarity) if array is not None)
        heads, count = given.shape[:2]
        position = np.arange(first, first + count, dtype=np.int32)
        if similarity is not None:
            cosines = lower(similarity, position)
        lengths = np.zeros(heads * count, int) if cosines is None else np.tile(position, heads)
        flat = np.zeros(0, np.float16) if cosines is None else cosines.ravel().astype(np.float16, copy=False)
        columns = {**places(layer, sequence, heads, position, "kv_head"), "similarity": (flat, lengths)}
        for name, norm in (("value_l1", value_l1), ("value_l2", value_l2), ("key_l2", key_l2)):
            columns[name] = norm_column(norm, heads * count)
        self._add(layer_file("keys", layer), KEYS, columns)

    def key_numbers(self, kind: str, layer: int, sequence: int, first: int, **numbers: Array) -> None:
        """Write numbers ``[G, n]`` of keys from position `first` on: of kind ``outputs`` or ``readings``."""
        schema = FILES[f"{kind}/layer=NNN.parquet"][1]
        self._add(layer_file(kind, layer), schema, {**norm_columns(layer, sequence, first, **numbers)})

    def queries(self, layer: int, sequence: int, first: int, mean_query: Array) -> None:
        """Write mean queries ``[n, D]`` from position `first` on."""
        self._per_token("queries", QUERIES, layer, sequence, first, "mean_query", mean_query.astype(np.float32))

    def hidden(self, layer: int, sequence: int, first: int, inputs: Array) -> None:
        """Write layer inputs ``[n, hidden]`` from position `first` on; types and errors as in `vectors`."""
        stored = self._stored(layer, first, len(inputs), "layer inputs", inputs)
        schema = HIDDEN[self.header.vector_dtype]
        self._per_token("hidden", schema, layer, sequence, first, "hidden", stored)

    def vectors(self, layer: int, sequence: int, first: int, **given: Array) -> None:
        """Write any of ``queries``, ``keys``, ``values`` from position `first` on, each ``[heads, n, D]``.

        They are floating-point numbers, or the bits of bfloat16 as uint16 where that is the header's `vector_dtype`.

        Raises
        ------
        TraceError
            If a number is not finite or not exact in the header's `vector_dtype`, or the disk is full.
        """
        count = next(iter(given.values())).shape[1]
        columns: dict[str, Column] = {**tokens_from(layer, sequence, first, count)}
        for name in VECTORS:
            array = given.get(name, np.zeros((0, count, 0), np.float32))
            flat = self._stored(layer, first, count, name, array).transpose(1, 0, 2).reshape(count, -1)
            columns[name] = (flat.ravel(), np.full(count, flat.shape[1]))
        self._add(layer_file("states", layer), STATES[self.header.vector_dtype], columns)

    def tokens(
        self,
        sequence: int,
        *,
        token_id: Sequence[int] | Array,
        text: Sequence[str],
        is_prompt: Sequence[bool] | Array,
        logprob: Sequence[float] | Array,
        entropy: Sequence[float] | Array,
    ) -> None:
        """Write the tokens of a sequence, one value per position; NaN for an unknown number."""
        numbers = token_columns(sequence, token_id, is_prompt, logprob, entropy)
        columns = {**numbers, "text": pa.array(map(encodable, text), pa.string())}
        self._add("tokens.parquet", TOKENS, columns)

    def finish(self, sequences: Sequence[SequenceRecord]) -> Path:
        """Close the files, write ``trace.json`` with sizes and checksums, and rename the folder to its final name.

        `sequences` has the lengths of each sequence. The folder of the finished trace is returned.
        """
        try:
            checksums = closed(self._files)
            sizes = {name: (self.work / name).stat().st_size for name in checksums}
            record = TraceRecord(
                kvscope=__version__,
                header=self.header,
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                sequences=list(sequences),
                loss=self._outside.summed_up(sequences) if TOPK in self.header.stored else None,
                bytes=sum(sizes.values()),
                sizes=sizes,
                checksums=checksums,
            )
            with self._folder.locked():
                write_record(self.work, record)
            self._folder.finish()
        except OSError as error:
            raise self._folder.unwritable(error) from error
        return self.path

    def _per_token(
        self, kind: str, schema: pa.Schema, layer: int, sequence: int, first: int, name: str, values: Array
    ) -> None:
        count, size = values.shape
        columns = {**tokens_from(layer, sequence, first, count), name: (values.ravel(), np.full(count, size))}
        self._add(layer_file(kind, layer), schema, columns)

    def _stored(self, layer: int, first: int, count: int, what: str, array: Array) -> Array:
        """Return vectors in the type of the file; raises TraceError if a number is not finite or not exact in it."""
        kind = self.header.vector_dtype
        try:
            stored = narrowed(array, kind)
        except ValueError as error:
            raise TraceError(f"layer {layer}: {what} {error}", "Record it with vector_dtype float32.") from error
        if not are_finite(stored, kind):
            raise not_finite(layer, first, count, what)
        return stored

    def _add(self, name: str, schema: pa.Schema, columns: dict[str, Column]) -> None:
        try:
            if name not in self._files:
                (self.work / name).parent.mkdir(exist_ok=True)
                self._files[name] = LayerFile(self.work / name, schema, member_of(name).about(self.header))
            self._files[name].add(columns)
        except OSError as error:
            raise self._folder.unwritable(error) from error
