"""Writing a trace: blocks come in, row groups go out, and only a finished trace gets its name."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from kvscope.errors import TraceError
from kvscope.folder import OutputFolder, checksum
from kvscope.trace.schema import (
    ATTENTION,
    HEADER,
    HIDDEN,
    KEYS,
    KIND,
    MEMBERS,
    QUERIES,
    SCHEMA_VERSION,
    STATES,
    TOKENS,
    VECTORS,
    TraceHeader,
    layer_file,
)

# A row group holds about this many list items. An open Parquet file keeps about 18 bytes for each item of its largest
# row group, and a recording has two files or more open for each layer; smaller groups are no slower to write. A least
# number of rows keeps the footers of long sequences small.
ROW_GROUP_VALUES = 2**17
ROW_GROUP_ROWS = 32
COMPRESSION = "lz4"
# The bytes of a vector's numbers lie together by significance: what 16-bit models leave zero takes no space, and what
# the numbers have in common little; there zstd takes a tenth to a quarter less than lz4, and writes as fast.
SPLIT = {STATES: [f"{name}.list.element" for name in VECTORS], HIDDEN: ["hidden.list.element"]}
SPLIT_COMPRESSION = "zstd"
Array = NDArray[Any]


def free_bytes(path: Path) -> int:
    """Return the free bytes of the disk that holds `path`, or its nearest parent that exists."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def require_space(path: Path, needed: int) -> None:
    """Raise TraceError if the disk of `path` has fewer than `needed` bytes free."""
    free = free_bytes(path)
    if needed > free:
        raise TraceError(
            f"the trace needs about {needed / 1e9:.2f} GB, and the disk of {path} has {free / 1e9:.2f} GB free",
            "Record vectors alone (--store qkv), fewer layers (--layers) or a shorter prompt, or name another disk "
            "(--output).",
        )


class TraceWriter:
    """Records one trace into ``PATH.incomplete`` and gives it its name at `finish`.

    Parameters
    ----------
    path : Path
        Folder of the trace.
    header : TraceHeader
        What is known before the start.
    force : bool
        Whether an existing trace may be replaced, once this one is whole.

    Raises
    ------
    TraceError
        If `path` exists, another process is writing it, or the folder cannot be written.
    """

    def __init__(self, path: Path, header: TraceHeader, *, force: bool = False) -> None:
        self.path, self.header = Path(path), header
        self._folder = OutputFolder(self.path, "trace", HEADER, MEMBERS, TraceError, force)
        self.work = self._folder.work
        self._files: dict[str, _File] = {}
        try:
            self._write_header({"complete": False, "writer": self._folder.begin()})
        except OSError as error:
            raise self._folder.unwritable(error) from error

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.abandon()

    @property
    def bytes_written(self) -> int:
        """Bytes of all files so far, with what waits in memory to become a row group."""
        return sum(file.size for file in self._files.values())

    def attention(self, layer: int, sequence: int, first: int, rows: Array, *, row_sum: Array | None = None) -> None:
        """Write rows ``[H, q, >= first + q]``: query ``i`` is position ``first + i`` and has ``first + i + 1`` weights.

        Blocks of one layer come in ascending order of sequence and position. `row_sum` ``[H, q]`` is given where the
        rows have been rounded to 16 bit already.

        Raises
        ------
        TraceError
            If a weight is not a number, negative, or the disk is full.
        """
        heads, count, _ = rows.shape
        length = first + count
        flat = _lower(rows, first + 1)
        if not _are_weights(flat):
            raise self._bad_weight(layer, first, rows)
        lengths = np.tile(np.arange(first + 1, length + 1), heads)
        if row_sum is None:
            row_sum = np.where(np.tri(count, length, first, dtype=bool), rows[:, :, :length], 0).sum(-1, np.float32)
        columns = {
            "sequence": np.full(heads * count, sequence, np.int32),
            "layer": np.full(heads * count, layer, np.int32),
            "head": np.repeat(np.arange(heads, dtype=np.int32), count),
            "position": np.tile(np.arange(first, length, dtype=np.int32), heads),
            "row_sum": row_sum.astype(np.float32).ravel(),
            "weights": (flat.astype(np.float16, copy=False), lengths),
        }
        self._add(layer_file("attention", layer), ATTENTION, columns)

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
    ) -> None:
        """Write norms ``[G, n]`` of keys from position `first` on, and their cosines ``[G, n, >= first + n]``."""
        given = next(array for array in (value_l1, value_l2, key_l2, similarity) if array is not None)
        heads, count = given.shape[:2]
        length = first + count
        lengths = np.tile(np.arange(first, length), heads) if similarity is not None else np.zeros(heads * count, int)
        cosines = np.zeros(0, np.float16) if similarity is None else _lower(similarity, first)
        columns = {
            "sequence": np.full(heads * count, sequence, np.int32),
            "layer": np.full(heads * count, layer, np.int32),
            "kv_head": np.repeat(np.arange(heads, dtype=np.int32), count),
            "position": np.tile(np.arange(first, length, dtype=np.int32), heads),
            "similarity": (cosines.astype(np.float16, copy=False), lengths),
        }
        for name, norm in (("value_l1", value_l1), ("value_l2", value_l2), ("key_l2", key_l2)):
            columns[name] = (
                np.full(heads * count, np.nan, np.float32) if norm is None else norm.ravel().astype(np.float32)
            )
        self._add(layer_file("keys", layer), KEYS, columns)

    def queries(self, layer: int, sequence: int, first: int, mean_query: Array) -> None:
        """Write mean queries ``[n, D]`` from position `first` on."""
        self._per_token("queries", QUERIES, layer, sequence, first, "mean_query", mean_query)

    def hidden(self, layer: int, sequence: int, first: int, inputs: Array) -> None:
        """Write layer inputs ``[n, hidden]`` from position `first` on; raises TraceError as `vectors` does."""
        if not np.isfinite(inputs).all():
            raise _not_finite(layer, first, len(inputs), "layer inputs")
        self._per_token("hidden", HIDDEN, layer, sequence, first, "hidden", inputs)

    def vectors(self, layer: int, sequence: int, first: int, **given: Array) -> None:
        """Write ``queries``, ``keys``, ``values`` from position `first` on, each ``[heads, n, D]``, or some of them.

        Raises
        ------
        TraceError
            If one is not finite, or the disk is full.
        """
        count = next(iter(given.values())).shape[1]
        columns: dict[str, Any] = {
            "sequence": np.full(count, sequence, np.int32),
            "layer": np.full(count, layer, np.int32),
            "position": np.arange(first, first + count, dtype=np.int32),
        }
        for name in VECTORS:
            array = given.get(name)
            if array is not None and not np.isfinite(array).all():
                raise _not_finite(layer, first, count, name)
            flat = np.zeros((count, 0), np.float32) if array is None else array.transpose(1, 0, 2).reshape(count, -1)
            columns[name] = (flat.astype(np.float32).ravel(), np.full(count, flat.shape[1]))
        self._add(layer_file("states", layer), STATES, columns)

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
        """Write the tokens of a sequence, one value for each position; NaN where a number is unknown."""
        count = len(token_id)
        columns = {
            "sequence": np.full(count, sequence, np.int32),
            "position": np.arange(count, dtype=np.int32),
            "token_id": np.asarray(token_id, np.int64),
            "text": pa.array(text, pa.string()),
            "is_prompt": np.asarray(is_prompt, bool),
            "logprob": np.asarray(logprob, np.float32),
            "entropy": np.asarray(entropy, np.float32),
        }
        self._add("tokens.parquet", TOKENS, columns)

    def finish(self, sequences: Sequence[dict[str, Any]]) -> Path:
        """Close the files, note sizes and checksums, and give the trace its name.

        Parameters
        ----------
        sequences : sequence of dict
            ``prompt`` (``P``), ``length`` (``T``) and ``forced`` of each sequence.

        Returns
        -------
        Path
            The folder of the finished trace.
        """
        try:
            for file in self._files.values():
                file.close()
            sizes = {name: (self.work / name).stat().st_size for name in sorted(self._files)}
            self._write_header(
                {
                    "complete": True,
                    "created": datetime.now(UTC).isoformat(timespec="seconds"),
                    "sequences": list(sequences),
                    "bytes": sum(sizes.values()),
                    "sizes": sizes,
                    "checksums": {name: checksum(self.work / name) for name in sizes},
                }
            )
            self._folder.finish()
        except OSError as error:
            raise self._folder.unwritable(error) from error
        return self.path

    def _per_token(
        self, kind: str, schema: pa.Schema, layer: int, sequence: int, first: int, name: str, values: Array
    ) -> None:
        count, size = values.shape
        columns = {
            "sequence": np.full(count, sequence, np.int32),
            "layer": np.full(count, layer, np.int32),
            "position": np.arange(first, first + count, dtype=np.int32),
            name: (values.astype(np.float32).ravel(), np.full(count, size)),
        }
        self._add(layer_file(kind, layer), schema, columns)

    def _add(self, name: str, schema: pa.Schema, columns: dict[str, Any]) -> None:
        try:
            if name not in self._files:
                (self.work / name).parent.mkdir(exist_ok=True)
                self._files[name] = _File(self.work / name, schema)
            self._files[name].add(columns)
        except OSError as error:
            raise self._folder.unwritable(error) from error

    def _write_header(self, late: dict[str, Any]) -> None:
        made = {"kind": KIND, "schema": SCHEMA_VERSION, "kvscope": version("kvscope")}
        data = {**made, **self.header.to_json(), **late}
        text = json.dumps(data, indent=1, ensure_ascii=False, default=str) + "\n"
        (self.work / HEADER).write_text(text, encoding="utf-8", errors="surrogatepass")

    def _bad_weight(self, layer: int, first: int, rows: Array) -> TraceError:
        count, length = rows.shape[1:]
        bad = np.tri(count, length, first, dtype=bool) & ~(np.isfinite(rows) & (rows >= 0))
        head, query, key = (int(axis[0]) for axis in np.nonzero(bad))
        return TraceError(
            f"layer {layer}, head {head}, position {first + query}: weight {rows[head, query, key]} on key {key}",
            "Attention weights are finite and not negative: try --dtype float32.",
        )


class _File:
    """One Parquet file that collects blocks until a row group is full."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.schema = schema
        self._sink = path.open("wb")
        self._writer = pq.ParquetWriter(
            self._sink,
            schema,
            compression=SPLIT_COMPRESSION if schema in SPLIT else COMPRESSION,
            use_dictionary=["text"],
            write_statistics=[column.name for column in schema if not pa.types.is_list(column.type)],
            use_byte_stream_split=SPLIT.get(schema, False),
        )
        self._pending: list[dict[str, Any]] = []
        self._values = self._waiting = self._reached = 0

    @property
    def size(self) -> int:
        """Bytes that reached the file, and bytes that wait."""
        return self._reached + self._waiting

    def add(self, columns: dict[str, Any]) -> None:
        """Take a block."""
        if self._pending and self._pending[-1]["sequence"][0] != columns["sequence"][0]:
            self._flush()
        self._pending.append(columns)
        parts = [column[0] if isinstance(column, tuple) else column for column in columns.values()]
        self._values += sum(len(part) for part in parts)
        self._waiting += sum(part.nbytes for part in parts)
        if self._values >= ROW_GROUP_VALUES:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()
        self._sink.close()

    def abandon(self) -> None:
        """Let go of the file, without a word about a disk that is full already."""
        if not self._sink.closed:
            self._pending = []
            try:
                self._writer.close()
                self._sink.close()
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise

    def _flush(self) -> None:
        if not self._pending:
            return
        arrays = [_join([block[column.name] for block in self._pending], column.type) for column in self.schema]
        table = pa.Table.from_arrays(arrays, schema=self.schema)
        rows = max(ROW_GROUP_ROWS, table.num_rows * ROW_GROUP_VALUES // self._values)
        self._pending, self._values, self._waiting = [], 0, 0
        self._writer.write_table(table, row_group_size=rows)
        self._reached = self._sink.tell()


def _not_finite(layer: int, first: int, count: int, what: str) -> TraceError:
    return TraceError(
        f"layer {layer}, positions {first} to {first + count - 1}: {what} are not finite",
        "They exceed the model's precision: try --dtype float32.",
    )


def _lower(rows: Array, shortest: int) -> Array:
    """Return the first `shortest` numbers of each head's first row, one more of the next, and so on, head by head."""
    heads, count, _ = rows.shape
    lengths = range(shortest, shortest + count)
    flat = np.empty((heads, sum(lengths)), rows.dtype)
    stop = 0
    for row, length in enumerate(lengths):
        start, stop = stop, stop + length
        flat[:, start:stop] = rows[:, row, :length]
    return flat.ravel()


def _are_weights(flat: Array) -> bool:
    if flat.dtype == np.float16 and flat.size and flat.view(np.uint16).max() < np.float16(np.inf).view(np.uint16):
        return True  # in 16 bits, what is negative, infinite or no number comes after every finite number
    return bool((np.isfinite(flat) & (flat >= 0)).all())


def _join(parts: list[Any], kind: pa.DataType) -> pa.Array:
    if isinstance(parts[0], tuple):
        values = _concatenated([values for values, _ in parts])
        offsets = np.zeros(sum(len(lengths) for _, lengths in parts) + 1, np.int32)
        np.cumsum(np.concatenate([lengths for _, lengths in parts]), out=offsets[1:])
        return pa.ListArray.from_arrays(offsets, pa.array(values, kind.value_type), type=kind)
    if isinstance(parts[0], pa.Array):
        return pa.concat_arrays(parts)
    return pa.array(_concatenated(parts), kind)


def _concatenated(parts: list[Array]) -> Array:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
