"""What `kvscope models` says of a model before it is loaded is what the model does: heads, windows, cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kvscope.core.options import ModelSource, OutputOptions
from kvscope.core.recording_options import TextOptions
from kvscope.model.compile import compile_recording
from kvscope.model.known_types import known_types
from kvscope.model.model_facts import ModelFacts, model_facts
from kvscope.model.module_maps import self_check_modules
from kvscope.model.selfcheck import AttentionFacts, self_check
from kvscope.model.short_cache import full_cache
from kvscope.replay.compile import compile_replay
from tests.models import build

# Types whose heads, windows or caches the configuration alone does not say, and usual ones.
NAMES = (
    "llama gemma3 mimo_v2_flash gpt_bigcode jetmoe falcon_h1 deepseek_v3 kimi_linear bailing_hybrid gemma4_text zamba2 "
    "gpt_neo inkling2_text dots3_note_text mistral_large4 hy_v4 deepseek_v32 qwen4_exp_text nemotron_h qwen3_next "
    "bloom dots3_note evolla glm5_next granite4_vision hunyuan_vl kosmos-2.5 mistral4 molmo2 muse_spark "
    "nemotron_h_omni xmod"
).split()
IDS = torch.arange(3, 27)[None]


def described(model: Any, folder: Path) -> ModelFacts:
    """Return what is said of a model from its configuration alone."""
    model.config.architectures = [type(model).__name__]  # as a saved model's configuration has it
    model.config.save_pretrained(folder)
    return model_facts(str(folder))


def measured(model: Any, name: str) -> AttentionFacts:
    """Return what a recording finds in the model."""
    if known_types()[name].trace == "rows":
        return self_check(model, IDS)
    model.set_attn_implementation("eager")
    return self_check_modules(model, IDS)


def cached_numbers(model: Any) -> int:
    """Return how many numbers one token takes in the cache of the model."""
    cache = full_cache(model)
    model(input_ids=IDS, past_key_values=cache, use_cache=True)
    parts = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values", "indexer_keys")]
    parts = [part[:, None] if part.ndim == 3 else part for part in parts if part is not None]  # an index has one head
    return sum(part.shape[1] * part.shape[-1] for part in parts if part.numel())


@pytest.mark.parametrize("name", NAMES)
def test_what_is_said_is_what_the_model_does(name: str, tmp_path: Path) -> None:
    model = build.build(name)
    said, found = described(model, tmp_path), measured(model, name)
    layers = sorted(found.sizes)
    assert said.attention_layers == len(layers)
    heads = [said.layer_heads[layer] if said.layer_heads else said for layer in layers]
    assert [(own.heads, own.kv_heads) for own in heads] == [
        (found.sizes[layer].heads, found.sizes[layer].kv_heads) for layer in layers
    ]
    if not found.from_modules:  # rows alone do not say how large a head is
        assert [own.head_dim for own in heads] == [found.sizes[layer].head_dim for layer in layers]
    assert [said.windows[layer] if said.windows else None for layer in layers] == [
        found.windows[layer] for layer in layers
    ]
    assert said.cache_bytes == 2 * cached_numbers(model)


def test_windows_of_rows_from_modules_limit_what_a_cache_holds(tmp_path: Path) -> None:
    """GPT-Neo: keys that left the window are not in the cache, so no policy may count them as held."""
    (tmp_path / "prompt.txt").write_text(" ".join(f"w{(7 * number) % 101 + 3}" for number in range(20)))
    source = ModelSource(str(build.saved(tmp_path / "model", "gpt_neo")))
    output, text = OutputOptions(tmp_path / "trace"), TextOptions(max_new_tokens=10)
    trace = compile_recording(source, [tmp_path / "prompt.txt"], output, text=text).execute()
    assert trace.header.layer_types == ["full", "full", "sliding"]
    assert trace.header.sliding_window == [None, None, 8]
    made = compile_replay(trace, ["full"], "20").execute(OutputOptions(tmp_path / "replay"))
    assert made.visible(0, 0, 2)[0].sum(-1).max() == 8 and made.visible(0, 0, 1)[0].sum(-1).max() == 30


def test_a_window_that_rows_reach_beyond_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build.build("gpt_neo")
    assert self_check_modules(model, IDS).windows == {0: None, 1: None, 2: 8}
    monkeypatch.setattr(model.config, "window_size", 5)  # the model's mask was made with 8
    assert self_check_modules(model, IDS).windows == {0: None, 1: None, 2: None}


def test_latent_vectors_that_are_handed_on_are_one_cache(tmp_path: Path) -> None:
    """Mistral Large 4: layer 1 reads the latent vectors of layer 0; rows are those of modules."""
    config = build.config_of("mistral_large4")
    text = {**config.text_config.to_dict(), "kv_source_layers": [0, 0, 2]}
    other = {field: value for field, value in config.to_dict().items() if field != "text_config"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "config_of", lambda _: type(config)(text_config=text, **other))
        folder = build.saved(tmp_path / "model", "mistral_large4")
    facts = model_facts(str(folder))
    assert (facts.reading_layers, facts.cache_bytes) == (1, 2 * (24 + 16 + 3 * 16)), "three layers have an index"
    (tmp_path / "prompt.txt").write_text(" ".join(f"w{(7 * number) % 101 + 3}" for number in range(20)))
    output, new = OutputOptions(tmp_path / "trace"), TextOptions(max_new_tokens=10)
    trace = compile_recording(ModelSource(str(folder)), [tmp_path / "prompt.txt"], output, text=new).execute()
    assert trace.header.shared_cache == {"1": 0}
    assert (trace.header.latent_size, trace.header.indexed) == (24, True)
    made = compile_replay(trace, ["h2o"], "6").execute(OutputOptions(tmp_path / "replay"))
    held = [made.resident(0, 0, layer) for layer in trace.layers]
    assert (held[0] == held[1]).all() and not (held[0] == held[2]).all()
    (run,) = made.summary.runs
    assert run.scope == "layer" and run.mean("latent_entries") == pytest.approx(6)
    assert run.mean("latent_bytes") == pytest.approx(6 * 24 * 2 * 2), "two caches"
    assert run.allocated_keys == 6 * 2
