"""Stores with vectors: queries, keys and values are the inputs of attention, and rows can be recomputed from them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import DynamicCache

from kvscope.core.errors import ModelError, TraceError, UsageError
from kvscope.model.attention_hook import Call, observe_attention
from kvscope.model.generate import trace
from kvscope.model.recorder import HELD_STEPS, Recorder
from kvscope.model.selfcheck import _vector_dtype, self_check
from kvscope.trace.reader import Trace, open_trace
from kvscope.trace.record import SequenceRecord
from kvscope.trace.schema import STORES
from kvscope.trace.writer import TraceWriter
from tests.model.tiny import MODELS, build, saved, tokens
from tests.trace.make import header

PROMPT, NEW = 11, HELD_STEPS + 8  # steps that are held together, and some that are left at the end
LENGTH = PROMPT + NEW
OWN_TOKENIZER = {"qwen2"}  # transformers reads the tiny tokenizer as another class for it
VECTORS = {"vectors:queries", "vectors:keys", "vectors:values"}


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    file = tmp_path / "prompt.txt"
    file.write_text(" ".join(f"w{1 + index * 7 % 60}" for index in range(PROMPT)))
    return file


def rows_from(made: Trace, layer: int) -> np.ndarray:
    """Return attention computed from the recorded vectors, float64 ``[H, T, T]``."""
    queries, keys, _ = (part.astype(np.float64) for part in made.states(0, layer))
    keys = np.repeat(keys, made.heads // made.kv_heads, 0)
    logits = queries @ keys.transpose(0, 2, 1) * made.header.model.attention.scaling
    if made.header.softcap is not None:
        logits = np.tanh(logits / made.header.softcap) * made.header.softcap
    length = queries.shape[1]
    visible = np.tri(length, dtype=bool)
    window = made.header.sliding_window[made.layers.index(layer)]
    if window is not None:
        visible &= ~np.tri(length, k=-window, dtype=bool)
    weights = np.where(visible, np.exp(logits - logits.max(-1, keepdims=True, where=visible, initial=-np.inf)), 0)
    # A learned sink takes its share before the row is recorded; the recorded sum says how much is left.
    return weights / weights.sum(-1, keepdims=True) * made.row_sums(0, layer)[..., None]


@pytest.mark.parametrize("name", [name for name in MODELS if name not in OWN_TOKENIZER])
def test_recorded_rows_follow_from_recorded_vectors(name: str, prompt: Path, tmp_path: Path) -> None:
    folder = saved(tmp_path / name, name)
    made = trace(str(folder), [prompt], output=tmp_path / "t", max_new_tokens=NEW, query_block=4, store="maps+vectors")
    assert made.stored >= VECTORS
    length = made.sequences[0].length
    ids = torch.tensor([made.tokens(0)["token_id"].tolist()])
    calls: list[Call] = []
    model = build(name)
    with torch.inference_mode(), observe_attention(model, calls.append):
        model(input_ids=ids, use_cache=False)
    for layer, call in enumerate(calls):
        states = made.states(0, layer)
        assert states.queries.shape == (made.heads, length, made.head_dim)
        assert states.keys.shape == states.values.shape == (made.kv_heads, length, made.head_dim)
        assert {part.dtype for part in states} == {np.dtype(np.float32)}
        for got, expected in zip(states, (call.query, call.key, call.value), strict=True):
            assert np.allclose(got, expected[0], rtol=1e-3, atol=1e-3 * expected.abs().max().item())
        # As good as 16-bit storage of rows, and 32-bit logits of this size, allow.
        assert np.allclose(made.attention(0, layer), rows_from(made, layer), rtol=2**-10, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("query_block", [1, 4, 128])
@pytest.mark.parametrize(
    ("store", "dtype"),
    [
        ("maps+vectors", torch.float32),
        ("qkv", torch.float32),
        ("qkv", torch.bfloat16),
        ("qkv", torch.float16),
    ],
)
@torch.inference_mode()
def test_vectors_are_exactly_those_of_the_calls(
    name: str, query_block: int, store: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, ids = build(name).to(dtype), tokens(LENGTH)
    seen: list[tuple[int, Any, Any, Any]] = []
    kind, stored = str(dtype).removeprefix("torch."), list(STORES[store])
    facts = replace(header(heads=4, kv_heads=2, stored=stored), layers=[0, 1], n_layers=2, head_dim=8)
    facts = replace(facts, vector_dtype=kind)
    with TraceWriter(tmp_path / "t", facts) as writer:
        recorder = Recorder(writer, [0, 1], query_block, store=store, vector_dtype=kind)

        def observe(call: Call) -> None:
            count = call.query.shape[2]
            parts = (call.query, call.key[:, :, -count:], call.value[:, :, -count:])
            seen.append((call.layer, *(part[0].clone() for part in parts)))
            recorder(call)

        recorder.begin(0)
        with observe_attention(model, observe):
            cache = DynamicCache(config=model.config)
            model(input_ids=ids[:, :PROMPT], past_key_values=cache)
            for t in range(PROMPT, LENGTH):
                model(input_ids=ids[:, t : t + 1], past_key_values=cache)
        recorder.end()
        writer.tokens(
            0,
            token_id=range(LENGTH),
            text=["x"] * LENGTH,
            is_prompt=np.arange(LENGTH) < PROMPT,
            logprob=np.zeros(LENGTH),
            entropy=np.zeros(LENGTH),
        )
        writer.finish([SequenceRecord(PROMPT, LENGTH)])
    made = open_trace(tmp_path / "t")
    for layer in (0, 1):
        for which, got in enumerate(made.states(0, layer), start=1):
            expected = torch.cat([call[which] for call in seen if call[0] == layer], 1)
            assert expected.dtype == dtype
            assert np.array_equal(got, expected.float().numpy())


@pytest.mark.parametrize("store", ["maps+vectors", "qkv"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_kept_exactly(store: str, dtype: str, prompt: Path, tmp_path: Path) -> None:
    folder = str(saved(tmp_path / "llama"))
    made = trace(folder, [prompt], output=tmp_path / "t", max_new_tokens=4, dtype=dtype, store=store, hidden=True)
    for part in made.states(0, 1):
        exact = torch.from_numpy(part)
        assert torch.equal(exact.to(getattr(torch, dtype)).float(), exact)
    assert made.header.vector_dtype == dtype
    inputs = torch.from_numpy(made.hidden(0, 1))
    assert torch.equal(inputs.to(getattr(torch, dtype)).float(), inputs)
    number = {"bfloat16": pa.binary(2), "float16": pa.float16()}[dtype]
    for file, column in (("states", "values"), ("hidden", "hidden")):
        assert pq.read_schema(made.path / file / "layer=001.parquet").field(column).type.value_type == number


def test_the_recorded_type_holds_every_vector_of_the_model(prompt: Path, tmp_path: Path) -> None:
    """A model may turn its queries in float32 though its weights are of 16 bits: then all are stored as float32."""
    model = build("llama").bfloat16()
    ids = tokens(PROMPT)
    with torch.inference_mode():
        assert self_check(model, ids).vector_dtype == "bfloat16"
        assert self_check(model.half(), ids).vector_dtype == "float16"
        assert self_check(model.float(), ids).vector_dtype == "float32"
        assert self_check(model.double(), ids).vector_dtype == "float32"
    mixed = [torch.zeros(1, 2, 3, 4, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.bfloat16)]
    assert _vector_dtype([Call(0, *mixed, mask=None, scaling=1.0)]) == "float32"


def test_a_layer_whose_vectors_do_not_fit_is_refused(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "t", replace(header(), vector_dtype="bfloat16")) as writer:
        recorder = Recorder(writer, [0], store="qkv", vector_dtype="bfloat16")
        recorder.begin(0)
        float32 = [torch.zeros(1, 2, 3, 4) for _ in range(3)]
        with pytest.raises(ModelError, match=r"layer 0 has vectors of torch\.float32, which bfloat16") as caught:
            recorder(Call(0, *float32, mask=None, scaling=1.0))
        assert "--dtype float32" in caught.value.todo


def test_several_sequences(tmp_path: Path) -> None:
    folder = str(saved(tmp_path / "llama"))
    for name, text in (("a", "w1 w2 w3 w4 w5"), ("b", "w9 w8 w7")):
        (tmp_path / f"{name}.txt").write_text(text)
    options = {"max_new_tokens": 3, "store": "maps+vectors", "layers": [1]}
    both = trace(folder, [tmp_path / "a.txt", tmp_path / "b.txt"], output=tmp_path / "both", **options)
    alone = trace(folder, [tmp_path / "b.txt"], output=tmp_path / "alone", **options)
    for got, expected in zip(both.states(1, 1), alone.states(0, 1), strict=True):
        assert np.array_equal(got, expected)


def test_without_vectors(prompt: Path, tmp_path: Path) -> None:
    folder, plans = str(saved(tmp_path / "llama")), []
    made = trace(folder, [prompt], output=tmp_path / "t", max_new_tokens=2, announce=plans.append)
    assert not made.stored & VECTORS
    assert not (made.path / "states").exists()
    with pytest.raises(TraceError, match="does not hold vectors:queries") as caught:
        made.states(0, 0)
    assert "--store maps+vectors" in caught.value.todo
    options = {"max_new_tokens": 2, "store": "maps+vectors"}
    trace(folder, [prompt], output=tmp_path / "v", announce=plans.append, **options)
    numbers = 2 * (4 + 2 * 2) * 8 * (PROMPT + 2)  # layers, heads, head size, tokens
    assert plans[1].bytes - plans[0].bytes == pytest.approx(4 * numbers, rel=0.1)


def test_an_unknown_store(prompt: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="store 'rows' is unknown") as caught:
        trace("no/model", [prompt], output=tmp_path / "t", store="rows")
    assert "maps, maps+vectors, qkv" in caught.value.todo
