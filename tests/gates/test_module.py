"""The gate equals its plain-loop reference, and its file is read back unchanged or refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kvscope.core.errors import KvscopeError, ModelError, UsageError
from kvscope.gates.file import BESIDE, DEMO, KIND, GateFacts, path_of, read_facts
from kvscope.gates.module import LayerGate, LearnedGate, load_gate
from kvscope.model.compile import GATE
from kvscope.model.sample import sample
from tests.gates.make import gate, opened, written
from tests.model.tiny import build

LENGTH = 11


def inputs(batch: int = 1, size: int = 32) -> torch.Tensor:
    return torch.randn(batch, LENGTH, size, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


@pytest.mark.parametrize(("form", "prompt"), [("causal", 5), ("bidirectional", 5), ("bidirectional", 1)])
def test_values_equal_the_plain_loop(form: str, prompt: int) -> None:
    made, hidden = gate(build("llama"), form=form), inputs(2)
    for layer in range(2):
        values = made.values(layer, hidden, prompt)
        module = made.layers[layer]
        assert isinstance(module, LayerGate)
        for one in range(2):
            expected = opened(module, hidden[one].numpy(), form, prompt)
            assert np.abs(values[one].numpy() - expected).max() < 1e-12
        assert values.std() > 0.1, "gates that are all alike would prove little"


def test_a_causal_gate_does_not_look_ahead_and_a_bidirectional_one_only_within_the_prompt() -> None:
    hidden = inputs()
    other = hidden.clone()
    other[:, 7:] = inputs()[:, 7:] + 1
    causal, both = gate(build("llama")), gate(build("llama"), form="bidirectional")
    same = causal.values(0, hidden, 9) == causal.values(0, other, 9)
    assert same[..., :7].all() and not same[..., 7:].any()
    within = both.values(0, hidden, 9) == both.values(0, other, 9)
    assert not within[..., :7].any(), "a later token of the prompt changes an earlier one"
    after = both.values(0, hidden, 7) == both.values(0, other, 7)
    assert after[..., :7].all(), "a token after the prompt does not"


def test_the_scale_of_a_token_does_not_matter() -> None:
    made, hidden = gate(build("llama")), inputs()
    assert torch.allclose(made.values(1, hidden, 1), made.values(1, hidden * 50, 1))
    assert torch.isfinite(made.values(1, torch.zeros_like(hidden), 1)).all()


def test_sinks_are_wide_open() -> None:
    made = gate(build("llama"), sinks=3, tau=0.7)
    values, margins = made.values(0, inputs(), 1), made.margins(0, inputs(), 1)
    assert (values[..., :3] == 1).all() and (values[..., 3:] < 1).all()
    assert torch.equal(margins, values - 0.7)


def test_a_file_holds_the_gate_and_what_it_is(tmp_path: Path) -> None:
    model = build("llama")
    made = gate(model, form="bidirectional", tau=0.4, sinks=2)
    made.facts = replace(made.facts, provenance={"seed": 3, "texts": [{"file": "ä.txt"}]})
    made.write(tmp_path / "a.safetensors")
    again = load_gate(str(tmp_path / "a.safetensors"))
    assert again.facts == made.facts == read_facts(str(tmp_path / "a.safetensors"))
    assert torch.allclose(again.values(1, inputs(), 5), made.values(1, inputs(), 5), atol=2e-3)
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"], "nothing half written is left"


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    name = written(tmp_path, build("llama"))
    before = load_gate(name)
    assert load_gate(name) is before
    gate(build("llama"), seed=1).write(Path(name))
    assert not torch.equal(load_gate(name).values(0, inputs(), 1), before.values(0, inputs(), 1))


def require(made: LearnedGate, model: torch.nn.Module, **other: int) -> None:
    sizes = {"layers": 2, "hidden": 32, "kv_heads": 2, **other}
    made.require("mine", **sizes, weights=sample(model))


def test_a_gate_knows_its_model_in_any_precision() -> None:
    made = gate(build("llama"))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        require(made, build("llama").to(dtype))


@pytest.mark.parametrize("sizes", [{"layers": 3}, {"hidden": 64}, {"kv_heads": 4}])
def test_a_model_of_other_sizes_is_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(
        UsageError, match="gate mine is for LlamaForCausalLM: 2 layers, hidden size 32, 2 key/value"
    ) as e:
        require(gate(build("llama")), build("llama"), **sizes)
    assert "kvscope gate train" in e.value.todo


def test_another_model_of_the_same_sizes_is_refused() -> None:
    with pytest.raises(UsageError, match="this model has other weights"):
        require(gate(build("llama")), build("qwen2"))


def broken(folder: Path) -> dict[str, tuple[Path, str]]:
    whole = Path(written(folder, build("llama")))
    tensors = load_file(whole)
    metadata = read_facts(str(whole)).metadata(tensors)
    made: dict[str, tuple[Path, str]] = {}

    def add(name: str, message: str, metadata: dict[str, str], **changed: torch.Tensor) -> None:
        path = folder / f"{name}.safetensors"
        save_file({**tensors, **changed}, path, metadata)
        made[name] = (path, message)

    add("other", "is not a gate of kvscope", {})
    about = json.loads(metadata[KIND])
    add("edited", "its metadata differs from its checksum", {KIND: json.dumps({**about, "tau": 0.1})})
    add("flipped", "parameters differ from their checksum", metadata, **{"layers.0.open.bias": torch.ones(2)})
    about = {name: value for name, value in about.items() if name not in ("sha256", "tensors")}  # as before
    metadata = {KIND: json.dumps(about)}
    add("newer", "newer than this kvscope reads", {KIND: json.dumps({**about, "version": 2})})
    add("list", "its metadata differs from its checksum", {KIND: "[1]"})
    add("json", "its metadata is not JSON", {KIND: "{"})
    add("larger", "do not match its metadata", {KIND: json.dumps({**about, "layers": 3})})
    add("smaller", "do not match its metadata", metadata, **{"layers.0.open.bias": torch.zeros(7)})
    cut = folder / "cut.safetensors"
    cut.write_bytes(whole.read_bytes()[:-40])
    text = folder / "text.safetensors"
    text.write_text("no tensors at all")
    return {**made, "cut": (cut, "damaged or not a gate"), "text": (text, "damaged or not a gate")}


@pytest.mark.parametrize(
    "name",
    ["other", "edited", "flipped", "newer", "list", "json", "larger", "smaller", "cut", "text"],
)
def test_what_is_no_gate_is_refused(name: str, tmp_path: Path) -> None:
    path, message = broken(tmp_path)[name]
    with pytest.raises(ModelError, match=message) as found:
        load_gate(str(path))
    assert found.value.todo and "\n" not in found.value.what


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KvscopeError, match="no gate nowhere"):
        path_of("nowhere.safetensors")
    with pytest.raises(UsageError):
        path_of(str(tmp_path))


def test_a_bidirectional_gate_needs_the_whole_prompt() -> None:
    both = GateFacts("m", 1, 1, 1, form="bidirectional")
    both.require_prefill("full", "mine")
    with pytest.raises(UsageError, match="gate mine looks at the whole prompt"):
        both.require_prefill("stream", "mine")


def test_the_bundled_gate() -> None:
    facts = load_gate(DEMO).facts
    assert path_of(DEMO).name == BESIDE == GATE
    assert path_of(DEMO).stat().st_size < 300_000
    assert (facts.model, facts.form, facts.tau, facts.sinks) == ("demo", "causal", 0.5, 0)
    assert {"target_keep", "eviction", "seed", "texts", "versions", "keep_by_layer"} <= set(facts.provenance)
