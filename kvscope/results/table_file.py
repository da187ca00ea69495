"""A Parquet file of results, whose tables are compressed and written while the replay goes on."""

from __future__ import annotations

import contextlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


class TableFile:
    """Writes tables to one file in a thread of its own, in their order; one is written while the next is made.

    Parameters
    ----------
    path : Path
        File to write.
    schema : pa.Schema
        Its columns and metadata.
    use_dictionary : bool
        Whether columns are encoded with dictionaries: worth it where numbers repeat.

    Raises
    ------
    OSError
        If the file cannot be written. An error of the thread is raised by the next call of `write` or by `close`.
    """

    def __init__(self, path: Path, schema: pa.Schema, *, use_dictionary: bool) -> None:
        self._file = pa.OSFile(os.fsencode(path), "wb")  # a str has to be UTF-8
        self._writer = pq.ParquetWriter(self._file, schema, compression="zstd", use_dictionary=use_dictionary)
        self._thread = ThreadPoolExecutor(1)
        self._written: Future[None] | None = None

    def write(self, table: pa.Table) -> None:
        """Let the thread write a table as one row group, when the table before it is written."""
        self._wait()
        self._written = self._thread.submit(self._writer.write_table, table)

    def close(self) -> None:
        """Write what waits, and close the file."""
        self._wait()
        self._thread.shutdown()
        self._writer.close()
        self._file.close()

    def abandon(self) -> None:
        """Close the file of a replay that is given up; that it cannot be written is not an error."""
        self._thread.shutdown(cancel_futures=True)
        for part in (self._writer, self._file):
            with contextlib.suppress(OSError):
                part.close()

    def _wait(self) -> None:
        written, self._written = self._written, None
        if written is not None:
            written.result()
