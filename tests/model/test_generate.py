"""From a prompt to a trace: what is recorded is what the model did."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kvscope.model.run as run_module
from kvscope.core.errors import ModelError, OutputExists, TraceError, UsageError
from kvscope.model.generate import trace
from kvscope.model.prompts import token_texts
from kvscope.model.run import Progress
from tests.model.tiny import build, saved


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    file = tmp_path / "prompt.txt"
    file.write_text(" ".join(f"w{1 + index * 7 % 60}" for index in range(11)))
    return file


def test_a_trace_is_what_the_model_did(folder: Path, prompt: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    plans: list[Any] = []
    made = trace(
        str(folder),
        [prompt],
        output=tmp_path / "t",
        max_new_tokens=40,
        query_block=4,
        progress=seen.append,
        announce=plans.append,
    )
    tokens = made.tokens(0)
    ids = torch.tensor([tokens["token_id"].tolist()])
    assert made.sequences[0].prompt == 11
    assert made.sequences[0].length == 51 == len(tokens)
    model = build("llama", "eager")
    with torch.inference_mode():
        whole = model(input_ids=ids, output_attentions=True, use_cache=False)
        greedy = build("llama").generate(ids[:, :11], max_new_tokens=40, do_sample=False)
    assert ids.tolist() == greedy.tolist()
    for layer in (0, 1):
        assert np.allclose(made.attention(0, layer), whole.attentions[layer][0], rtol=2**-10, atol=1e-6)
    share = torch.log_softmax(whole.logits[0, :-1], -1)
    assert np.isnan(tokens["logprob"][0])
    assert np.allclose(tokens["logprob"][1:], share.gather(-1, ids[0, 1:, None])[:, 0], atol=1e-4)
    assert np.allclose(tokens["entropy"][1:], -(share.exp() * share).sum(-1), atol=1e-4)
    assert tokens["is_prompt"].tolist() == [True] * 11 + [False] * 40
    assert seen[-1].done == seen[-1].total == 51
    assert seen[-1].bytes <= sum(file.stat().st_size for file in (tmp_path / "t").rglob("*.parquet"))
    assert plans[0].bytes > 0
    assert made.header.protocol == "generated"
    assert made.header.prompts[0].sha256


def test_signals_are_those_of_the_cache(folder: Path, prompt: Path, tmp_path: Path) -> None:
    made = trace(str(folder), [prompt], output=tmp_path / "t", max_new_tokens=35, query_block=4)
    ids = torch.tensor([made.tokens(0)["token_id"].tolist()])
    with torch.inference_mode():
        cache = build("llama")(input_ids=ids, use_cache=True).past_key_values
    for layer in (0, 1):
        key, value = cache.layers[layer].keys[0], cache.layers[layer].values[0]
        assert np.allclose(made.value_norms(0, layer, "l1"), value.abs().sum(-1), rtol=1e-4)
        assert np.allclose(made.value_norms(0, layer, "l2"), value.norm(dim=-1), rtol=1e-4)
        assert np.allclose(made.key_norms(0, layer), key.norm(dim=-1), rtol=1e-4)
        unit = key / key.norm(dim=-1, keepdim=True)
        assert np.allclose(made.similarity(0, layer), unit @ unit.transpose(1, 2), atol=2e-3)
        assert made.mean_queries(0, layer).shape == (46, 8)


def test_sampling_is_seeded(folder: Path, prompt: Path, tmp_path: Path) -> None:
    def ids(name: str, **options: Any) -> list[int]:
        made = trace(str(folder), [prompt], output=tmp_path / name, max_new_tokens=12, do_sample=True, **options)
        return made.tokens(0)["token_id"].tolist()

    assert ids("a", seed=3, temperature=5.0) == ids("b", seed=3, temperature=5.0)
    assert ids("c", seed=4, temperature=5.0) != ids("d", seed=5, temperature=5.0)
    greedy = trace(str(folder), [prompt], output=tmp_path / "e", max_new_tokens=12).tokens(0)["token_id"].tolist()
    assert ids("f", seed=3, top_k=1) == greedy
    assert ids("g", seed=3, top_p=1e-6) == greedy


def test_a_forced_continuation(folder: Path, prompt: Path, tmp_path: Path) -> None:
    (tmp_path / "after.txt").write_text(" w5 w6 w7 w8")
    made = trace(str(folder), [prompt], output=tmp_path / "t", continuation=tmp_path / "after.txt")
    assert made.tokens(0)["token_id"].tolist()[-4:] == [5, 6, 7, 8]
    assert made.header.protocol == "forced"
    assert made.sequences[0].forced
    assert made.sequences[0].length == 15


def test_several_sequences_equal_one_by_one(folder: Path, tmp_path: Path) -> None:
    lines = [{"prompt": "w1 w2 w3 w4"}, {"prompt": "w9 w8 w7 w6 w5 w4", "continuation": " w1 w2"}]
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    both = trace(str(folder), [tmp_path / "all.jsonl"], output=tmp_path / "both", max_new_tokens=5)
    assert [(s.prompt, s.length, s.forced) for s in both.sequences] == [(4, 9, False), (6, 8, True)]
    (tmp_path / "one.jsonl").write_text(json.dumps(lines[1]))
    alone = trace(str(folder), [tmp_path / "one.jsonl"], output=tmp_path / "one", max_new_tokens=5)
    assert np.array_equal(both.attention(1, 1), alone.attention(0, 1))


def test_some_layers(folder: Path, prompt: Path, tmp_path: Path) -> None:
    made = trace(str(folder), [prompt], output=tmp_path / "t", layers=[1], max_new_tokens=2)
    whole = trace(str(folder), [prompt], output=tmp_path / "w", max_new_tokens=2)
    assert made.layers == [1]
    assert np.array_equal(made.attention(0, 1), whole.attention(0, 1))
    with pytest.raises(UsageError, match="no layer 2"):
        trace(str(folder), [prompt], output=tmp_path / "x", layers=[2], max_new_tokens=2)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("", {}, "is empty"),
        (" \n", {}, "is empty"),
        ("w1 " * 60, {"max_new_tokens": 10}, "60 tokens, which with 10 new ones exceeds the context of 64"),
        ("w1", {"max_new_tokens": -1}, "negative"),
        ("w1", {"chat": True}, "no chat template"),
        ("w1", {"temperature": 0.0, "do_sample": True}, "temperature"),
        ("w1", {"top_p": 0.0}, "top_p"),
        ("w1", {"top_k": -1}, "top_k"),
        ("w1", {"dtype": "int8"}, "dtype 'int8' is unknown"),
        ("w1", {"device": "cuda:99"}, "cannot be used"),
        ("w1", {"device_map": "weird"}, "device 'weird' cannot be used"),
        ("w1", {"revision": "main"}, "has no revisions"),
    ],
)
def test_mistakes(folder: Path, tmp_path: Path, content: str, options: dict, message: str) -> None:
    (tmp_path / "p.txt").write_text(content)
    with pytest.raises(UsageError, match=message) as caught:
        trace(str(folder), [tmp_path / "p.txt"], output=tmp_path / "t", **{"max_new_tokens": 4, **options})
    assert caught.value.todo
    assert not (tmp_path / "t").exists()


def test_files_that_are_no_prompts(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        trace(str(folder), [tmp_path / "none.txt"])
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not UTF-8"):
        trace(str(folder), [tmp_path / "b.txt"])
    for line in ("{", "[]", '{"title": "x"}', '{"prompt": 3}'):
        (tmp_path / "p.jsonl").write_text(line)
        with pytest.raises(UsageError, match="line 1: no prompt"):
            trace(str(folder), [tmp_path / "p.jsonl"])
    (tmp_path / "p.jsonl").write_text("\n \n")
    with pytest.raises(UsageError, match=r"p\.jsonl is empty"):
        trace(str(folder), [tmp_path / "p.jsonl"])


def test_a_continuation_of_nothing(folder: Path, prompt: Path, tmp_path: Path) -> None:
    """It would be a trace of the prompt alone, which no replay with full prefill can use."""
    (tmp_path / "after.txt").write_text("")
    with pytest.raises(UsageError, match=r"the continuation of prompt .* is empty"):
        trace(str(folder), [prompt], output=tmp_path / "t", continuation=tmp_path / "after.txt")
    (tmp_path / "p.jsonl").write_text('{"prompt": "w1", "continuation": ""}')
    with pytest.raises(UsageError, match=r"the continuation of prompt .* is empty"):
        trace(str(folder), [tmp_path / "p.jsonl"], output=tmp_path / "t")


def test_an_existing_trace_and_a_small_disk(folder: Path, prompt: Path, tmp_path: Path, monkeypatch) -> None:
    trace(str(folder), [prompt], output=tmp_path / "t", max_new_tokens=1)
    with pytest.raises(OutputExists, match="exists"):
        trace(str(folder), [prompt], output=tmp_path / "t", max_new_tokens=1)
    monkeypatch.setattr("kvscope.trace.space.free_bytes", lambda path: 10)
    with pytest.raises(TraceError, match="has 10 bytes free"):
        trace(str(folder), [prompt], output=tmp_path / "u", max_new_tokens=1)


def test_an_error_while_recording_leaves_no_trace(folder: Path, prompt: Path, tmp_path: Path, monkeypatch) -> None:
    def stop(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(run_module.RecordingRun, "_generated", stop)
    with pytest.raises(ModelError, match="out of memory") as caught:
        trace(str(folder), [prompt], output=tmp_path / "t", max_new_tokens=4)
    assert "--dtype bfloat16" in caught.value.todo
    assert not list(tmp_path.glob("t*"))


class Bytes:
    """A tokenizer whose tokens are single bytes: characters of several bytes span tokens."""

    def decode(self, ids: list[int], **_: object) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize("text", ["plain", "zażółć gęślą", "日本", "a</script>\u2028b", "🙂🙂"])
def test_parts_joined_are_the_text(text: str) -> None:
    ids = list(text.encode())
    parts = token_texts(Bytes(), ids)
    assert len(parts) == len(ids)
    assert "".join(parts) == text
