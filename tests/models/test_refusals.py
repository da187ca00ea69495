"""Types that no trace can be made of are refused before their weights are read, with what is wrong and what to do."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, T5Config, T5ForConditionalGeneration
from transformers.utils import is_timm_available

from kvscope.core.errors import KvscopeError, ModelError
from kvscope.core.options import ModelSource, OutputOptions
from kvscope.core.recording_options import TextOptions
from kvscope.model.compile import compile_recording
from kvscope.model.known_types import known_types
from kvscope.model.loading import load
from kvscope.model.model_facts import model_facts
from kvscope.model.obstacles import NO_ATTENTION, OTHER_MODELS
from kvscope.model.read_weights import loader_of
from tests.models.build import build, needs_timm, saved, without_timm

PROMPT = "w3 w10 w17 w24 w31 w38 w45 w52"


@pytest.mark.parametrize("name", sorted(OTHER_MODELS))
def test_other_models_are_refused_by_their_type(name: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", name)
    for refusing in (lambda: load(ModelSource(str(folder))), lambda: model_facts(str(folder))):
        with pytest.raises(ModelError) as caught:
            refusing()
        assert caught.value.what == known_types()[name].remark == f"models of type {name} {OTHER_MODELS[name]}"
        assert "kvscope models lists the types" in caught.value.todo
    assert known_types()[name].trace == "refused"


def test_a_loaded_model_is_refused_by_its_type(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(saved(tmp_path, "llama"))
    for name in ("reformer", "mamba"):
        with pytest.raises(ModelError, match=f"models of type {name} "):
            load(ModelSource((build(name), tokenizer)))


def test_a_type_without_attention_is_not_described(tmp_path: Path) -> None:
    for name in sorted(NO_ATTENTION):
        assert known_types()[name].trace == "refused"
    with pytest.raises(ModelError, match="models of type mamba have no attention"):
        model_facts(str(saved(tmp_path, "mamba")))


def test_a_model_that_does_not_say_its_language(tmp_path: Path) -> None:
    """X-MOD: the advice is to set it, after which the model is traced."""
    folder = saved(tmp_path / "model", "xmod")
    known = json.loads((folder / "config.json").read_text())
    config = {**known, "default_language": None, "languages": ["en_XX", "de_DE", "fr_XX", "it_IT"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="does not give the language") as caught:
        load(ModelSource(str(folder)))
    found = re.fullmatch(r"Set (\w+) in its config.json to one of its languages: (\w+), .*, \.\.\.", caught.value.todo)
    assert found is not None
    (folder / "config.json").write_text(json.dumps({**known, found[1]: found[2]}))
    (tmp_path / "prompt.txt").write_text(PROMPT)
    output, text = OutputOptions(tmp_path / "trace"), TextOptions(max_new_tokens=2)
    trace = compile_recording(ModelSource(str(folder)), [tmp_path / "prompt.txt"], output, text=text).execute()
    assert trace.sequences[0].length == 10


@pytest.mark.skipif(is_timm_available(), reason="timm is installed")
@pytest.mark.parametrize("name", ["fast_vlm", "gemma3n", "perception_lm"])
def test_a_package_that_is_missing_is_named(name: str, tmp_path: Path) -> None:
    assert needs_timm(name) and "needs the package timm" in known_types()[name].remark
    with without_timm():
        folder = saved(tmp_path, name)
    for refusing in (lambda: load(ModelSource(str(folder))), lambda: model_facts(str(folder))):
        with pytest.raises(KvscopeError) as caught:
            refusing()
        assert caught.value.what == f"model {folder} needs timm, which is not installed"
        assert caught.value.todo == "Install it: pip install timm"


def test_the_class_that_a_configuration_names(tmp_path: Path) -> None:
    """Evolla: no automatic class of transformers knows its configuration, which names the class."""
    folder = saved(tmp_path / "evolla", "evolla")
    loaded = load(ModelSource(str(folder)))
    assert type(loaded.model).__name__ == "EvollaForProteinText2Text"
    config = AutoConfig.from_pretrained(folder)
    config.architectures = ["LlamaForCausalLM"]  # a class of another configuration
    assert loader_of(config).__name__ == "AutoModelForCausalLM"


def test_an_encoder_decoder_is_said_to_be_one(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "llama")
    small = {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    torch.manual_seed(0)
    T5ForConditionalGeneration(T5Config(**small)).save_pretrained(folder)
    (tmp_path / "prompt.txt").write_text(PROMPT)
    with pytest.raises(ModelError, match="T5ForConditionalGeneration is an encoder-decoder, whose cross-attention"):
        compile_recording(ModelSource(str(folder)), [tmp_path / "prompt.txt"], OutputOptions(tmp_path / "trace"))
