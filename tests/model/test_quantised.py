"""Quantised weights: what this machine can load is compared with the model, the rest says what to install."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import kvscope
from kvscope.core.errors import UsageError
from kvscope.core.options import ModelSource
from kvscope.model import quantised
from kvscope.model.loading import load
from tests.model.test_loading import WEIGHTS, refused
from tests.model.tiny import build, saved, tokens

BLOCK = 16


def with_config(folder: Path, config: dict[str, Any]) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": config}))
    return folder


@pytest.fixture
def fp8(tmp_path: Path) -> Path:
    """The tiny model with its projections in 8-bit floats and one scale for each block."""
    folder, stored = saved(tmp_path / "m"), {}
    for name, weight in load_file(folder / WEIGHTS).items():
        stored[name] = weight
        if "proj" in name:
            scale = float(weight.abs().max()) / 448
            stored[name] = (weight / scale).to(torch.float8_e4m3fn)
            blocks = [-(-size // BLOCK) for size in weight.shape]
            stored[name.replace(".weight", ".weight_scale_inv")] = torch.full(blocks, scale)
    save_file(stored, folder / WEIGHTS, {"format": "pt"})
    return with_config(folder, {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]})


@pytest.mark.parametrize("dtype", ["auto", "float64", "bfloat16"])
def test_fp8(fp8: Path, dtype: str) -> None:
    loaded = load(ModelSource(str(fp8), dtype=dtype))
    assert loaded.quantization == "fp8"
    assert len({parameter.dtype for parameter in loaded.model.parameters()}) == 1
    with torch.inference_mode():
        difference = float((loaded.model(tokens(12)).logits - build("llama")(tokens(12)).logits).abs().max())
    assert 1e-4 < difference < 0.05, "rounding to 8 bits, and no more"


def test_a_trace_says_it(fp8: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("w1 w2 w3 w4 w5")
    trace = kvscope.trace(str(fp8), [tmp_path / "p.txt"], output=tmp_path / "t", max_new_tokens=2)
    assert trace.header.model.quantization == "fp8"


@pytest.mark.parametrize(
    ("config", "method", "package"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 32}, "gptq 4bit", "optimum"),
        ({"quant_method": "awq", "bits": 4, "group_size": 32}, "awq 4bit", "gptqmodel"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes 4bit", "bitsandbytes"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "compressed-tensors", "compressed-tensors"),
    ],
)
def test_packages_that_are_missing(tmp_path: Path, config: dict[str, Any], method: str, package: str) -> None:
    pytest.importorskip("accelerate")
    if quantised.find_spec(package.replace("-", "_")):
        pytest.skip(f"{package} is installed")
    folder = with_config(saved(tmp_path / "m"), config)
    said = refused(folder)
    assert f"the weights of folder {folder} are quantised by {method}, which needs {package}: not installed" in said
    assert f'pip install "{package}' in said


@pytest.mark.parametrize(("config", "named"), [({"quant_method": "zzz"}, "zzz"), ({"bits": 4}, "without a name")])
def test_methods_that_nobody_knows(tmp_path: Path, config: dict[str, Any], named: str) -> None:
    said = refused(with_config(saved(tmp_path / "m"), config))
    assert named in said and "which transformers does not support" in said


def test_quantize_needs_cuda_and_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path / "m")
    assert "--quantize 4bit needs a CUDA device, and this is cpu" in refused(folder, quantize="4bit")
    with pytest.raises(UsageError, match="'3bit' is unknown"):
        load(ModelSource(str(folder), quantize="3bit"))
    with pytest.raises(UsageError, match="does not compute in float64"):
        load(ModelSource(str(folder), quantize="8bit", dtype="float64"))
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    with pytest.raises(quantised.ModelError, match="needs the package bitsandbytes") as caught:
        quantised.require_quantize("4bit", torch.device("cuda"), "auto")
    assert "pip install bitsandbytes accelerate" in caught.value.todo


def test_what_is_asked_of_transformers() -> None:
    device = torch.device("cuda", 1)
    for choice, four in (("4bit", True), ("8bit", False)):
        made: Any = quantised.quantize_arguments(choice, device)
        assert made["device_map"] == {"": device}
        assert (made["quantization_config"].load_in_4bit, made["quantization_config"].load_in_8bit) == (four, not four)
        assert quantised.at_loading(quantised.AT_LOADING.format(choice)) == choice
    assert quantised.at_loading("bitsandbytes 4bit") is quantised.at_loading(None) is None


def test_a_quantised_model_is_not_quantised_again(fp8: Path) -> None:
    config = load(ModelSource(str(fp8))).model.config
    config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(UsageError, match="is quantised already, by fp8"):
        quantised.stored_quantization(str(fp8), config, "4bit")
