"""Rows recomputed from vectors equal the plain-loop reference, in any blocks; damaged files are refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvscope.core.errors import TraceError
from kvscope.core.seal import SEAL
from kvscope.trace import derive
from kvscope.trace.importer import import_maps
from kvscope.trace.layer_records import LayerAttention
from kvscope.trace.reader import Trace, open_trace
from kvscope.trace.record import SequenceRecord
from kvscope.trace.schema import HEADER, STORES
from kvscope.trace.space import estimate_bytes
from kvscope.trace.writer import TraceWriter
from tests.reference import attention as twin
from tests.trace.make import change_header, header

LENGTH, HEADS, KV_HEADS, SIZE = 23, 4, 2, 3


@given(
    length=st.integers(1, 12),
    first=st.integers(0, 5),
    block=st.integers(1, 5),
    window=st.none() | st.integers(1, 9),
    softcap=st.none() | st.floats(0.5, 20),
    sinks=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_attend_equals_the_plain_loop(length, first, block, window, softcap, sinks, seed) -> None:
    random = np.random.default_rng(seed)
    query = random.normal(size=(HEADS, length, SIZE)).astype(np.float32) * 3
    key = random.normal(size=(KV_HEADS, first + length + 2, SIZE)).astype(np.float32)
    how = LayerAttention(0.7, softcap, window, random.normal(size=HEADS).tolist() if sinks else None)
    rows = np.zeros((HEADS, length, first + length), np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(derive, "BLOCK_QUERIES", block)
        sums = derive.attend(query, key, first, how, rows)
    for head in range(HEADS):
        sink = how.sinks[head] if how.sinks else None
        keys = key[head * KV_HEADS // HEADS].tolist()
        for index in range(length):
            own = first + index
            expected = twin.row(query[head, index].tolist(), keys, own, how.scaling, softcap, sink, window)
            assert rows[head, index, : own + 1].tolist() == pytest.approx(expected, abs=1e-5)
            assert not rows[head, index, own + 1 :].any()
            assert sums[head, index] == pytest.approx(sum(expected), abs=1e-5)


def states(seed: int, length: int = LENGTH) -> dict[str, np.ndarray]:
    """Return random queries, keys and values ``[heads, T, D]``."""
    random = np.random.default_rng(seed)
    heads = {"queries": HEADS, "keys": KV_HEADS, "values": KV_HEADS}
    return {name: random.normal(size=(count, length, SIZE)).astype(np.float32) for name, count in heads.items()}


def record(path: Path, *, lengths: tuple[int, ...] = (LENGTH, 9), written: int | None = None, sinks: bool = False):
    """Record a trace of vectors alone, two layers; returns it."""
    logits = [0.5, -1.0, 2.0, 0.0] if sinks else None
    facts = replace(header(HEADS, KV_HEADS, list(STORES["qkv"])), learned_sinks=sinks)
    facts.attention.extend([LayerAttention(0.6, sinks=logits), LayerAttention(0.6, 5.0, 4, logits)])
    with TraceWriter(path, facts) as writer:
        for sequence, length in enumerate(lengths):
            for layer in (0, 2):
                parts = states(10 * sequence + layer, length)
                for first in range(0, written or length, 5):
                    stop = min(first + 5, written or length)
                    writer.vectors(layer, sequence, first, **{name: x[:, first:stop] for name, x in parts.items()})
            writer.tokens(
                sequence,
                token_id=np.arange(length),
                text=["t"] * length,
                is_prompt=np.arange(length) < 4,
                logprob=np.zeros(length),
                entropy=np.zeros(length),
            )
        writer.finish([SequenceRecord(4, length) for length in lengths])
    return open_trace(path)


@pytest.fixture
def made(tmp_path: Path) -> Trace:
    return record(tmp_path / "t")


def test_bytes_grow_with_the_length(tmp_path: Path) -> None:
    sizes = {}
    for length in (512, 1024, 2048):
        made = record(tmp_path / str(length), lengths=(length,))
        sizes[length] = sum(file.stat().st_size for file in (made.path / "states").iterdir())
        shape = {"layers": 2, "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": SIZE, "lengths": [length]}
        guess = estimate_bytes(**shape, stored=STORES["qkv"]) - estimate_bytes(**shape, stored=[])
        assert 0.8 < guess / sizes[length] < 1.35
    assert sizes[1024] / sizes[512] == pytest.approx(2, rel=0.05)
    assert sizes[2048] / sizes[1024] == pytest.approx(2, rel=0.05)


def test_what_can_be_read(made: Trace) -> None:
    assert made.header.store == "qkv"
    assert made.header.stored == list(STORES["qkv"])
    assert made.stored == set(STORES["maps+vectors"])


@pytest.mark.parametrize("block_bytes", [1, 300, 2**20])
def test_blocks_make_no_difference(made: Trace, monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    whole = {layer: made.attention(1, layer) for layer in (0, 2)}
    monkeypatch.setattr(derive, "BLOCK_BYTES", block_bytes)
    for layer, rows in whole.items():
        assert np.allclose(made.attention(1, layer), rows, atol=1e-7)
        assert np.allclose(made.attention(1, layer, 3, 8), rows[:, 3:8, :8], atol=1e-7)
        assert np.allclose(made.row_sums(1, layer), rows.sum(-1), atol=1e-6)
        assert np.allclose(made.mean_queries(1, layer), states(10 + layer, 9)["queries"].mean(0), atol=1e-6)


def test_sums_below_one_where_a_sink_takes_a_share(tmp_path: Path) -> None:
    made = record(tmp_path / "t", sinks=True)
    for layer in (0, 2):
        sums = made.row_sums(0, layer)
        assert np.allclose(sums, made.attention(0, layer).sum(-1), atol=1e-6)
        assert (sums < 0.999).all()


def test_signals_follow_from_the_vectors(made: Trace) -> None:
    parts = states(2)
    key, value = parts["keys"], parts["values"]
    assert np.allclose(made.value_norms(0, 2, "l1"), np.abs(value).sum(-1))
    assert np.allclose(made.value_norms(0, 2, "l2"), np.sqrt((value**2).sum(-1)))
    assert np.allclose(made.key_norms(0, 2), np.sqrt((key**2).sum(-1)))
    similarity = made.similarity(0, 2)
    cosine = key[1, 5] @ key[1, 2] / np.linalg.norm(key[1, 5]) / np.linalg.norm(key[1, 2])
    assert similarity[1, 5, 2] == similarity[1, 2, 5] == pytest.approx(cosine, abs=1e-6)
    assert (similarity.diagonal(axis1=1, axis2=2) == 1).all()


def test_parts_of_vectors(made: Trace) -> None:
    for name, whole in states(0).items():
        assert np.array_equal(made.vectors(0, 0, name), whole)
        assert np.array_equal(made.vectors(0, 0, name, 4, 13), whole[:, 4:13])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_vectors_that_are_no_numbers_are_refused(tmp_path: Path, bad: float) -> None:
    parts = states(0)
    parts["keys"][1, 3, 0] = bad
    with (
        TraceWriter(tmp_path / "t", header(HEADS, KV_HEADS, list(STORES["qkv"]))) as writer,
        pytest.raises(TraceError, match=f"layer 2, positions 0 to {LENGTH - 1}: keys are not finite"),
    ):
        writer.vectors(2, 0, 0, **parts)


def test_keys_are_read_once_while_there_is_room(made: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    vectors = made.vectors

    def counted(sequence, layer, which, start, stop):
        if which == "keys":
            read.append(layer)
        return vectors(sequence, layer, which, start, stop)

    monkeypatch.setattr(made, "vectors", counted)

    def steps() -> None:
        for start in range(0, LENGTH, 8):
            for layer in (0, 2):
                made.attention(0, layer, start, min(start + 8, LENGTH))

    steps()
    assert read == [0, 2]
    monkeypatch.setattr(derive, "CACHE_BYTES", 1)
    made.attention(1, 0)  # leaves no room for the others
    assert list(made._kept) == [(1, 0)]
    read.clear()
    steps()
    assert read == [0, 2] * 3
    assert list(made._kept) == [(0, 2)]


def test_missing_states_are_named(made: Trace) -> None:
    file = made.path / "states" / "layer=002.parquet"
    file.unlink()
    with pytest.raises(TraceError, match=r"damaged: states/layer=002\.parquet: it is missing"):
        open_trace(made.path)


def test_states_that_end_early_are_damage(tmp_path: Path) -> None:
    made = record(tmp_path / "t", lengths=(LENGTH,), written=LENGTH - 3)
    with pytest.raises(TraceError, match=rf"states/layer=000.parquet: it has {LENGTH - 3} rows instead of {LENGTH}"):
        made.attention(0, 0)
    with pytest.raises(TraceError, match=rf"states/layer=002.parquet: it has {LENGTH - 3} rows instead of {LENGTH}"):
        made.vectors(0, 2, "values", LENGTH - 2, LENGTH)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": []}, "does not hold maps"),
        ({"attention": [{"scaling": 1.0}]}, r"damaged: trace\.json: attention: it has 1 entries for 2 layers"),
        ({"attention": [{"scaled": 1.0}]}, r"damaged: trace\.json: attention\[0\]: is missing the field `scaling`"),
        ({"stored": ["vectors:keys"]}, "does not hold maps"),
    ],
)
def test_without_what_rows_follow_from(made: Trace, change: dict, message: str) -> None:
    change_header(made.path, change, version=4)
    with pytest.raises(TraceError, match=message) as caught:
        open_trace(made.path).attention(0, 0)
    assert "again" in caught.value.todo


def test_recomputed_rows_imported_are_the_same_rows(made: Trace, tmp_path: Path) -> None:
    rows = np.stack([made.attention(0, layer) for layer in (0, 2)])
    np.savez(tmp_path / "maps.npz", attention=rows)
    imported = import_maps(tmp_path / "maps.npz", None, tmp_path / "maps", prompt_length=4)
    for index, layer in enumerate((0, 2)):
        assert np.allclose(imported.attention(0, index), made.attention(0, layer), rtol=2**-11, atol=2**-25)


@pytest.mark.parametrize(
    ("version", "later"),
    [(1, ("attention", "prefill_chunk", "vector_dtype")), (2, ("vector_dtype",)), (4, ("vector_dtype",))],
)
def test_a_trace_of_an_earlier_version_is_still_read(made: Trace, version: int, later: tuple[str, ...]) -> None:
    file = made.path / HEADER
    whole = json.loads(file.read_text())
    for name in (*later, SEAL):
        whole.pop(name, None)
    file.write_text(json.dumps(whole | {"schema": version}))
    assert np.array_equal(open_trace(made.path).vectors(0, 0, "keys"), states(0)["keys"])
