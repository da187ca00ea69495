"""Store qkv: the trace grows linearly with the length, and gives the same rows as a trace of rows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvscope.core.errors import ModelError
from kvscope.model.attention_hook import Call
from kvscope.model.generate import trace
from kvscope.model.plan import RecordingPlan
from kvscope.model.recorder import HELD_STEPS, Recorder
from kvscope.trace.reader import Trace
from kvscope.trace.schema import STORES
from kvscope.trace.writer import TraceWriter
from tests.model.tiny import MODELS, WINDOW, build, saved
from tests.trace.make import header

PROMPT, NEW = 11, HELD_STEPS + 8
OWN_TOKENIZER = {"qwen2"}  # transformers reads the tiny tokenizer as another class for it


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    file = tmp_path / "prompt.txt"
    file.write_text(" ".join(f"w{1 + index * 7 % 60}" for index in range(PROMPT)))
    return file


def both(folder: Path, prompt: Path, path: Path, **options: Any) -> tuple[Trace, Trace]:
    """Return the same generation with rows and vectors, and with vectors alone."""
    made = [
        trace(str(folder), [prompt], output=path / store, max_new_tokens=NEW, store=store, **options)
        for store in ("maps+vectors", "qkv")
    ]
    return made[0], made[1]


@pytest.mark.parametrize("name", [name for name in MODELS if name not in OWN_TOKENIZER])
def test_the_same_as_a_trace_of_rows(name: str, prompt: Path, tmp_path: Path) -> None:
    maps, qkv = both(saved(tmp_path / name, name), prompt, tmp_path, query_block=4)
    assert maps.tokens(0).equals(qkv.tokens(0))
    assert qkv.stored == maps.stored
    assert qkv.stored - {"rotary", "token_kinds"} == set(STORES["maps+vectors"])
    assert {file.parent.name for file in qkv.path.rglob("*.parquet")} == {"qkv", "states"}
    length = qkv.sequences[0].length
    for layer in (0, 1):
        rows = qkv.attention(0, layer)
        # What 16 bits leave of a weight, and what float32 leaves of a sum of logits in another order.
        assert np.allclose(maps.attention(0, layer), rows, rtol=2**-11 + 1e-4, atol=2**-25)
        assert np.allclose(qkv.attention(0, layer, 7, 12), rows[:, 7:12, :12], atol=1e-6)
        assert np.allclose(qkv.row_sums(0, layer), maps.row_sums(0, layer), atol=1e-5)
        for order in ("l1", "l2"):
            assert np.allclose(qkv.value_norms(0, layer, order), maps.value_norms(0, layer, order), rtol=1e-5)
        assert np.allclose(qkv.key_norms(0, layer), maps.key_norms(0, layer), rtol=1e-5)
        assert np.allclose(qkv.similarity(0, layer), maps.similarity(0, layer), atol=2**-11)
        assert np.allclose(qkv.mean_queries(0, layer), maps.mean_queries(0, layer), rtol=1e-5, atol=1e-6)
        for got, expected in zip(qkv.states(0, layer), maps.states(0, layer), strict=True):
            assert np.array_equal(got, expected)
    assert rows.shape == (4, length, length)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "gpt_neox"])
def test_rows_are_those_of_eager_attention(name: str, prompt: Path, tmp_path: Path) -> None:
    folder = saved(tmp_path / name, name)
    made = trace(str(folder), [prompt], output=tmp_path / "t", max_new_tokens=NEW, store="qkv")
    ids = torch.tensor([made.tokens(0)["token_id"].tolist()])
    with torch.inference_mode():
        eager = build(name, "eager")(input_ids=ids, output_attentions=True, use_cache=False).attentions
    for layer in (0, 1):
        assert np.allclose(made.attention(0, layer), eager[layer][0], rtol=1e-3, atol=1e-5)


def test_what_the_header_says(prompt: Path, tmp_path: Path) -> None:
    folder = saved(tmp_path / "gpt_oss", "gpt_oss")
    maps, qkv = both(folder, prompt, tmp_path)
    assert maps.header.attention == []
    sliding, full = qkv.header.attention
    assert (sliding.sliding_window, full.sliding_window) == (WINDOW, None)
    assert sliding.scaling == full.scaling == pytest.approx(8**-0.5)
    assert sliding.mask == full.mask == "causal"
    sinks = [layer.self_attn.sinks.tolist() for layer in build("gpt_oss").model.layers]
    assert [sliding.sinks, full.sinks] == sinks
    assert maps.header.store == "maps+vectors"
    assert qkv.header.store == "qkv"


def test_some_layers(prompt: Path, tmp_path: Path) -> None:
    folder = saved(tmp_path / "gemma2", "gemma2")
    whole = trace(str(folder), [prompt], output=tmp_path / "w", max_new_tokens=3, store="qkv")
    made = trace(str(folder), [prompt], output=tmp_path / "t", max_new_tokens=3, store="qkv", layers=[1])
    assert [facts.sliding_window for facts in made.header.attention] == [None]
    assert np.array_equal(made.attention(0, 1), whole.attention(0, 1))


def test_every_store_is_estimated(prompt: Path, tmp_path: Path) -> None:
    folder, plans = saved(tmp_path / "llama"), list[RecordingPlan]()
    for store in STORES:
        trace(str(folder), [prompt], output=tmp_path / store, max_new_tokens=2, store=store, announce=plans.append)
    sizes = {store: plan.bytes for store, plan in zip(STORES, plans, strict=True)}
    for store, plan in zip(STORES, plans, strict=True):
        assert {**plan.others, store: plan.bytes} == sizes
    assert sizes["qkv"] < sizes["maps+vectors"]


def call(mask: torch.Tensor, window: int | None = None) -> Call:
    """Return a call of 4 queries on 6 keys."""
    query, key, value = (torch.randn(1, 2, count, 3) for count in (4, 6, 6))
    return Call(0, query, key, value, mask=mask, scaling=1.0, sliding_window=window)


CAUSAL = torch.ones(4, 6, dtype=torch.bool).tril(2)


@pytest.mark.parametrize(
    ("mask", "window", "fits"),
    [
        (CAUSAL, None, True),
        (torch.zeros(4, 6).masked_fill(~CAUSAL, torch.finfo(torch.float16).min), None, True),
        (CAUSAL.triu(0), 3, True),
        (CAUSAL, 3, False),
        (CAUSAL.triu(0), None, False),
        (torch.ones(4, 6, dtype=torch.bool), None, False),
        (torch.arange(6.0).expand(4, 6).masked_fill(~CAUSAL, -torch.inf), None, False),  # a bias
        (torch.zeros(4, 6).masked_fill(~CAUSAL, -5.0), None, False),
    ],
)
def test_only_masks_that_rows_can_be_recomputed_with(
    mask: torch.Tensor, window: int | None, fits: bool, tmp_path: Path
) -> None:
    with TraceWriter(tmp_path / "t", header()) as writer:
        recorder = Recorder(writer, [0], 3, store="qkv")
        recorder.begin(0)
        if fits:
            recorder(call(mask[None, None], window))
            return
        with pytest.raises(ModelError, match="layer 0 has a mask") as caught:
            recorder(call(mask[None, None], window))
        assert "--store maps" in caught.value.todo
