"""Layers that read the cache of an earlier one (Gemma 3n): named in the trace, refused where one decision is needed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3nTextConfig

from kvscope.closed_loop.compile import compile_verify
from kvscope.closed_loop.decode import attention_facts
from kvscope.core.errors import ModelError
from kvscope.core.options import ClosedLoopOptions, ModelSource, OutputOptions, ReplayOptions, VerifyOptions
from kvscope.core.recording_options import TextOptions
from kvscope.model.compile import compile_recording
from kvscope.model.selfcheck import self_check
from kvscope.replay.compile import compile_replay
from tests.models import build as builder

PROMPT = " ".join(f"w{(7 * number) % 101 + 3}" for number in range(20))
REFUSED = r"layers 3, 4 of \w+ read the cache of layers 1, 2, and one decision.*\n.*open loop: kvscope replay without"


def sharing(name: str) -> Any:
    """Return a configuration of five layers, of which the last two read the cache of the last before them."""
    config = builder.shrunk(builder.CONFIG_MAPPING[name]())
    changed = {
        "num_kv_shared_layers": 2,
        "num_hidden_layers": 5,
        "layer_types": [
            "sliding_attention",
            "full_attention",
            "sliding_attention",
            "full_attention",
            "sliding_attention",
        ],
        "activation_sparsity_pattern": [0.0] * 5,
        "intermediate_size": [48] * 5,
    }
    return Gemma3nTextConfig(**{**config.to_dict(), **changed})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "config_of", sharing)
        return builder.saved(tmp_path_factory.mktemp("gemma3n") / "model", "gemma3n_text")


def test_the_trace_says_which_layers_share_and_both_closed_ways_refuse(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text(PROMPT)
    source, output = ModelSource(str(folder)), OutputOptions(tmp_path / "trace")
    text = TextOptions(max_new_tokens=5)
    trace = compile_recording(source, [tmp_path / "prompt.txt"], output, text=text).execute()
    assert trace.header.shared_cache == {"3": 1, "4": 2}
    assert any(line.startswith("Shared caches: layers 3, 4 read") for line in trace.approximate)
    made = compile_replay(trace, ["h2o"], "9").execute(OutputOptions(tmp_path / "replay"))
    assert any(line.startswith("Shared caches") for line in made.info.trace.approximate)
    with pytest.raises(ModelError, match=REFUSED):
        compile_replay(trace, ["h2o"], "9", ReplayOptions(closed=ClosedLoopOptions()))
    with pytest.raises(ModelError, match=REFUSED):
        compile_verify(trace, ["h2o"], "9", VerifyOptions())
    with torch.inference_mode(), pytest.raises(ModelError, match=REFUSED):
        attention_facts(AutoModelForCausalLM.from_pretrained(folder).eval(), torch.arange(3, 20)[None])


@pytest.mark.parametrize("name", ["gemma3n_text", "llama", "gpt2", "phi3", "deepseek_v3"])
def test_layers_of_their_own_are_not_said_to_share(name: str) -> None:
    with torch.inference_mode():
        assert self_check(builder.build(name), torch.arange(3, 27)[None]).shared == {}
