"""A prompt read in chunks gives the same trace as one read in a single forward pass, with less memory."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from kvscope.core.errors import UsageError
from kvscope.model import prefill
from kvscope.model.generate import trace
from kvscope.model.plan import RecordingPlan
from kvscope.model.prefill import chunk_size
from kvscope.model.run import RecordingRun
from kvscope.model.selfcheck import self_check
from kvscope.trace.reader import Trace
from tests.model.tiny import MODELS, WINDOW, build, saved, tokens

PROMPT, NEW = 23, 6
OWN_TOKENIZER = {"qwen2"}  # transformers reads the tiny tokenizer as another class for it


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def prompt(place: Path) -> Path:
    file = place / "prompt.txt"
    file.write_text(" ".join(f"w{1 + index * 7 % 60}" for index in range(PROMPT)))
    return file


@pytest.fixture(scope="module", params=[name for name in MODELS if name not in OWN_TOKENIZER])
def model(request: pytest.FixtureRequest, place: Path) -> Path:
    return saved(place / request.param, request.param)


@pytest.fixture(scope="module")
def whole(model: Path, prompt: Path) -> Trace:
    """The trace of a prompt that went through the model at once."""
    return record(model, prompt, model / "whole", query_block=4)


def record(folder: Path, prompt: Path, output: Path, **options: Any) -> Trace:
    return trace(str(folder), [prompt], output=output, **{"max_new_tokens": NEW, "store": "maps+vectors", **options})


def assert_same(one: Trace, other: Trace) -> None:
    """Compare everything of the first sequence, up to the rounding of another order of sums."""
    tokens, others = one.tokens(0), other.tokens(0)
    assert tokens["token_id"].tolist() == others["token_id"].tolist()
    assert tokens["is_prompt"].equals(others["is_prompt"])
    for column in ("logprob", "entropy"):
        assert np.allclose(tokens[column], others[column], atol=1e-5, equal_nan=True)
    for layer in one.layers:
        for got, expected in zip(one.states(0, layer), other.states(0, layer), strict=True):
            assert np.allclose(got, expected, atol=1e-5 * np.abs(expected).max())
        assert np.allclose(one.attention(0, layer), other.attention(0, layer), rtol=2**-10, atol=1e-5)
        assert np.allclose(one.row_sums(0, layer), other.row_sums(0, layer), atol=1e-5)
        assert np.allclose(one.similarity(0, layer), other.similarity(0, layer), atol=2**-10)


@pytest.mark.parametrize(
    ("chunk", "store"),
    [
        (WINDOW - 2, "maps+vectors"),
        (8, "qkv"),  # beyond the window
        (PROMPT - 1, "maps+vectors"),  # one token is left over
    ],
)
def test_chunks_make_no_difference(
    model: Path, whole: Trace, chunk: int, store: str, prompt: Path, tmp_path: Path
) -> None:
    parts = record(model, prompt, tmp_path / "parts", query_block=4, prefill_chunk=chunk, store=store)
    assert (whole.header.prefill_chunk, parts.header.prefill_chunk) == (None, chunk)
    assert_same(parts, whole)


def test_a_forced_continuation_in_chunks(prompt: Path, tmp_path: Path) -> None:
    folder = saved(tmp_path / "gemma3", "gemma3")
    (tmp_path / "after.txt").write_text("w5 w6 w7 w8 w9")
    options = {"continuation": tmp_path / "after.txt"}
    whole = record(folder, prompt, tmp_path / "whole", **options)
    parts = record(folder, prompt, tmp_path / "parts", prefill_chunk=9, **options)
    assert parts.sequences == whole.sequences
    assert_same(parts, whole)


def test_no_more_than_a_chunk_goes_through_the_model(prompt: Path, tmp_path: Path, monkeypatch) -> None:
    folder, seen = saved(tmp_path / "llama"), list[int]()
    forward = RecordingRun._forward

    def counted(run: RecordingRun, tokens: torch.Tensor, cache: Any, *beside: Any) -> Any:
        seen.append(tokens.shape[1])
        return forward(run, tokens, cache, *beside)

    monkeypatch.setattr(RecordingRun, "_forward", counted)
    record(folder, prompt, tmp_path / "t", prefill_chunk=10)
    assert seen == [10, 10, 3] + [1] * NEW


def test_long_prompts_go_in_chunks_that_bound_the_logits(prompt: Path, tmp_path: Path, monkeypatch) -> None:
    folder, plans = saved(tmp_path / "llama"), list[RecordingPlan]()
    record(folder, prompt, tmp_path / "whole", announce=plans.append)
    assert plans[0].prefill_chunk is None
    monkeypatch.setattr(prefill, "LEAST", 1)
    monkeypatch.setattr(prefill, "CHUNK_BYTES", 7 * 64 * 4)  # 7 tokens of 64 float32 logits
    made = record(folder, prompt, tmp_path / "parts", announce=plans.append)
    assert plans[1].prefill_chunk == made.header.prefill_chunk == 7
    many = [{"prompt": "w1 w2 w3"}, {"prompt": "w1 w2 w3 w4 w5 w6 w7 w8"}]
    (tmp_path / "many.jsonl").write_text("\n".join(map(json.dumps, many)))
    both = trace(str(folder), [tmp_path / "many.jsonl"], output=tmp_path / "many", max_new_tokens=2)
    assert [item.length for item in both.sequences] == [5, 10]


def loaded(config: Any = None, kernel: str = "sdpa") -> Any:
    """Return a loaded model of two layers, with another configuration of its text."""
    model = build("llama", kernel)
    return SimpleNamespace(name="tiny", model=model, text_config=config or model.config)


@torch.inference_mode()
def test_rows_of_eager_code_count_too(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = self_check(build("llama"), tokens(5))
    monkeypatch.setattr(prefill, "LEAST", 1)
    monkeypatch.setattr(prefill, "CHUNK_BYTES", 2**16)
    assert chunk_size(loaded(), facts, 1000, None) == 2**16 // (64 * 4)
    assert chunk_size(loaded(kernel="eager"), facts, 1000, None) == 2**16 // (64 * 4 + 8 * 4 * 1000)
    assert chunk_size(loaded(kernel="eager"), facts, 1000, 30) == 30
    assert chunk_size(loaded(), facts, 30, 30) is None


@pytest.mark.parametrize(
    ("config", "others", "why"),
    [
        (LlamaConfig(), {2: "mamba"}, "some of its layers have no attention"),
        (
            LlamaConfig(
                num_hidden_layers=2, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
            ),
            {},
            "depends on the number of tokens",
        ),
    ],
)
@torch.inference_mode()
def test_models_that_read_a_prompt_at_once(config: Any, others: dict[int, str], why: str) -> None:
    facts = replace(self_check(build("llama"), tokens(5)), others=others)
    assert chunk_size(loaded(config), facts, 10**6, None) is None
    with pytest.raises(UsageError, match=why) as caught:
        chunk_size(loaded(config), facts, 10**6, 512)
    assert "--prefill-chunk" in caught.value.todo


def test_a_chunk_of_nothing(prompt: Path) -> None:
    with pytest.raises(UsageError, match="prefill_chunk=0 is below 1"):
        trace("no/model", [prompt], prefill_chunk=0)
