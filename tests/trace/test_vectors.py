"""Vectors of 16-bit models: every number comes back as it was, in half the bytes; infinity and NaN are refused."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from kvscope.core.errors import TraceError
from kvscope.core.json_records import plain
from kvscope.trace.columns import NUMBERS, VectorType
from kvscope.trace.reader import open_trace
from kvscope.trace.record import SequenceRecord, TraceHeader
from kvscope.trace.schema import HEADER, SCHEMA_VERSION, STORES
from kvscope.trace.vectors import DTYPES, are_finite, as_column, from_column, narrowed, widened
from kvscope.trace.writer import TraceWriter
from tests.trace.make import change_header, header

ALL_BITS = np.arange(2**16, dtype=np.uint16)  # among them zeros of both signs, subnormals, infinities and NaN
HALVES: list[VectorType] = ["float16", "bfloat16"]


def numbers(bits: np.ndarray, kind: VectorType) -> np.ndarray:
    """Return the numbers of 16-bit patterns as float32, as torch converts them."""
    halves = torch.from_numpy(bits.astype(np.int32)).to(torch.int16)
    return halves.view(getattr(torch, kind)).float().numpy()


def finite_bits(kind: VectorType) -> np.ndarray:
    return ALL_BITS[np.isfinite(numbers(ALL_BITS, kind))]


def as_written(bits: np.ndarray, kind: VectorType) -> np.ndarray:
    return bits if kind == "bfloat16" else bits.view(np.float16)


def facts(kind: VectorType, head_dim: int, stored: list[str] | None = None) -> TraceHeader:
    """Return the header of a trace of one layer, by default with vectors."""
    of_one = header(stored=stored or list(STORES["qkv"]))
    return replace(
        of_one, layers=[0], layer_types=["full"], sliding_window=[None], head_dim=head_dim, vector_dtype=kind
    )


def finish(writer: TraceWriter, length: int) -> None:
    """Write tokens of one sequence and finish the trace."""
    writer.tokens(
        0,
        token_id=np.arange(length),
        text=["x"] * length,
        is_prompt=np.arange(length) < 1,
        logprob=np.zeros(length),
        entropy=np.zeros(length),
    )
    writer.finish([SequenceRecord(1, length)])


@pytest.mark.parametrize("kind", HALVES)
def test_every_finite_number_comes_back_from_disk(kind: VectorType, tmp_path: Path) -> None:
    bits = finite_bits(kind)
    expected = numbers(bits, kind)
    smallest = np.abs(expected[expected != 0]).min()
    assert smallest == (2.0**-24 if kind == "float16" else 2.0**-133), "subnormals are among them"
    flat = as_written(bits, kind).reshape(2, -1, 64)
    with TraceWriter(tmp_path / "t", facts(kind, 64)) as writer:
        half = flat.shape[1] // 2
        for first, part in ((0, flat[:, :half]), (half, flat[:, half:])):
            writer.vectors(0, 0, first, queries=part, keys=part[::-1], values=part)
        finish(writer, flat.shape[1])
    made = open_trace(tmp_path / "t", verify=True)
    states = made.states(0, 0)
    assert {part.dtype for part in states} == {np.dtype(np.float32)}
    whole = expected.reshape(flat.shape)
    for got, own in zip(states, (whole, whole[::-1], whole), strict=True):
        assert np.array_equal(got.view(np.uint32), own.view(np.uint32)), "bit for bit, signs of zeros too"
    assert np.array_equal(made.vectors(0, 0, "keys", 3, 9), whole[::-1][:, 3:9])
    file = made.path / "states" / "layer=000.parquet"
    assert pq.read_schema(file).field("queries").type.value_type == NUMBERS[kind]


@pytest.mark.parametrize("kind", HALVES)
def test_floats_are_narrowed_where_that_is_exact(kind: VectorType) -> None:
    bits = finite_bits(kind)
    for wide in (np.float32, np.float64):
        stored = narrowed(numbers(bits, kind).astype(wide), kind)
        assert stored.dtype == DTYPES[kind]
        assert np.array_equal(stored.view(np.uint16), bits)
        assert np.array_equal(widened(stored, kind), numbers(bits, kind))
    for inexact in (1 + 2.0**-12, 1e30 if kind == "float16" else 1 + 2.0**-8):
        with pytest.raises(ValueError, match=f"not exact in {kind}"):
            narrowed(np.array([1, inexact], np.float32), kind)


@pytest.mark.parametrize("kind", HALVES)
def test_what_is_not_finite_is_known_by_its_bits(kind: VectorType) -> None:
    for bits, number in enumerate(numbers(ALL_BITS, kind)):
        if bits % 97 == 0 or not np.isfinite(number):
            assert are_finite(as_written(ALL_BITS[bits : bits + 1], kind), kind) == np.isfinite(number)


@pytest.mark.parametrize("kind", ["float32", *HALVES])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_is_refused(kind: VectorType, bad: float, tmp_path: Path) -> None:
    array = np.zeros((2, 3, 4), np.float32)
    array[1, 2, 3] = bad
    stored = array if kind == "float32" else narrowed(array, kind)
    with TraceWriter(tmp_path / "t", facts(kind, 4)) as writer:
        with pytest.raises(TraceError, match="layer 0, positions 5 to 7: values are not finite"):
            writer.vectors(0, 0, 5, queries=stored[:1], keys=stored[:1], values=stored)
        with pytest.raises(TraceError, match="layer 0, positions 5 to 7: layer inputs are not finite"):
            writer.hidden(0, 0, 5, stored[1])


def test_a_vector_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "t", replace(header(), vector_dtype="bfloat16")) as writer:
        with pytest.raises(TraceError, match="layer 0: queries have numbers that are not exact in bfloat16") as caught:
            writer.vectors(0, 0, 0, queries=np.full((2, 3, 4), 1.001, np.float32))
        assert "float32" in caught.value.todo


@pytest.mark.parametrize("kind", HALVES)
def test_half_the_bytes(kind: VectorType, tmp_path: Path) -> None:
    """Of numbers of a bell curve, as vectors are: against those of 32 bit, and before they are compressed."""
    drawn = torch.randn(2, 512, 64, generator=torch.Generator().manual_seed(0))
    halves = drawn.to(getattr(torch, kind))
    stored = (halves.view(torch.uint16) if kind == "bfloat16" else halves).numpy()
    sizes, raw = {}, {}
    for name, array in (("float32", drawn.numpy()), (kind, stored)):
        with TraceWriter(tmp_path / name, facts(name, 64)) as writer:
            writer.vectors(0, 0, 0, queries=array, keys=array[:, ::-1], values=array[:, ::2].repeat(2, 1))
            finish(writer, 512)
        made = open_trace(tmp_path / name)
        sizes[name], raw[name] = made.record.bytes, _raw_bytes(made.path / "states" / "layer=000.parquet")
    assert np.array_equal(made.vectors(0, 0, "queries"), halves.float().numpy())
    assert sizes[kind] < 0.54 * sizes["float32"]
    assert 2 * 3 * drawn.numel() <= raw[kind] < 0.52 * raw["float32"]


def _raw_bytes(file: Path) -> int:
    """Return the bytes of the vectors in a file before they are compressed."""
    whole = pq.ParquetFile(file).metadata
    groups = [whole.row_group(number) for number in range(whole.num_row_groups)]
    columns = [group.column(index) for group in groups for index in range(group.num_columns)]
    return sum(column.total_uncompressed_size for column in columns if "." in column.path_in_schema)


@pytest.mark.parametrize("kind", HALVES)
def test_layer_inputs_come_back(kind: VectorType, tmp_path: Path) -> None:
    bits = finite_bits(kind)[: 2 * 40 * 8]
    inputs = as_written(bits, kind).reshape(40, 16)
    of_one = facts(kind, 16, ["hidden"])
    with TraceWriter(tmp_path / "t", replace(of_one, model=replace(of_one.model, weights=[0.5]))) as writer:
        writer.hidden(0, 0, 0, inputs)
        finish(writer, 40)
    got = open_trace(tmp_path / "t").hidden(0, 0)
    assert got.dtype == np.float32
    assert np.array_equal(got, numbers(bits, kind).reshape(40, 16))


def of_two(kind: VectorType, path: Path) -> Path:
    """Record a trace with 40 tokens of vectors."""
    bits = finite_bits("bfloat16")[: 40 * 2 * 16].reshape(2, 40, 16)
    array = as_written(bits, "bfloat16") if kind == "bfloat16" else narrowed(np.zeros((2, 40, 16)), kind)
    with TraceWriter(path, facts(kind, 16)) as writer:
        writer.vectors(0, 0, 0, queries=array, keys=array, values=array)
        finish(writer, 40)
    return path


@pytest.mark.parametrize("written", ["float32", *HALVES])
@pytest.mark.parametrize("said", ["float32", *HALVES])
@pytest.mark.parametrize(
    ("version", "message"),
    [(SCHEMA_VERSION, "it is the file of another trace"), (5, r"states/layer=000\.parquet: it has other columns")],
)
def test_only_the_type_that_the_header_says_is_read(
    written: VectorType, said: VectorType, version: int, message: str, tmp_path: Path
) -> None:
    """Prevents numbers that are read as those of another type, whichever version the trace claims to be."""
    path = of_two(written, tmp_path / "t")
    if written == said:
        assert open_trace(path).vectors(0, 0, "keys").shape == (2, 40, 16)
        return
    change_header(path, {"vector_dtype": said}, version=version)
    with pytest.raises(TraceError, match=message):
        open_trace(path).vectors(0, 0, "keys")


def test_a_type_that_no_trace_has_is_refused(tmp_path: Path) -> None:
    path = of_two("bfloat16", tmp_path / "t")
    change_header(path, {"vector_dtype": "float64"})
    with pytest.raises(TraceError, match=r"damaged: trace\.json: vector_dtype"):
        open_trace(path)


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0])
def test_a_stored_number_that_is_not_finite_is_refused(bits: int, tmp_path: Path) -> None:
    """Prevents infinity or NaN in vectors whose file was changed with its checksum."""
    path = of_two("bfloat16", tmp_path / "t")
    file = path / "states" / "layer=000.parquet"
    table = pq.read_table(file)
    flat = from_column(table["values"].combine_chunks().flatten()).copy()
    flat[-1] = bits
    column = pa.ListArray.from_arrays(
        table["values"].combine_chunks().offsets, as_column(flat, NUMBERS["bfloat16"]), type=table["values"].type
    )
    pq.write_table(table.set_column(table.schema.get_field_index("values"), table.schema.field("values"), column), file)
    content = file.read_bytes()
    data = json.loads((path / HEADER).read_text())
    data["sizes"]["states/layer=000.parquet"] = len(content)
    data["checksums"]["states/layer=000.parquet"] = hashlib.sha256(content).hexdigest()
    change_header(path, data)
    with pytest.raises(TraceError, match="a number of values is not finite"):
        open_trace(path).vectors(0, 0, "values")


def test_the_digest_of_a_header_of_32_bit_is_that_of_version_six() -> None:
    """Prevents that files of an earlier trace, which have the digest, are refused as those of another trace."""
    assert "vector_dtype" not in plain(facts("float32", 16))
    assert len({facts(kind, 16).digest for kind in ("float32", "float16", "bfloat16")}) == 3
