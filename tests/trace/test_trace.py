"""A trace is read as it was recorded, and anything else is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvscope.core.errors import OutputExists, TraceError
from kvscope.trace import parquet
from kvscope.trace.newest import newest_trace
from kvscope.trace.reader import open_trace
from kvscope.trace.schema import HEADER
from kvscope.trace.space import estimate_bytes, require_space
from kvscope.trace.writer import TraceWriter
from tests.trace.make import header, record, rows_of


@given(
    length=st.integers(1, 12),
    block=st.integers(1, 12),
    heads=st.sampled_from([1, 2, 4]),
    group=st.sampled_from([1, 2]),
    sequences=st.integers(1, 3),
    values=st.sampled_from([4, 50, 10**6]),
)
@settings(max_examples=30, deadline=None)
def test_rows_come_back(tmp_path_factory, length, block, heads, group, sequences, values) -> None:
    path = tmp_path_factory.mktemp("t") / "trace"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "ROW_GROUP_VALUES", values)
        made = record(
            path, lengths=[length + s for s in range(sequences)], block=block, heads=heads * group, kv_heads=heads
        )
    trace = open_trace(path, verify=True)
    for number, rows in enumerate(made):
        for layer in (0, 2):
            got = trace.attention(number, layer)
            assert np.array_equal(got, rows[layer].astype(np.float16).astype(np.float32))
            start, stop = length // 3, max(length // 3 + 1, length - 1)
            assert np.array_equal(trace.attention(number, layer, start, stop), got[:, start:stop, :stop])
            assert np.allclose(trace.row_sums(number, layer), 1, atol=1e-6)


def test_signals_come_back(tmp_path: Path) -> None:
    record(tmp_path / "t", lengths=[7], heads=4, kv_heads=2)
    trace = open_trace(tmp_path / "t")
    norms = trace.value_norms(0, 2, "l1")
    assert norms.shape == (2, 7)
    assert norms[1, 3] == np.float32(1 + 3 + 10)  # see make.record: head + position + 10 for L1
    assert trace.value_norms(0, 2, "l2")[1, 3] == np.float32(1 + 3 + 20)
    assert trace.key_norms(0, 2)[1, 3] == np.float32(1 + 3 + 30)
    similarity = trace.similarity(0, 0)
    assert np.array_equal(similarity, similarity.transpose(0, 2, 1))
    assert (similarity.diagonal(axis1=1, axis2=2) == 1).all()
    assert similarity[1, 5, 2] == np.float16(0.52)
    assert np.array_equal(trace.mean_queries(0, 0), np.arange(7 * 3, dtype=np.float32).reshape(7, 3))
    assert trace.tokens(0)["text"].tolist() == [f"t{i}" for i in range(7)]


def test_a_missing_signal_is_named(tmp_path: Path) -> None:
    record(tmp_path / "t", lengths=[4], stored=["maps"])
    with pytest.raises(TraceError, match="does not hold value_l1") as caught:
        open_trace(tmp_path / "t").value_norms(0, 0)
    assert "kvscope trace" in caught.value.todo


def test_plain_pandas_reads_it(tmp_path: Path) -> None:
    record(tmp_path / "t", lengths=[5])
    frame = pd.read_parquet(tmp_path / "t" / "attention" / "layer=000.parquet", partitioning=None)
    assert list(frame.columns) == ["sequence", "layer", "head", "position", "row_sum", "weights"]
    assert [len(row) for row in frame["weights"][frame["head"] == 0]] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.5])
def test_a_weight_that_is_none_is_refused(tmp_path: Path, bad: float) -> None:
    rows = rows_of(1, 2, 5)
    rows[1, 3, 2] = bad
    with (
        TraceWriter(tmp_path / "t", header()) as writer,
        pytest.raises(TraceError, match="layer 0, head 1, position 3"),
    ):
        writer.attention(0, 0, 0, rows)


def test_messages_tell_apart_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="no trace at"):
        open_trace(tmp_path / "none")
    (tmp_path / "other").mkdir()
    with pytest.raises(TraceError, match="is not a kvscope trace"):
        open_trace(tmp_path / "other")
    record(tmp_path / "t", lengths=[5])
    file = tmp_path / "t" / HEADER
    whole = json.loads(file.read_text())
    for change, message in [
        ({"schema": 0}, "older format 0"),
        ({"schema": 99}, "newer than this kvscope"),
        ({"complete": False}, "is incomplete"),
        ({"kind": "block-hashes"}, "is not a kvscope trace"),
    ]:
        file.write_text(json.dumps(whole | change))
        with pytest.raises(TraceError, match=message):
            open_trace(tmp_path / "t")
    file.write_text(json.dumps({key: value for key, value in whole.items() if key != "heads"}))
    with pytest.raises(TraceError, match="damaged"):
        open_trace(tmp_path / "t")
    file.write_text(file.read_text()[:40])
    with pytest.raises(TraceError, match="is not JSON"):
        open_trace(tmp_path / "t")


def test_a_trace_cut_in_half_is_damaged(tmp_path: Path) -> None:
    record(tmp_path / "t", lengths=[9])
    file = tmp_path / "t" / "attention" / "layer=002.parquet"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(TraceError, match=r"damaged: attention/layer=002.parquet: it has"):
        open_trace(tmp_path / "t")
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(TraceError, match="checksum"):
        open_trace(tmp_path / "t", verify=True)
    file.unlink()
    with pytest.raises(TraceError, match="it is missing"):
        open_trace(tmp_path / "t")


def test_nothing_is_overwritten_without_force(tmp_path: Path) -> None:
    record(tmp_path / "t", lengths=[4])
    before = open_trace(tmp_path / "t").identity
    with pytest.raises(OutputExists, match="exists") as caught:
        TraceWriter(tmp_path / "t", header())
    assert "--force" in caught.value.todo
    record(tmp_path / "t", lengths=[6], force=True)
    assert open_trace(tmp_path / "t").identity != before


@pytest.mark.parametrize("name", ["t", "t.incomplete"])
def test_force_never_removes_what_is_no_trace(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name / "attention"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("years")
    with pytest.raises(TraceError, match=r"holds attention/thesis\.txt, which no trace has"):
        TraceWriter(tmp_path / "t", header(), force=True)
    assert (folder / "thesis.txt").read_text() == "years"


def test_a_killed_recording_never_passes_for_a_trace(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from tests.trace.make import header, rows_of\n"
        "from kvscope.trace.writer import TraceWriter\n"
        f"w = TraceWriter(Path({str(tmp_path / 't')!r}), header()); w.attention(0, 0, 0, rows_of(0, 2, 64))\n"
        "print('writing', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    assert child.stdout is not None
    assert child.stdout.readline() == b"writing\n"
    with pytest.raises(TraceError, match=f"process {child.pid} is writing"):
        TraceWriter(tmp_path / "t", header())
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    with pytest.raises(TraceError, match="incomplete"):
        open_trace(tmp_path / "t")
    with pytest.raises(TraceError, match="no complete trace"):
        newest_trace(tmp_path)
    record(tmp_path / "t", lengths=[4])  # and it is in nobody's way
    assert newest_trace(tmp_path) == tmp_path / "t"


def test_an_exception_removes_what_was_written(tmp_path: Path) -> None:
    def stops() -> None:
        with TraceWriter(tmp_path / "t", header()) as writer:
            writer.attention(0, 0, 0, rows_of(0, 2, 4))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stops()
    assert not list(tmp_path.iterdir())


def test_one_that_was_set_aside_is_named(tmp_path: Path) -> None:
    record(tmp_path / "t", lengths=[4])
    (tmp_path / "t").rename(tmp_path / "t.replaced")
    with pytest.raises(TraceError, match="was being replaced") as caught:
        open_trace(tmp_path / "t")
    assert "rename" in caught.value.todo


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "t", header()) as writer:

        def full(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(parquet.LayerFile, "add", full)
            with pytest.raises(TraceError, match="is full"):
                writer.attention(0, 0, 0, rows_of(0, 2, 4))
    with pytest.raises(TraceError, match=r"1000000.0 TB, and the disk of .* free"):
        require_space(tmp_path, 10**18)


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "traces").write_text("x")
    with pytest.raises(TraceError, match="cannot write"):
        TraceWriter(tmp_path / "traces" / "t", header())


def test_the_newest_is_the_last_recorded(tmp_path: Path) -> None:
    for name in ("b", "a"):
        record(tmp_path / name, lengths=[4])
        time.sleep(0.01)
    created = json.loads((tmp_path / "b" / HEADER).read_text())["created"]
    file = tmp_path / "a" / HEADER
    file.write_text(json.dumps(json.loads(file.read_text()) | {"created": created}))
    os.utime(tmp_path / "a", (time.time() + 5, time.time() + 5))
    assert newest_trace(tmp_path) == tmp_path / "a"


@pytest.mark.parametrize("length", [256, 512])
def test_the_estimate_is_near(tmp_path: Path, length: int) -> None:
    record(tmp_path / "t", lengths=[length], heads=8, kv_heads=4)
    files = (tmp_path / "t").rglob("*.parquet")
    real = sum(file.stat().st_size for file in files if file.parent.name != "keys")  # made-up cosines compress
    guess = estimate_bytes(layers=2, heads=8, kv_heads=0, head_dim=3, lengths=[length])
    assert 0.75 < guess / real < 1.35
