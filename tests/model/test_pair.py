"""A loaded pair of model and tokenizer can be given in place of a model name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvscope
from kvscope.closed_loop.compile import compile_perplexity
from kvscope.closed_loop.trace_passages import load_model_of
from kvscope.core.errors import OutputExists, TraceError, UsageError
from kvscope.core.options import ClosedLoopOptions, ModelSource, OutputOptions, PerplexityOptions
from kvscope.core.recording_options import StoreOptions, TextOptions
from kvscope.model.compile import compile_recording
from kvscope.model.loading import load
from tests.model.tiny import saved

Pair = tuple[Any, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("pair") / "llama")


@pytest.fixture
def pair(folder: Path) -> Pair:
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    file = tmp_path / "prompt.txt"
    file.write_text("w3 w1 w4 w1 w5 w9 w2 w6")
    return file


def test_a_pair_is_recorded_as_its_folder_is(folder: Path, pair: Pair, prompt: Path, tmp_path: Path) -> None:
    by_name = kvscope.trace(str(folder), [prompt], output=tmp_path / "a", max_new_tokens=4)
    by_pair = kvscope.trace(pair, [prompt], output=tmp_path / "b", max_new_tokens=4)
    assert by_pair.header.model == by_name.header.model
    assert by_pair.header.model.id == str(folder)
    assert by_pair.tokens(0).equals(by_name.tokens(0))
    for layer in by_name.layers:
        assert np.array_equal(by_pair.attention(0, layer), by_name.attention(0, layer))


def test_a_pair_without_a_name_is_called_by_its_class(pair: Pair, prompt: Path, tmp_path: Path) -> None:
    pair[0].config.name_or_path = ""
    text = TextOptions(max_new_tokens=4)
    plan = compile_recording(ModelSource(pair), [prompt], OutputOptions(tmp_path / "t"), text=text)
    assert plan.header.model.id == "LlamaForCausalLM"
    assert not (tmp_path / "t").exists()


def test_the_closed_loop_of_a_pair_without_a_name_asks_for_one(
    folder: Path, pair: Pair, prompt: Path, tmp_path: Path
) -> None:
    pair[0].config.name_or_path = ""
    made = kvscope.trace(pair, [prompt], output=tmp_path / "t", max_new_tokens=4)
    with pytest.raises(TraceError, match="recorded from a loaded LlamaForCausalLM without a name") as caught:
        load_model_of(made, ClosedLoopOptions())
    assert "--model" in caught.value.todo
    assert load_model_of(made, ClosedLoopOptions(model=str(folder))).source == str(folder)


def test_a_pair_is_used_as_it_is(pair: Pair) -> None:
    loaded = load(ModelSource(pair))
    assert loaded.model is pair[0]
    assert loaded.tokenizer is pair[1]
    for how in ({"dtype": "float16"}, {"device": "meta"}, {"revision": "main"}, {"trust_remote_code": True}):
        with pytest.raises(UsageError, match=f"together with {next(iter(how))}"):
            load(ModelSource(pair, **how))
    pair[0].train()
    with pytest.raises(UsageError, match="in training mode"):
        load(ModelSource(pair))


def test_perplexity_of_a_pair(folder: Path, pair: Pair, prompt: Path) -> None:
    prompt.write_text(" ".join(f"w{1 + index * 7 % 60}" for index in range(32)))
    options = PerplexityOptions(window=16)
    jobs = [compile_perplexity(ModelSource(model), [prompt], ["tova"], "4", options) for model in (pair, str(folder))]
    assert jobs[0].closed.model is pair[0]
    assert jobs[0].source == jobs[1].source


def test_a_plan_says_everything_before_the_first_token(folder: Path, prompt: Path, tmp_path: Path) -> None:
    output = OutputOptions(tmp_path / "t", command="kvscope trace")
    plan = compile_recording(
        ModelSource(str(folder)),
        [prompt],
        output,
        text=TextOptions(max_new_tokens=5, seed=3),
        store=StoreOptions(layers=(1,)),
    )
    assert (plan.path, plan.sequences, plan.tokens) == (tmp_path / "t", 1, 13)
    assert plan.store.layers == (1,)
    assert plan.store.hidden is False
    assert not plan.path.exists()
    made = plan.execute()
    assert made.path == plan.path
    assert made.header.seed == 3
    assert made.header.command == "kvscope trace"
    assert made.layers == [1]
    with pytest.raises(OutputExists):
        compile_recording(ModelSource(str(folder)), [prompt], output, text=TextOptions(max_new_tokens=5))
