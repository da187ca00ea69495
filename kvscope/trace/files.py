"""Read the Parquet files of a finished trace; each is compared with what was recorded of it before it is used."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from kvscope.core.checked_files import CheckedFiles
from kvscope.core.errors import TraceError
from kvscope.core.memory import is_library_too_large
from kvscope.trace.members import ABOUT, SIGNALS, members
from kvscope.trace.record import TraceRecord
from kvscope.trace.schema import SEALED_SINCE

Floats = NDArray[np.float32]
MOST_OPEN = 64  # files of one trace and thread: a process may open 1,024 by default
NUMBER_BYTES = 8  # most bytes of a number in a column
SLACK = 2**16  # bytes of a column beside its numbers: levels, and headers of pages
TEXT_BYTES = 2**10  # most bytes of the text of a token, on average
# Raised by pyarrow for a file that is not what its checksum says, or whose writer was not kvscope.
UNREADABLE = (OSError, pa.ArrowException, MemoryError, ValueError, OverflowError, KeyError, IndexError)


class Group(NamedTuple):
    """A row group: its number in the file, and its first and last position."""

    number: int
    first: int
    last: int


class TraceFiles:
    """Reads tables from the files of one trace; raises TraceError for a file that cannot be read or is another one.

    Parameters
    ----------
    path : Path
        Folder of the trace.
    record : TraceRecord
        Content of its ``trace.json``.
    compare : bool
        Whether the checksum of a file is compared before it is first read.
    """

    def __init__(self, path: Path, record: TraceRecord, *, compare: bool = True) -> None:
        self._path, self._record = path, record
        self._members = members(record.header)
        self._index: dict[str, dict[int, list[Group]]] = {}  # by file and sequence
        self._open = _OpenFiles()
        self.checked = CheckedFiles(path, record.sizes, record.checksums, self.damaged, compare=compare)

    def of_sequence(self, name: str, sequence: int, columns: list[str]) -> pa.Table:
        """Return columns of a file for one sequence."""
        return self.rows(name, sequence, 0, self._record.sequences[sequence].length, columns)

    def whole(self, name: str) -> pa.Table:
        """Return a whole file."""
        with self._opened(name) as file:
            return file.read()

    def rows(self, name: str, sequence: int, start: int, stop: int, columns: list[str]) -> pa.Table:
        """Return the row groups of a layer's file that contain any of the positions `start` to `stop` - 1."""
        with self._opened(name) as file:
            groups = self._index[name].get(sequence, ())
            selected = [group.number for group in groups if group.first < stop and group.last >= start]
            return file.read_row_groups(selected, columns=columns).combine_chunks()

    def damaged(self, name: str, why: str) -> TraceError:
        """Return the error for a damaged file."""
        return damaged(self._path, name, why)

    @contextmanager
    def _opened(self, name: str) -> Iterator[pq.ParquetFile]:
        path = self.checked.path(name)
        try:
            file = self._open.get(path)
            if name not in self._index:
                self._require_own(name, file)
                self._index[name] = self._groups(name, file.metadata)
            yield file
        except pa.ArrowMemoryError:
            raise  # of a file whose sizes were checked: it is not damaged
        except UNREADABLE as error:
            if is_library_too_large(error):
                raise  # it is memory that lacks
            raise self.damaged(name, "it cannot be read") from error

    def _require_own(self, name: str, file: pq.ParquetFile) -> None:
        """Raise TraceError unless a file has the columns, rows and metadata of its kind and layer of this trace."""
        member, header = self._members[name], self._record.header
        found, rows, columns = file.schema_arrow, file.metadata.num_rows, member.schema(header)
        if [(field.name, field.type) for field in found] != [(field.name, field.type) for field in columns]:
            raise self.damaged(name, "it has other columns")
        expected = member.rows(header, self._record.sequences)
        if rows != expected:
            raise self.damaged(name, f"it has {rows} rows instead of {expected}")
        if self._record.schema >= SEALED_SINCE:
            about = {ABOUT: (found.metadata or {}).get(ABOUT, b"")}
            if about != member.about(header):
                raise self.damaged(name, "by its metadata it is the file of another trace, kind or layer")

    def _groups(self, name: str, metadata: pq.FileMetaData) -> dict[int, list[Group]]:
        """Return the row groups of each sequence; raise TraceError for one of another layer or an impossible size."""
        names = [metadata.schema.column(index).name for index in range(metadata.num_columns)]
        layer, groups = self._members[name].layer, dict[int, list[Group]]()
        longest = max(item.length for item in self._record.sequences)
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            for index in range(group.num_columns):
                self._require_size(name, group.column(index), group.num_rows, longest)
                self._require_stored(name, group.column(index), group.num_rows)
            ranges = {}
            for column in ("sequence", "position", *(("layer",) if layer is not None else ())):
                statistics = group.column(names.index(column)).statistics
                if statistics is None or not statistics.has_min_max:
                    raise self.damaged(name, f"a row group does not say which {column} it is of")
                ranges[column] = (statistics.min, statistics.max)
            if layer is not None and (ranges["layer"] != (layer, layer) or len(set(ranges["sequence"])) > 1):
                raise self.damaged(name, "a row group is of another layer, or of several sequences")
            groups.setdefault(ranges["sequence"][0], []).append(Group(number, *ranges["position"]))
        return groups

    def _require_size(self, name: str, column: pq.ColumnChunkMetaData, rows: int, longest: int) -> None:
        """Raise TraceError for a column that says that it is larger than it can be; nothing is allocated for it."""
        header = self._record.header
        if column.path_in_schema == "text":
            most = TEXT_BYTES * rows
        else:
            size = max(max(own.head_dim, own.value_size) for own in map(header.heads_of, header.layers))
            widest = max(longest, (header.heads + header.kv_heads) * max(size, 1), 2**16)
            most = NUMBER_BYTES * rows * (widest if "." in column.path_in_schema else 1)
        said = (column.total_uncompressed_size, column.total_compressed_size, column.num_values)
        if min(said) < 0 or max(said) > most + SLACK:
            raise self.damaged(name, f"it says that column {column.path_in_schema} has {max(said)} bytes")

    def _require_stored(self, name: str, column: pq.ColumnChunkMetaData, rows: int) -> None:
        """Raise TraceError for numbers of a signal that is not stored: the header has lost its name."""
        member, signal = self._members[name], column.path_in_schema.partition(".")[0]
        signal = f"vectors:{signal}" if member.kind == "states" else signal
        if signal not in SIGNALS.get(member.kind, ()) or signal in self._record.header.stored:
            return
        listed = "." in column.path_in_schema  # an empty list counts as one value; NaN has no least value
        there = column.num_values > rows if listed else column.statistics is not None and column.statistics.has_min_max
        if there:
            raise self.damaged(name, f"it has {signal}, which the header does not name")


class _OpenFiles(threading.local):
    """The files that this thread has open, because reading a footer of many sequences takes longer than one of them.

    Every thread has its own, since an open file serves one reader at a time.
    """

    def __init__(self) -> None:
        self._files: dict[Path, pq.ParquetFile] = {}

    def get(self, path: Path) -> pq.ParquetFile:
        """Return an open file; of too many, the one that was opened first is closed."""
        if path not in self._files:
            while len(self._files) >= MOST_OPEN:
                self._files.pop(next(iter(self._files))).close(force=True)
            self._files[path] = pq.ParquetFile(pa.OSFile(os.fsencode(path)))  # a str has to be UTF-8
        return self._files[path]


def scatter(target: Floats, head: NDArray[np.integer], query: NDArray[np.integer], lists: pa.ListArray) -> None:
    """Copy lists into ``target[head, query, :len]``; copying slices is faster than indexing every number."""
    edges = lists.offsets.to_numpy() - lists.offsets[0].as_py()
    values, flat = lists.flatten().to_numpy(zero_copy_only=False), target.reshape(-1)
    starts = (head.astype(np.int64) * target.shape[1] + query) * target.shape[2]
    for start, first, last in zip(starts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        flat[start : start + last - first] = values[first:last]


def damaged(path: Path, file: str, why: str) -> TraceError:
    """Return the error for a damaged file of a trace."""
    return TraceError(f"trace {path} is damaged: {file}: {why}", "Record it again, or restore the file from a copy.")
