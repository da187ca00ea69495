"""Rows loaded for a device are those of the CPU: unpacked from stored lists, recomputed from vectors, or whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvscope.engine.layers import RecordedLayers, row_loader
from kvscope.engine.recomputed_rows import RecomputedRows, attend
from kvscope.engine.row_loading import PackedRows, RowLoader, WholeRows, unpacked
from kvscope.kernels import device as devices
from kvscope.trace import derive
from kvscope.trace.layer_records import LayerAttention
from kvscope.trace.reader import Trace, open_trace
from tests.trace.make import record as record_maps
from tests.trace.test_derive import record as record_vectors

CPU = torch.device("cpu")
HEADS, KV_HEADS, SIZE = 4, 2, 3


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the path of a GPU on a CPU."""
    monkeypatch.setattr(devices, "on_cpu", lambda device: False)


@pytest.fixture(scope="module")
def example() -> Trace:
    return open_trace(Path(__file__).parents[2] / "traces" / "example")


def loaded(loader: RowLoader, start: int, stop: int) -> torch.Tensor:
    return loader.read(start, stop).place().rows


@given(st.lists(st.lists(st.floats(0, 1, width=16), max_size=6), min_size=1, max_size=5), st.randoms())
@settings(max_examples=40, deadline=None)
def test_unpacked_equals_the_plain_loop(lists: list[list[float]], random) -> None:
    order = list(range(len(lists)))
    random.shuffle(order)  # the file may hold rows in any order
    flat: list[float] = []
    first = [0] * len(lists)
    for row in order:
        first[row] = len(flat)
        flat += lists[row]
    sizes = torch.tensor([len(row) for row in lists])
    rows = unpacked(torch.tensor(flat, dtype=torch.float16), torch.tensor(first), sizes, 6)
    assert rows.dtype == torch.float32
    assert rows.tolist() == [[*row, *[0.0] * (6 - len(row))] for row in lists]


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_packed_rows_are_the_rows(example: Trace, block: int) -> None:
    length = example.sequences[0].length
    whole, packed = (kind(example, 0, example.layers, CPU) for kind in (WholeRows, PackedRows))
    for start in range(0, length, block)[:: max(1, length // block // 8)]:
        stop = min(start + block, length)
        assert torch.equal(loaded(packed, start, stop), loaded(whole, start, stop))


def test_packed_rows_of_several_sequences(tmp_path: Path) -> None:
    record_maps(tmp_path / "t", lengths=[11, 8], block=5)
    trace = open_trace(tmp_path / "t")
    for sequence, length in enumerate([11, 8]):
        whole, packed = (kind(trace, sequence, trace.layers, CPU) for kind in (WholeRows, PackedRows))
        for start in range(0, length, 3):
            stop = min(start + 3, length)
            assert torch.equal(loaded(packed, start, stop), loaded(whole, start, stop))


@given(
    length=st.integers(1, 12),
    first=st.integers(0, 5),
    window=st.none() | st.integers(1, 9),
    softcap=st.none() | st.floats(0.5, 20),
    with_sinks=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_attend_equals_that_of_the_cpu(length, first, window, softcap, with_sinks, seed) -> None:
    random = np.random.default_rng(seed)
    query = random.normal(size=(HEADS, length, SIZE)).astype(np.float32) * 3
    key = random.normal(size=(KV_HEADS, first + length, SIZE)).astype(np.float32)
    how = LayerAttention(0.7, softcap, window, random.normal(size=HEADS).tolist() if with_sinks else None)
    expected = np.zeros((HEADS, length, first + length), np.float32)
    expected_sums = derive.attend(query, key, first, how, expected)
    rows = torch.zeros(expected.shape)
    sinks = torch.tensor(how.sinks, dtype=torch.float64) if how.sinks else None
    sums = attend(torch.from_numpy(query), torch.from_numpy(key), first, how, rows, sinks)
    np.testing.assert_array_almost_equal_nulp(rows.numpy(), expected, nulp=1)
    np.testing.assert_array_almost_equal_nulp(sums.numpy(), expected_sums, nulp=1)


@pytest.mark.parametrize("sinks", [False, True])
def test_recomputed_rows_and_sums_are_those_of_the_trace(tmp_path: Path, sinks: bool, elsewhere: None) -> None:
    trace = record_vectors(tmp_path / "t", sinks=sinks)
    for sequence in trace.sequences:
        layers = RecordedLayers(trace, sequence, trace.layers, CPU)
        for start in range(0, sequence.length, 4):
            stop = min(start + 4, sequence.length)
            expected = np.stack([trace.attention(sequence.index, layer, start, stop) for layer in trace.layers])
            np.testing.assert_array_almost_equal_nulp(layers.rows(start, stop).numpy(), expected, nulp=1)
        if not sinks:
            assert layers.missing is None
            continue
        sums = np.stack([trace.row_sums(sequence.index, layer) for layer in trace.layers])
        assert layers.missing is not None
        np.testing.assert_allclose(layers.missing.numpy(), 1 - sums, atol=1e-7)


def test_recomputed_rows_in_any_order(tmp_path: Path) -> None:
    trace = record_vectors(tmp_path / "t")
    loader = RecomputedRows(trace, 0, trace.layers, CPU)
    for start, stop in [(9, 14), (0, 4), (20, 23), (2, 21)]:
        expected = np.stack([trace.attention(0, layer, start, stop) for layer in trace.layers])
        np.testing.assert_array_almost_equal_nulp(loaded(loader, start, stop).numpy(), expected, nulp=1)


def test_each_store_has_its_loader(example: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = record_vectors(tmp_path / "t")
    assert isinstance(row_loader(example, 0, example.layers, CPU), WholeRows)
    assert isinstance(row_loader(vectors, 0, vectors.layers, CPU), WholeRows)
    monkeypatch.setattr(devices, "on_cpu", lambda device: False)
    assert isinstance(row_loader(example, 0, example.layers, CPU), PackedRows)
    assert isinstance(row_loader(vectors, 0, vectors.layers, CPU), RecomputedRows)
