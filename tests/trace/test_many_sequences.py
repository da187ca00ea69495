"""Files are opened once, however many sequences are read from them."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kvscope.trace import files
from kvscope.trace.reader import open_trace
from tests.trace.make import record


@pytest.mark.parametrize("count", [3, 30])
def test_a_file_is_opened_once_for_all_sequences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    record(tmp_path / "t", lengths=[4] * count)
    opened: list[str] = []

    class Counted(pq.ParquetFile):
        def __init__(self, source: pa.OSFile) -> None:
            super().__init__(source)
            opened.append(self.schema_arrow.names[-1])

    monkeypatch.setattr(files.pq, "ParquetFile", Counted)
    trace = open_trace(tmp_path / "t")
    for sequence in range(count):
        for layer in trace.layers:
            trace.attention(sequence, layer)
            trace.row_sums(sequence, layer)
    assert opened.count("entropy") <= 1, "of the tokens"
    assert len(opened) == len(trace.layers) + opened.count("entropy")


def test_no_more_files_are_open_than_a_process_may_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(tmp_path / "t", lengths=[4, 6])
    monkeypatch.setattr(files, "MOST_OPEN", 1)
    trace = open_trace(tmp_path / "t")
    for sequence in (0, 1, 0):
        for layer in trace.layers:
            assert trace.attention(sequence, layer).shape[-1] == [4, 6][sequence]
    assert len(trace._files._open._files) == 1
