"""Read the Parquet files of a finished trace, and check that they are intact."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from kvscope.core.errors import TraceError
from kvscope.core.output import checksum
from kvscope.trace.record import TraceRecord

Floats = NDArray[np.float32]
MOST_OPEN = 64  # files of one trace and thread: a process may open 1,024 by default


class TraceFiles:
    """Reads tables from the files of one trace; raises TraceError for a file that cannot be read.

    Parameters
    ----------
    path : Path
        Folder of the trace.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open = _OpenFiles()

    def of_sequence(self, name: str, sequence: int, columns: list[str]) -> pa.Table:
        """Return columns of a file for one sequence."""
        table = self._groups(name, sequence, 0, None, [*columns, "sequence"])
        return table.filter(pc.equal(table["sequence"], sequence)).select(columns)

    def whole(self, name: str) -> pa.Table:
        """Return a whole file."""
        try:
            return pq.read_table(self._path / name, partitioning=None)
        except pa.ArrowMemoryError:
            raise  # the file is not damaged
        except (OSError, pa.ArrowException) as error:
            raise damaged(self._path, name, "it cannot be read") from error

    def rows(self, name: str, sequence: int, start: int, stop: int, columns: list[str]) -> pa.Table:
        """Return the row groups of a layer's file that contain any of the positions `start` to `stop` - 1."""
        return self._groups(name, sequence, start, stop, columns)

    def _groups(self, name: str, sequence: int, start: int, stop: int | None, columns: list[str]) -> pa.Table:
        try:
            file, groups = self._open.get(self._path / name)
            selected = [
                number
                for number, first, last in groups.get(sequence, ())
                if (stop is None or first < stop) and last >= start
            ]
            return file.read_row_groups(selected, columns=columns)
        except pa.ArrowMemoryError:
            raise  # the file is not damaged
        except (OSError, pa.ArrowException) as error:
            raise damaged(self._path, name, "it cannot be read") from error


class _OpenFiles(threading.local):
    """The files that this thread has open, because reading a footer of many sequences takes longer than one of them.

    Every thread has its own, since an open file serves one reader at a time.
    """

    def __init__(self) -> None:
        self._files: dict[Path, tuple[pq.ParquetFile, dict[int, list[tuple[int, int, int]]]]] = {}

    def get(self, path: Path) -> tuple[pq.ParquetFile, dict[int, list[tuple[int, int, int]]]]:
        """Return a file, and number, first and last position of the row groups of each sequence."""
        if path not in self._files:
            while len(self._files) >= MOST_OPEN:
                self._files.pop(next(iter(self._files)))[0].close(force=True)  # the one that was opened first
            file = pq.ParquetFile(path)
            self._files[path] = file, _ranges(file.metadata)
        return self._files[path]


def require_whole(path: Path, record: TraceRecord, *, verify: bool) -> None:
    """Raise TraceError unless every file exists with its recorded size and, with `verify`, checksum."""
    for name, size in record.sizes.items():
        file = path / name
        if not file.is_file():
            raise damaged(path, name, "it is missing")
        if file.stat().st_size != size:
            raise damaged(path, name, f"it has {file.stat().st_size} bytes instead of {size}")
        if verify and checksum(file) != record.checksums[name]:
            raise damaged(path, name, "its checksum differs from the recorded one")


def _ranges(metadata: pq.FileMetaData) -> dict[int, list[tuple[int, int, int]]]:
    """Return number, first and last position of the row groups of each sequence."""
    names = [metadata.schema.column(index).name for index in range(metadata.num_columns)]
    ranges: dict[int, list[tuple[int, int, int]]] = {}
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        sequence = group.column(names.index("sequence")).statistics
        position = group.column(names.index("position")).statistics
        for each in range(sequence.min, sequence.max + 1):
            ranges.setdefault(each, []).append((number, position.min, position.max))
    return ranges


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
