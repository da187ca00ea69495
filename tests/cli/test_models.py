"""``kvscope models``, and the hints of models that cannot do everything: each is followed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.cli.conftest import Run
from tests.models.build import config_of, saved

TYPES = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]
WORDS = "w3 w10 w17 w24 w31 w38 w45 w52 w59 w66 w73 w80"


def test_the_list_has_short_names_and_types(run: Run) -> None:
    said = run("models").out
    assert "qwen3-0.6b" in said and "qwen3_next" in said and "module rows" in said
    told = json.loads(run("models", "--json").out)
    assert told["aliases"]["gpt2"] == "openai-community/gpt2"
    assert {"name", "trace", "replay", "closed", "verify", "remark"} == set(told["types"][0])


def test_one_type(run: Run) -> None:
    told = json.loads(run("models", "bloom", "--json").out)
    assert (told["trace"], told["replay"], told["closed"]) == ("module rows", "yes", "no")
    assert "code of its own" in run("models", "bloom").out


def test_one_model_without_its_weights(run: Run, tmp_path: Path) -> None:
    folder = saved(tmp_path / "hybrid", "qwen3_next")
    (folder / "model.safetensors").unlink()
    told = json.loads(run("models", str(folder), "--json").out)
    assert told["type"]["name"] == "qwen3_next"
    assert (told["layers"], told["attention_layers"]) == (3, 1)
    assert told["cache_bytes"] == 2 * 1 * 2 * told["kv_heads"] * told["head_dim"], "16 bit, one layer, keys and values"
    assert "2 of them without a cache to evict" in run("models", str(folder)).out
    latent = saved(tmp_path / "latent", "deepseek_v3")
    assert json.loads(run("models", str(latent), "--json").out)["cache_bytes"] == 2 * 3 * (16 + 8)


def test_a_model_whose_layers_differ_in_their_heads(run: Run, tmp_path: Path) -> None:
    folder = saved(tmp_path / "gemma", "gemma4_text")
    told = json.loads(run("models", str(folder), "--json").out)
    assert [own["head_dim"] for own in told["layer_heads"]] == [8, 8, 512]
    assert told["cache_bytes"] == 2 * 2 * 2 * (8 + 8 + 512), "16 bit, keys and values, two heads in each layer"
    said = " ".join(run("models", str(folder)).out.split())
    assert "layers 0, 1: 4 query heads, 2 key/value heads of size 8; layer 2: 4 query heads" in said


def test_layers_that_read_a_cache_are_counted_apart(run: Run, tmp_path: Path) -> None:
    config = config_of("gemma4_text")
    known = {field: value for field, value in config.to_dict().items() if field != "per_layer_config"}
    changes = {"num_hidden_layers": 5, "layer_types": TYPES, "num_kv_shared_layers": 2, "global_head_dim": 16}
    type(config)(**{**known, **changes}).save_pretrained(tmp_path)
    told = json.loads(run("models", str(tmp_path), "--json").out)
    assert (told["layers"], told["attention_layers"], told["reading_layers"]) == (5, 5, 2)
    assert told["windows"] == [8, None, 8, 8, None] and len(told["layer_heads"]) == 5
    assert told["cache_bytes"] == 2 * 2 * 2 * (8 + 16 + 8), "16 bit, keys and values, two heads, three caches"
    said = " ".join(run("models", str(tmp_path)).out.split())
    assert "5, 2 of them read the cache of an earlier one" in said and "8 keys in layers 0, 2, 3" in said


def test_an_adapter_is_described_by_its_base(run: Run, tmp_path: Path) -> None:
    base = saved(tmp_path / "base", "mistral")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(base), "task_type": "CAUSAL_LM"})
    )
    missing = run("models", str(adapter))
    assert missing.status == 1 and "adapter_model.safetensors" in missing.err
    save_file({"lora": torch.zeros(1)}, adapter / "adapter_model.safetensors")
    told = json.loads(run("models", str(adapter), "--json").out)
    plain = json.loads(run("models", str(base), "--json").out)
    assert told["base"] == str(base) and plain["base"] is None
    assert {**told, "name": 0, "source": 0, "base": 0} == {**plain, "name": 0, "source": 0, "base": 0}
    assert told["windows"] == [8, 8, 8]
    said = " ".join(run("models", str(adapter)).out.split())
    assert "an adapter of" in said and "8 keys in every layer" in said


def test_an_unknown_name(run: Run) -> None:
    done = run("models", "lama")
    assert done.status == 2 and "no model or type is called 'lama'" in done.err and "llama" in done.err


@pytest.fixture
def prompt(tmp_path: Path) -> str:
    (tmp_path / "prompt.txt").write_text(WORDS)
    return str(tmp_path / "prompt.txt")


def test_the_hints_of_a_hybrid(run: Run, tmp_path: Path, prompt: str) -> None:
    model, trace = str(saved(tmp_path / "model", "qwen3_next")), str(tmp_path / "trace")
    new = ("--max-new-tokens", "4", "--output", trace, "--force")
    wrong = run("trace", "--model", model, prompt, *new, "--layers", "0")
    assert wrong.status == 1 and "--layers 2" in wrong.err
    assert run("trace", "--model", model, prompt, *new, "--layers", "2").status == 0
    closed = ("--policy", "h2o", "--budget", "6", "--perplexity", "--output", str(tmp_path / "replay"), "--force")
    assert run("replay", trace, *closed).status == 0, "every layer with attention was recorded"
    assert run("trace", "--model", model, prompt, *new).status == 0
    assert "no cache to evict in 0, 1 (linear_attention)" in run("info", trace).out
    assert run("replay", trace, *closed).status == 0
    assert run("verify", trace, "--policy", "h2o", "--budget", "6").status == 0


def test_the_hints_of_a_model_with_code_of_its_own(run: Run, tmp_path: Path, prompt: str) -> None:
    model, trace = str(saved(tmp_path / "model", "bloom")), str(tmp_path / "trace")
    new = ("trace", "--model", model, prompt, "--max-new-tokens", "4", "--output", trace, "--force")
    wrong = run(*new, "--store", "qkv")
    assert wrong.status == 1 and "--store maps" in wrong.err
    assert run(*new, "--store", "maps").status == 0
    assert "as the model's attention modules return them" in run("info", trace).out
    replay = ("replay", trace, "--budget", "6", "--output", str(tmp_path / "replay"), "--force")
    wrong = run(*replay, "--policy", "h2o", "--perplexity")
    assert wrong.status == 1 and "without --perplexity" in wrong.err
    assert run(*replay, "--policy", "h2o").status == 0
    wrong = run(*replay, "--policy", "vatp")
    assert wrong.status == 1 and "such as h2o and tova" in wrong.err
    assert run(*replay, "--policy", "tova").status == 0
    wrong = run("verify", trace, "--policy", "h2o", "--budget", "6")
    assert wrong.status == 1 and "without --perplexity" in wrong.err
