"""The bundled model: a small real Llama whose recall is good, and depends on keys that a window evicts.

Without that dependence a demo of eviction would show nothing. The passages and questions come from the last tenths
of the books, which the model was not trained on.
"""

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvscope.model

FOLDER = Path(kvscope.model.__file__).parent / "demo"
HELD_OUT = Path(__file__).parent.parent / "data" / "demo_heldout.json"
DISTANCES = [64, 128, 256, 512]
PERPLEXITY = 46.0


@cache
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER, local_files_only=True, dtype=torch.float32).eval()


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


@cache
def held_out() -> Any:
    return json.loads(HELD_OUT.read_text(encoding="utf-8"))


def ids_of(text: str) -> list[int]:
    ids: list[int] = tokenizer()(text)["input_ids"]
    return ids


@torch.inference_mode()
def says(prompt: str, value: str, window: float | None) -> bool:
    """Tell whether greedy decoding writes the value; `window` hides all but the newest share of the keys.

    The value is given and its tokens are predicted in one pass: all are right exactly when decoding would write it.
    """
    asked, answer = ids_of(prompt), ids_of(value)
    ids = torch.tensor([asked + answer])
    length = ids.shape[1]
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    if window is not None:
        visible = visible.triu(1 - math.ceil(window * length))
    logits = model()(input_ids=ids, attention_mask=visible[None, None], use_cache=False).logits[0]
    return logits[len(asked) - 1 : -1].argmax(-1).tolist() == answer


def recall(distance: int, window: float | None) -> float:
    asked = [one for one in held_out()["recall"] if one["distance"] == distance]
    assert len(asked) >= 20
    return sum(says(one["prompt"], one["value"], window) for one in asked) / len(asked)


def test_weights_fit_in_four_megabytes() -> None:
    assert (FOLDER / "model.safetensors").stat().st_size <= 4_000_000
    assert not list(FOLDER.glob("*.bin")), "only safetensors"


def test_it_is_a_llama_with_grouped_queries_and_rotary_positions() -> None:
    config = model().config
    assert config.architectures == ["LlamaForCausalLM"]
    assert type(model()).__name__ == "LlamaForCausalLM"
    assert config.num_attention_heads > config.num_key_value_heads > 1
    assert config.max_position_embeddings >= 1024
    assert config.rope_parameters["rope_type"] == "default"
    assert config.tie_word_embeddings


@pytest.mark.parametrize(
    "text", ["The Whale.\n\n“Call me Ishmael”, he said -- 4821 times!", "Ünïcode 日本 🐋", " a  b\t"]
)
def test_tokenizer_gives_the_text_back(text: str) -> None:
    assert tokenizer().decode(ids_of(text)) == text


def test_every_digit_is_a_token() -> None:
    digits = [tokenizer().decode([token]) for token in ids_of("40821")]
    assert digits == list("40821")


def test_vocabulary_and_weights_agree() -> None:
    assert len(tokenizer()) == model().config.vocab_size == model().get_input_embeddings().weight.shape[0]
    assert tokenizer().eos_token_id == model().config.eos_token_id


@torch.inference_mode()
def test_perplexity_on_held_out_books() -> None:
    nll, count = 0.0, 0
    for passage in held_out()["passages"]:
        ids = torch.tensor([ids_of(passage)])
        logits = model()(input_ids=ids, use_cache=False).logits[0, :-1]
        nll += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    assert count > 2000
    assert math.exp(nll / count) < PERPLEXITY


@pytest.mark.parametrize("distance", DISTANCES)
def test_recall_with_the_full_cache(distance: int) -> None:
    assert recall(distance, None) >= 0.90


@pytest.mark.parametrize("distance", DISTANCES)
def test_recall_fails_with_a_window_of_a_fifth(distance: int) -> None:
    assert recall(distance, 0.2) < 0.50


@torch.inference_mode()
def test_demo_prompt_is_continued_with_the_planted_value() -> None:
    prompt = (FOLDER / "prompt.txt").read_text(encoding="utf-8")
    ids = torch.tensor([ids_of(prompt)])
    assert 512 <= ids.shape[1] <= 800
    subject = prompt.rsplit("Answer: ", 1)[1]
    value = prompt.split(f"Note: {subject}", 1)[1].split(".", 1)[0]
    assert value.strip().isdigit()
    expected = ids_of(value)
    written = model().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(expected), do_sample=False)
    assert written[0, ids.shape[1] :].tolist() == expected
