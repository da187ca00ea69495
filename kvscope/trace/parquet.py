"""Write one Parquet file of a trace: blocks are buffered until they fill a row group."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kvscope.core.cores import cores
from kvscope.core.output import checksum
from kvscope.trace.blocks import Array
from kvscope.trace.columns import HIDDEN, STATES, TOP
from kvscope.trace.vectors import as_column

# A row group has about this many list items. An open Parquet file uses about 18 bytes of memory for each item of its
# largest row group, and a recording has two or more open files for each layer; smaller groups are not slower to write.
# The minimum number of rows keeps the file footers of long sequences small.
ROW_GROUP_VALUES = 2**17
ROW_GROUP_ROWS = 32
COMPRESSION = "lz4"
# The bytes of vectors are grouped by significance (byte stream split): the upper ones, mostly exponents, compress. On
# such data zstd takes 10 to 25 % less space than lz4 and is as fast to write. Files of 16-bit vectors are not half as
# large as of 32 bit that end in 16 zero bits: zeros took no space. What is halved is what is copied, encoded and read.
SPLIT = {
    **{schema: [f"{name}.list.element" for name in ("queries", "keys", "values")] for schema in STATES.values()},
    **{schema: ["hidden.list.element"] for schema in HIDDEN.values()},
}
SPLIT_COMPRESSION = "zstd"
DELTA = {TOP: {"keys.list.element": "DELTA_BINARY_PACKED"}}  # positions ascend in small steps
# Numbers; for a list column, the numbers of all rows concatenated, and the length of each row.
Column: TypeAlias = "Array | tuple[Array, Array] | pa.Array"


class LayerFile:
    """A Parquet file that buffers blocks until a row group is full.

    Parameters
    ----------
    path : Path
        File to write.
    schema : pa.Schema
        Its columns.
    about : mapping, optional
        Metadata of the file.
    """

    def __init__(self, path: Path, schema: pa.Schema, about: Mapping[bytes, bytes] | None = None) -> None:
        self.schema = schema
        self.path = path
        self._sink = path.open("wb")
        self._writer = pq.ParquetWriter(
            self._sink,
            schema.with_metadata(about),
            compression=SPLIT_COMPRESSION if schema in SPLIT else COMPRESSION,
            use_dictionary=["text"],
            write_statistics=[column.name for column in schema if not pa.types.is_list(column.type)],
            use_byte_stream_split=SPLIT.get(schema, False),
            column_encoding=DELTA.get(schema),
        )
        self._pending: list[dict[str, Column]] = []
        self._values = self._waiting = self._reached = 0

    @property
    def size(self) -> int:
        """Bytes written to the file, plus bytes buffered."""
        return self._reached + self._waiting

    def add(self, columns: dict[str, Column]) -> None:
        """Add a block; write the buffer first if the block is of another sequence."""
        if self._pending and self._pending[-1]["sequence"][0] != columns["sequence"][0]:
            self._flush()
        self._pending.append(columns)
        parts = [column[0] if isinstance(column, tuple) else column for column in columns.values()]
        self._values += sum(len(part) for part in parts)
        self._waiting += sum(part.nbytes for part in parts)
        if self._values >= ROW_GROUP_VALUES:
            self._flush()

    def close(self) -> None:
        """Write the buffer and close the file."""
        self._flush()
        self._writer.close()
        self._sink.close()

    def abandon(self) -> None:
        """Close the file without writing the buffer; that it cannot be written is not an error: it will be removed."""
        self._pending = []
        for part in (self._writer, self._sink):
            with contextlib.suppress(OSError):
                part.close()

    def _flush(self) -> None:
        if not self._pending:
            return
        arrays = [_join([block[column.name] for block in self._pending], column.type) for column in self.schema]
        table = pa.Table.from_arrays(arrays, schema=self.schema)
        rows = max(ROW_GROUP_ROWS, table.num_rows * ROW_GROUP_VALUES // self._values)
        self._pending, self._values, self._waiting = [], 0, 0
        self._writer.write_table(table, row_group_size=rows)
        self._reached = self._sink.tell()


def closed(files: Mapping[str, LayerFile]) -> dict[str, str]:
    """Close files and return the SHA-256 of each by its name, sorted; several files at a time."""

    def one(name: str) -> str:
        files[name].close()
        return checksum(files[name].path)

    names = sorted(files)
    with ThreadPoolExecutor(cores()) as pool:
        return dict(zip(names, pool.map(one, names), strict=True))


def _join(parts: list[Column], kind: pa.DataType) -> pa.Array:
    if isinstance(parts[0], tuple):
        values = _concatenated([values for values, _ in parts])
        offsets = np.zeros(sum(len(lengths) for _, lengths in parts) + 1, np.int32)
        np.cumsum(np.concatenate([lengths for _, lengths in parts]), out=offsets[1:])
        return pa.ListArray.from_arrays(offsets, as_column(values, kind.value_type), type=kind)
    if isinstance(parts[0], pa.Array):
        return pa.concat_arrays(parts)
    return pa.array(_concatenated(cast("list[Array]", parts)), kind)


def _concatenated(parts: list[Array]) -> Array:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
