"""Recording from a loop of one's own: every way to drive a model gives the trace that kvscope's own loop gives."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import DynamicCache

import kvscope
from kvscope.core.errors import OutputExists
from kvscope.core.options import ModelSource
from kvscope.model.loading import load

WORDS = ["The old sailor said that the key is", "A ship"]


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    loaded = load(ModelSource("demo", dtype="float32"))
    return loaded.model, loaded.tokenizer


def encoded(tokenizer: Any, text: str) -> torch.Tensor:
    return torch.tensor([tokenizer(text)["input_ids"]])


def padded(tokenizer: Any) -> dict[str, torch.Tensor]:
    """Return both texts as a batch with padding on the left."""
    rows = [tokenizer(text)["input_ids"] for text in WORDS]
    width = max(map(len, rows))
    ids = [[0] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def tokens(trace: kvscope.Trace, sequence: int = 0) -> list[int]:
    return trace.tokens(sequence)["token_id"].tolist()


def test_generate_gives_the_trace_of_kvscope(pair: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = pair
    with kvscope.record(model, tokenizer, tmp_path / "mine") as recording:
        made = model.generate(encoded(tokenizer, WORDS[0]), max_new_tokens=9, do_sample=False)
    mine = recording.trace
    assert mine is not None and tokens(mine) == made[0].tolist()
    assert mine.sequences[0].prompt == len(encoded(tokenizer, WORDS[0])[0]) and not mine.sequences[0].forced
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(WORDS[0])
    other = kvscope.trace((model, tokenizer), [prompt], output=tmp_path / "other", max_new_tokens=9)
    assert tokens(other)[: len(tokens(mine))] == tokens(mine)
    for layer in mine.layers:
        rows = [trace.attention(0, layer)[:, : len(tokens(mine)), : len(tokens(mine))] for trace in (mine, other)]
        np.testing.assert_allclose(rows[0], rows[1], atol=2e-3)
    assert kvscope.replay(mine, "h2o", 0.5, metrics=["retained_mass"]).frame()["retained_mass"].item() > 0


def test_a_batch_gives_a_sequence_for_each_text(pair: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = pair
    batch = padded(tokenizer)
    with kvscope.record(model, tokenizer, tmp_path / "mine") as recording:
        made = model.generate(**batch, max_new_tokens=5, do_sample=False, num_return_sequences=1)
    assert recording.trace is not None
    for number, text in enumerate(WORDS):
        ids = tokenizer(text)["input_ids"]
        assert tokens(recording.trace, number) == ids + made[number, batch["input_ids"].shape[1] :].tolist()
        assert recording.trace.sequences[number].prompt == len(ids)


@pytest.mark.parametrize("where", ["model", "argument", "config"])
def test_what_follows_the_end_of_a_text_is_padding(pair: tuple[Any, Any], tmp_path: Path, where: str) -> None:
    model, tokenizer = pair
    ids = encoded(tokenizer, WORDS[0])
    free = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :].tolist()
    stop, kept = free[2], model.generation_config.eos_token_id
    config = transformers.GenerationConfig(eos_token_id=stop, pad_token_id=0, max_new_tokens=6, do_sample=False)
    given = {"argument": {"eos_token_id": stop, "max_new_tokens": 6}, "config": {"generation_config": config}}
    try:
        if where == "model":
            model.generation_config.eos_token_id = stop
        with kvscope.record(model, tokenizer, tmp_path / "mine") as recording:
            model.generate(**padded(tokenizer), **given.get(where, {"max_new_tokens": 6, "do_sample": False}))
    finally:
        model.generation_config.eos_token_id = kept
    assert recording.trace is not None
    assert tokens(recording.trace)[ids.shape[1] :] == free[: free.index(stop) + 1]


@pytest.mark.parametrize(("cached", "parts"), [(True, 1), (True, 3), (False, 1)])
def test_a_loop_by_hand(pair: tuple[Any, Any], tmp_path: Path, cached: bool, parts: int) -> None:
    model, tokenizer = pair
    ids = encoded(tokenizer, WORDS[0])
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)[0].tolist()
    with kvscope.record(model, tokenizer, tmp_path / "mine") as recording, torch.no_grad():
        cache, text = DynamicCache(), ids
        chunks = ids.tensor_split(parts, 1)
        for chunk in chunks if cached else ():
            logits = model(chunk, past_key_values=cache, use_cache=True).logits
        if not cached:
            logits = model(input_ids=text).logits
        for _ in range(6):
            new = logits[:, -1:].argmax(-1)
            text = torch.cat([text, new], 1)
            if cached:
                logits = model(new, past_key_values=cache, use_cache=True).logits
            else:
                logits = model(input_ids=text).logits
    assert recording.trace is not None
    assert tokens(recording.trace) == expected
    assert recording.trace.sequences[0].prompt == ids.shape[1]


def test_a_pipeline_of_transformers(pair: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = pair
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    with kvscope.record(model, tokenizer, tmp_path / "mine") as recording:
        (answer,) = pipe(WORDS[0], max_new_tokens=4, do_sample=False, return_full_text=False)
    assert recording.trace is not None and len(recording.trace.sequences) == 1
    after = tokens(recording.trace)[recording.trace.sequences[0].prompt :]
    assert tokenizer.decode(after) == answer["generated_text"]


def test_beams_and_several_answers(pair: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = pair
    ids = encoded(tokenizer, WORDS[0])
    with kvscope.record(model, tokenizer, tmp_path / "mine") as recording:
        made = model.generate(ids, max_new_tokens=5, num_beams=3, num_return_sequences=2, do_sample=False)
    assert recording.trace is not None
    assert [tokens(recording.trace, number) for number in range(2)] == made.tolist()


def test_a_given_text_is_forced(pair: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = pair
    ids = encoded(tokenizer, WORDS[0])
    with kvscope.record(model, tokenizer, tmp_path / "mine", generated=False) as recording, torch.no_grad():
        cache = DynamicCache()
        for token in ids[0]:
            model(token[None, None], past_key_values=cache, use_cache=True)
    assert recording.trace is not None
    assert recording.trace.sequences[0].forced and recording.trace.sequences[0].prompt == 1
    assert tokens(recording.trace) == ids[0].tolist()


def test_a_failing_block_writes_nothing_and_leaves_the_model_as_it_was(pair: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = pair
    before = dict(vars(model)), len(model._forward_pre_hooks)
    with pytest.raises(TypeError), kvscope.record(model, tokenizer, tmp_path / "mine"):
        model.generate(encoded(tokenizer, WORDS[0]), max_new_tokens="many")
    assert (dict(vars(model)), len(model._forward_pre_hooks)) == before
    assert not (tmp_path / "mine").exists()


def test_what_cannot_be_recorded(pair: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = pair
    ids = encoded(tokenizer, WORDS[0])
    with (
        pytest.raises(kvscope.UsageError, match="read no tokens"),
        kvscope.record(model, tokenizer, tmp_path / "mine"),
    ):
        pass
    vectors = model.get_input_embeddings()(ids)
    with (
        pytest.raises(kvscope.UsageError, match="vectors"),
        kvscope.record(model, tokenizer, tmp_path / "mine"),
    ):
        model(inputs_embeds=vectors)
    cache = DynamicCache()
    model(ids, past_key_values=cache, use_cache=True)
    with (
        pytest.raises(kvscope.UsageError, match="continues a cache"),
        kvscope.record(model, tokenizer, tmp_path / "mine"),
    ):
        model(ids[:, :1], past_key_values=cache, use_cache=True)


def test_a_trace_that_exists_is_refused_before_the_block_runs(pair: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = pair
    with kvscope.record(model, tokenizer, tmp_path / "mine"):
        model(encoded(tokenizer, WORDS[0]))
    ran = []
    with (
        pytest.raises(OutputExists),
        kvscope.record(model, tokenizer, tmp_path / "mine"),
    ):
        ran.append(True)
    assert not ran


@pytest.mark.parametrize("raises", [False, True])
def test_the_model_is_as_it_was_after_the_block(pair: tuple[Any, Any], tmp_path: Path, raises: bool) -> None:
    model, tokenizer = pair
    before, hooks = set(vars(model)), dict(model._forward_pre_hooks)
    assert "generate" not in before
    with suppress(KeyError), kvscope.record(model, tokenizer, tmp_path / "mine"):
        assert "generate" in vars(model)
        model(encoded(tokenizer, WORDS[0]))
        if raises:
            raise KeyError("of the loop")
    assert set(vars(model)) == before and dict(model._forward_pre_hooks) == hooks
    assert (tmp_path / "mine").exists() is not raises
