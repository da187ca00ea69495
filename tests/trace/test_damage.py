"""Damaged traces are refused before they are used: files, fields of the header, and rows whose checksums fit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kvscope.core.errors import TraceError
from kvscope.trace.importer import import_maps
from kvscope.trace.reader import open_trace
from kvscope.trace.row_checks import faults_of_sums, faults_of_weights, misplaced
from kvscope.trace.schema import HEADER
from kvscope.trace.stretches import count_stretches, stretches
from tests.trace.make import change_header, record

NAME = "attention/layer=000.parquet"


def rewritten(path: Path, change: Callable[[pa.Table], pa.Table], name: str = NAME) -> None:
    """Write a table again with the checksum and size that fit."""
    found = pq.read_table(path / name, partitioning=None)
    pq.write_table(change(found), path / name)
    content = (path / name).read_bytes()
    data = json.loads((path / HEADER).read_text())
    data["sizes"][name], data["checksums"][name] = len(content), hashlib.sha256(content).hexdigest()
    change_header(path, {"sizes": data["sizes"], "checksums": data["checksums"]})


def weights(change: Callable[[list[list[float]]], None]) -> Callable[[pa.Table], pa.Table]:
    def made(found: pa.Table) -> pa.Table:
        values = found["weights"].to_pylist()
        change(values)
        return found.set_column(5, found.schema.field(5), pa.array(values, found.schema.field(5).type))

    return made


def read_layer(path: Path, *, as_stored: bool = False) -> None:
    trace = open_trace(path)
    if as_stored:
        trace.stored_rows(0, 0, 0, 9)
    else:
        trace.attention(0, 0)
    trace.key_norms(0, 0)


def put(row: int, key: int, value: float) -> Callable[[list[list[float]]], None]:
    def change(values: list[list[float]]) -> None:
        values[row][key] = value

    return change


def test_a_flipped_bit_is_found_at_the_first_reading(tmp_path: Path) -> None:
    record(tmp_path / "t", lengths=[9])
    before = open_trace(tmp_path / "t").attention(0, 2)
    content = bytearray((tmp_path / "t" / NAME).read_bytes())
    content[len(content) // 2] ^= 4
    (tmp_path / "t" / NAME).write_bytes(bytes(content))
    trace = open_trace(tmp_path / "t")
    assert np.array_equal(trace.attention(0, 2), before), "another file is read"
    with pytest.raises(TraceError, match=r"damaged: attention/layer=000\.parquet: its checksum differs"):
        trace.attention(0, 0)


def test_without_comparison_the_rows_are_still_checked(tmp_path: Path) -> None:
    record(tmp_path / "t", lengths=[9])
    content = (tmp_path / "t" / NAME).read_bytes()
    found = pq.read_table(tmp_path / "t" / NAME, partitioning=None)
    pq.write_table(weights(put(5, 0, 0.9))(found), tmp_path / "t" / NAME, compression="lz4")
    made = (tmp_path / "t" / NAME).read_bytes()
    data = json.loads((tmp_path / "t" / HEADER).read_text())
    change_header(tmp_path / "t", {"sizes": data["sizes"] | {NAME: len(made)}})
    with pytest.raises(TraceError, match="checksum differs"):
        open_trace(tmp_path / "t").attention(0, 0)
    with pytest.raises(TraceError, match="has another sum than was recorded"):
        open_trace(tmp_path / "t", compare=False).attention(0, 0)
    assert content != made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.slice(1), "it has 17 rows instead of 18"),
        (lambda t: t.take(pa.array([0, *range(17)])), "it has 2 rows for head 0, position 0"),
        (lambda t: t.drop_columns(["row_sum"]), "it has other columns"),
        (lambda t: t.set_column(1, t.schema.field(1), pa.array([2] * 18, pa.int32())), "is of another layer"),
        (lambda t: t.replace_schema_metadata(None), "the file of another trace, kind or layer"),
        (weights(put(3, 0, -0.25)), "a weight is negative or not finite"),
        (weights(put(3, 0, float("nan"))), "a weight is negative or not finite"),
        (weights(put(3, 0, 60000.0)), r"the row of head 0, position 3 has another sum than was recorded \(sum 60"),
        (weights(lambda rows: rows[8].pop()), "a row has not as many numbers as it must have"),
        (weights(lambda rows: rows[8].extend([0.0] * 300)), "a row has not as many numbers as it must have"),
    ],
)
def test_rows_that_cannot_be(tmp_path: Path, change: Callable[[pa.Table], pa.Table], message: str) -> None:
    """Prevents a file with a fitting checksum, but rows that no recording has, from being replayed."""
    record(tmp_path / "t", lengths=[9])
    rewritten(tmp_path / "t", change)
    with pytest.raises(TraceError, match=message):
        open_trace(tmp_path / "t").attention(0, 0)
    with pytest.raises(TraceError, match=message):
        open_trace(tmp_path / "t").stored_rows(0, 0, 0, 9)


def test_the_file_of_another_layer_is_refused_even_if_its_checksum_is_recorded(tmp_path: Path) -> None:
    record(tmp_path / "t", lengths=[9])
    rewritten(
        tmp_path / "t", lambda _: pq.read_table(tmp_path / "t" / "attention/layer=002.parquet", partitioning=None)
    )
    with pytest.raises(TraceError, match="another trace, kind or layer"):
        open_trace(tmp_path / "t").attention(0, 0)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    record(tmp_path / "t", lengths=[9])
    (tmp_path / "t" / NAME).rename(tmp_path / "outside")
    (tmp_path / "t" / NAME).symlink_to(tmp_path / "outside")
    with pytest.raises(TraceError, match="it is a link to a file outside"):
        open_trace(tmp_path / "t")
    (tmp_path / "link").symlink_to(tmp_path / "t", target_is_directory=True)
    (tmp_path / "t" / NAME).unlink()
    (tmp_path / "outside").rename(tmp_path / "t" / NAME)
    assert open_trace(tmp_path / "link").attention(0, 0).shape == (2, 9, 9), "the folder itself may be one"


@pytest.mark.parametrize(
    "change", [{"kv_heads": 1}, {"learned_sinks": True}, {"command": "x"}, {"sequences": [{"prompt": 3, "length": 9}]}]
)
def test_a_header_that_was_changed_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    record(tmp_path / "t", lengths=[9])
    file = tmp_path / "t" / HEADER
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(TraceError, match="changed since it was written"):
        open_trace(tmp_path / "t")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequences": [{"prompt": 3, "length": 9}]}, "the prompt of sequence 0 has not 3 tokens"),
        ({"sequences": [{"prompt": 4, "length": 60}]}, "tokens.parquet: it has 9 rows instead of 60"),
        ({"sequences": [{"prompt": 4, "length": 2**50}]}, "tokens.parquet: it has 9 rows instead of"),
        ({"heads": 2**40}, "attention/layer=000.parquet: it has 18 rows instead of"),
        ({"layers": [0], "layer_types": ["full"], "sliding_window": [None]}, "is not a file of this trace"),
        ({"sizes": {}, "checksums": {}}, "is missing"),
        ({"stored": ["maps", "value_l1", "value_l2", "key_l2", "queries"]}, "it has similarity, which the header"),
        ({"stored": ["maps", "fish"]}, "stored: it names 'fish'"),
        ({"sliding_window": [3, 3]}, "outside the window of 3 keys"),
    ],
)
def test_an_old_header_is_compared_with_the_files(tmp_path: Path, change: dict[str, object], message: str) -> None:
    """Before version 6 a header has no checksum; no memory is taken for sizes that the files do not have."""
    record(tmp_path / "t", lengths=[9])
    change_header(tmp_path / "t", {}, version=4)
    open_trace(tmp_path / "t").attention(0, 0)
    change_header(tmp_path / "t", change, version=4)
    with pytest.raises(TraceError, match=message):
        read_layer(tmp_path / "t")
    with pytest.raises(TraceError, match=message):
        read_layer(tmp_path / "t", as_stored=True)


def test_the_identity_covers_what_decides(tmp_path: Path) -> None:
    record(tmp_path / "t", lengths=[9])
    before = open_trace(tmp_path / "t").identity
    change_header(tmp_path / "t", {"command": "kvscope trace", "device": "cuda"})
    assert open_trace(tmp_path / "t").identity == before, "how a trace came about decides nothing"
    record(tmp_path / "u", lengths=[9], prompt=3)
    assert open_trace(tmp_path / "u").identity != before


@pytest.mark.parametrize("kind", [np.complex64, "U4"])
def test_arrays_that_are_no_numbers(tmp_path: Path, kind: object) -> None:
    np.savez(tmp_path / "m.npz", attention=np.ones((1, 1, 1, 1)).astype(kind))
    with pytest.raises(Exception, match="attention has the type") as caught:
        import_maps(tmp_path / "m.npz", None, tmp_path / "t")
    assert len(str(caught.value).splitlines()) == 2


def test_numbers_too_large_for_32_bit(tmp_path: Path) -> None:
    np.savez(tmp_path / "m.npz", attention=np.full((1, 1, 1, 1), 1e300))
    with pytest.raises(TraceError, match="not finite"):
        import_maps(tmp_path / "m.npz", None, tmp_path / "t")
    np.savez(tmp_path / "m.npz", attention=np.ones((1, 1, 1, 1)), key_l2=np.full((1, 1, 1), 1e300))
    with pytest.raises(Exception, match="key_l2 contains values that are not finite in 32 bit"):
        import_maps(tmp_path / "m.npz", None, tmp_path / "t")


def test_sums_of_rows() -> None:
    sums = np.array([1.0, 0.5, 1.5, np.nan, -0.1])
    faults = faults_of_sums(sums, learned_sinks=False)
    assert faults["sums to more than one"].tolist() == [False, False, True, True, False]
    assert faults["sums to less than one"].tolist() == [False, True, False, False, True]
    assert not faults_of_sums(sums, learned_sinks=True)["sums to less than one"].any()
    assert faults_of_sums(sums, learned_sinks=True)["sums to less than zero"].tolist() == [False] * 4 + [True]
    rows = np.random.default_rng(0).random((50, 300))
    rows /= rows.sum(-1, keepdims=True)
    half = rows.astype(np.float16).astype(np.float32).sum(-1)
    assert not faults_of_weights(half, rows.sum(-1), np.full(50, 300)).any()
    assert faults_of_weights(half + 2e-3, rows.sum(-1), np.full(50, 300)).all()


def test_places_of_rows() -> None:
    head, position = np.repeat([0, 1], 3), np.tile([1, 3, 5], 2)
    every = np.array([1, 3, 5])
    assert misplaced(head, position, 2, every) is None
    assert misplaced(head[:-1], position[:-1], 2, every) == "it has no row for head 1, position 5"
    assert misplaced(head[[0, *range(6)]], position[[0, *range(6)]], 2, every) == "it has 2 rows for head 0, position 1"
    assert "head that is not one of 1" in str(misplaced(head, position, 1, every))
    assert "positions that were not recorded" in str(misplaced(head, position + 1, 2, every))
    assert misplaced(head[:0], position[:0], 2, every) == "it has no row for head 0, position 1"


@pytest.mark.parametrize("length", [1, 255, 256, 257, 512, 600])
def test_the_number_of_stretches(length: int) -> None:
    for prompt in {1, length // 2 or 1, min(256, length), length}:
        assert count_stretches(prompt, length) == len(stretches(prompt, length))
