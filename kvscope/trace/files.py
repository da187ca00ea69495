"""Read the Parquet files of a finished trace, and check that they are intact."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from kvscope.core.errors import TraceError
from kvscope.core.output import checksum
from kvscope.trace.record import TraceRecord

Floats = NDArray[np.float32]


class TraceFiles:
    """Reads tables from the files of one trace; raises TraceError for a file that cannot be read.

    Parameters
    ----------
    path : Path
        Folder of the trace.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._index: dict[str, list[tuple[int, int, int]]] = {}

    def of_sequence(self, name: str, sequence: int, columns: list[str]) -> pa.Table:
        """Return columns of a file for one sequence."""
        try:
            return pq.read_table(
                self._path / name, partitioning=None, columns=columns, filters=[("sequence", "=", sequence)]
            )
        except (OSError, pa.ArrowException) as error:
            raise damaged(self._path, name, "it cannot be read") from error

    def whole(self, name: str) -> pa.Table:
        """Return a whole file."""
        try:
            return pq.read_table(self._path / name, partitioning=None)
        except (OSError, pa.ArrowException) as error:
            raise damaged(self._path, name, "it cannot be read") from error

    def rows(self, name: str, sequence: int, start: int, stop: int, columns: list[str]) -> pa.Table:
        """Return the row groups of a layer's file that contain any of the positions `start` to `stop` - 1."""
        try:
            with pq.ParquetFile(self._path / name) as file:
                if name not in self._index:
                    self._index[name] = _ranges(file.metadata)
                selected = [
                    number
                    for number, (group_sequence, first, last) in enumerate(self._index[name])
                    if group_sequence == sequence and first < stop and last >= start
                ]
                return file.read_row_groups(selected, columns=columns)
        except (OSError, pa.ArrowException) as error:
            raise damaged(self._path, name, "it cannot be read") from error


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


def _ranges(metadata: pq.FileMetaData) -> list[tuple[int, int, int]]:
    """Return sequence, first and last position of every row group."""
    names = [metadata.schema.column(index).name for index in range(metadata.num_columns)]
    ranges = []
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        sequence = group.column(names.index("sequence")).statistics
        position = group.column(names.index("position")).statistics
        ranges.append((sequence.min, position.min, position.max))
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
