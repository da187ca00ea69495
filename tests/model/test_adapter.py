"""Adapters: a base model with its adapter must be what PEFT makes of them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import kvscope
from kvscope.closed_loop.compile import compile_verify
from kvscope.core.options import ModelSource
from kvscope.model import adapter
from kvscope.model.loading import load
from tests.model.test_loading import COMMIT, cached, refused
from tests.model.test_weights import Attack
from tests.model.tiny import build, saved, tokens

peft = pytest.importorskip("peft")

ADAPTER = "adapter_model.safetensors"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved(tmp_path / "base")


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    wrapped().save_pretrained(tmp_path / "adapter")
    return named(tmp_path / "adapter", str(base))


def wrapped(**options: Any) -> Any:
    """Return the tiny model in PEFT, with an adapter that changes what it says."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)
        model = peft.get_peft_model(build("llama"), config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    return model.eval()


def named(folder: Path, base: str | None) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": base}))
    return folder


def difference(source: Path | str, **options: Any) -> float:
    """Return by how much the logits differ from those of PEFT."""
    with torch.inference_mode():
        loaded = load(ModelSource(str(source), **options)).model
        return float((loaded(tokens(12)).logits - wrapped()(tokens(12)).logits).abs().max())


def test_an_adapter_changes_its_base(folder: Path, base: Path) -> None:
    assert difference(folder) < 1e-6
    assert difference(base) > 0.01
    loaded = load(ModelSource(str(folder)))
    assert (loaded.source, loaded.base, loaded.revision) == (str(folder), str(base), None)
    assert type(loaded.model).__name__ == "LlamaForCausalLM"
    assert load(ModelSource(str(folder), dtype="float64")).model.dtype == torch.float64


def test_a_base_beside_the_adapter(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "base").mkdir(parents=True)
    (tmp_path / "elsewhere" / "work").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere" / "work")  # where ../base is there too, and no model
    assert difference(named(folder, "../base")) < 1e-6


def test_a_trace_of_an_adapter_and_its_closed_loop(folder: Path, base: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text(" ".join(f"w{n * 7 % 63 + 1}" for n in range(20)))
    trace = kvscope.trace(str(folder), [tmp_path / "p.txt"], output=tmp_path / "t", max_new_tokens=4)
    assert (trace.header.model.id, trace.header.model.base) == (str(folder), str(base))
    verdicts = compile_verify(trace, ["h2o"], "50%").execute()
    assert verdicts and all(one.decided and one.different == 0 and one.logit_difference < 1e-9 for one in verdicts)


def test_a_cached_adapter(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    cached(monkeypatch, tmp_path / "hub", folder, [ADAPTER, "adapter_config.json"])
    assert difference("org/name") < 1e-6
    assert load(ModelSource("org/name")).revision == COMMIT


def test_a_base_that_is_not_there(folder: Path) -> None:
    for other, why in (("org/gone", "not on this machine"), ("/no/such/folder", "no model is called")):
        said = refused(named(folder, other))
        assert f"adapter {folder} changes {other}, which cannot be loaded" in said and why in said
        assert "or correct base_model_name_or_path in its adapter_config.json" in said
    assert "names no base model" in refused(named(folder, None))
    assert "it is an adapter itself" in refused(named(folder, str(folder)))


def test_files_of_an_adapter_that_are_damaged(folder: Path, tmp_path: Path) -> None:
    whole = (folder / ADAPTER).read_bytes()
    (folder / ADAPTER).write_bytes(whole[:-10])
    assert f"{folder / ADAPTER} is damaged or truncated" in refused(folder)
    (folder / ADAPTER).unlink()
    assert "has no weights, neither adapter_model.safetensors nor adapter_model.bin" in refused(folder)
    torch.save({"a": Attack(tmp_path / "ran")}, folder / "adapter_model.bin")
    assert "is a pickle that calls posix.mkdir" in refused(folder)
    assert not (tmp_path / "ran").exists()
    (folder / "adapter_config.json").write_text("[")
    assert "adapter_config.json is damaged" in refused(folder)


def test_a_pickled_adapter(folder: Path) -> None:
    torch.save(load_file(folder / ADAPTER), folder / "adapter_model.bin")
    (folder / ADAPTER).unlink()
    assert difference(folder) < 1e-6


def test_weights_that_an_adapter_lacks_or_that_do_not_fit(folder: Path) -> None:
    weights = load_file(folder / ADAPTER)
    first = min(weights)
    save_file({name: weight for name, weight in weights.items() if name != first}, folder / ADAPTER)
    assert f"adapter {folder} lacks 1 of its weights" in refused(folder)
    save_file({**weights, first: torch.zeros(3, 3)}, folder / ADAPTER)
    assert f"the adapter of folder {folder} cannot be loaded" in refused(folder)


def test_an_adapter_of_virtual_tokens(folder: Path) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "peft_type": "PREFIX_TUNING"}))
    assert "adds keys that belong to no token of the prompt" in refused(folder)


def test_a_whole_model_with_an_adapter(folder: Path, base: Path) -> None:
    shutil.copy(folder / "adapter_config.json", base)
    assert "holds a whole model and an adapter" in refused(base)


def test_without_the_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(adapter, "import_module", missing)
    said = refused(folder)
    assert "needs the package peft, which is not installed" in said
    assert 'pip install "kvscope[peft]"' in said
