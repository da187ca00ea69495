"""Models in GGUF: written here with the package of llama.cpp, they must be the model they were written from."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kvscope
from kvscope.closed_loop.compile import compile_verify
from kvscope.core.errors import ModelError, UsageError
from kvscope.core.options import ModelSource
from kvscope.model import gguf_file
from kvscope.model.loading import load
from kvscope.model.model_facts import model_facts
from kvscope.model.token_count import token_counter
from tests.model.test_loading import refused
from tests.model.tiny import build, saved, tokens

gguf = pytest.importorskip("gguf")

LETTERS = [chr(ord("a") + n) for n in range(26)]
WORDS = ["<unk>", "<s>", "</s>", "▁", *LETTERS, *(f"▁{letter}" for letter in LETTERS)]
PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOP = {"model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm"}


def written(file: Path, kind: str = "F32") -> Path:
    """Write the tiny Llama as a GGUF file, with matrices in the given type."""
    model, writer = build("llama"), gguf.GGUFWriter(file, "llama")
    _describe(writer, model.config)
    for name, weight in model.state_dict().items():
        array = np.ascontiguousarray(_in_gguf_order(name, weight.numpy(), model.config))
        if array.ndim == 2 and kind != "F32" and array.shape[1] % 32 == 0:  # the size of a block
            as_type = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(_renamed(name), gguf.quants.quantize(array, as_type), raw_dtype=as_type)
        else:
            writer.add_tensor(_renamed(name), array)
    for part in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        part()
    return file


def _describe(writer: Any, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    words = WORDS + [f"<{n}>" for n in range(config.vocab_size - len(WORDS))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([-float(n) for n in range(len(words))])
    writer.add_token_types([2, 3, 3] + [1] * (len(words) - 3))
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _renamed(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in TOP:
        return f"{TOP[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{PARTS[part]}.weight"


def _in_gguf_order(name: str, weight: Any, config: Any) -> Any:
    """Return a weight with the two halves of each rotary head interleaved, as llama.cpp has them."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return weight
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def difference(source: Path) -> float:
    """Return by how much the logits of a file differ from those of the model it was written from."""
    with torch.inference_mode():
        loaded = load(ModelSource(str(source))).model(tokens(12)).logits
        return float((loaded - build("llama")(tokens(12)).logits).abs().max())


@pytest.mark.parametrize(("kind", "most"), [("F32", 0.0), ("F16", 1e-3), ("Q8_0", 0.02), ("Q4_0", 0.4)])
def test_a_file(tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str, most: float) -> None:
    file = written(tmp_path / "tiny.gguf", kind)
    assert difference(file) <= most
    loaded = load(ModelSource(str(file)))
    assert (loaded.source, loaded.quantization) == (str(file), f"gguf {kind}")
    assert loaded.model.dtype == torch.float32
    assert loaded.tokenizer.convert_ids_to_tokens(loaded.tokenizer("a b").input_ids)[-2:] == ["▁a", "▁b"]
    assert not capfd.readouterr().err, "transformers draws no bars"


def test_a_quantised_file_is_not_the_model_itself(tmp_path: Path) -> None:
    assert difference(written(tmp_path / "tiny.gguf", "Q4_0")) > 1e-3


def test_a_folder_with_one_file(tmp_path: Path) -> None:
    written(tmp_path / "tiny.gguf", "Q8_0")
    (tmp_path / "mmproj-tiny.gguf").write_bytes(b"an image encoder")
    assert difference(tmp_path) < 0.02


def test_a_folder_with_several(tmp_path: Path) -> None:
    file = written(tmp_path / "a.gguf")
    shutil.copy(file, tmp_path / "b.gguf")
    said = refused(tmp_path)
    assert f"folder {tmp_path} has 2 .gguf files" in said and f"--model {file}" in said
    assert difference(file) == 0


def test_safetensors_come_before(tmp_path: Path) -> None:
    (saved(tmp_path / "m") / "x.gguf").write_bytes(b"nothing")
    assert load(ModelSource(str(tmp_path / "m"))).quantization is None


@pytest.mark.parametrize("size", [0, 3, 40, 2000, -100])
def test_a_file_that_is_cut_short(tmp_path: Path, size: int) -> None:
    file = written(tmp_path / "tiny.gguf", "Q8_0")
    file.write_bytes(file.read_bytes()[:size])
    assert f"{file} is damaged or truncated" in refused(file)


def test_a_part_of_a_file(tmp_path: Path) -> None:
    file = written(tmp_path / "tiny-00001-of-00002.gguf")
    said = refused(file)
    assert "is one of 2 parts of a model" in said
    assert f"llama-gguf-split --merge {file} {tmp_path / 'tiny.gguf'}" in said


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(gguf_file, "import_module", missing)
    said = refused(written(tmp_path / "tiny.gguf"))
    assert "needs the package gguf, which is not installed" in said
    assert 'pip install "kvscope[gguf]"' in said


def test_a_revision_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no revisions"):
        load(ModelSource(str(written(tmp_path / "tiny.gguf")), revision="main"))


def test_a_trace_of_a_file_and_its_closed_loop(tmp_path: Path) -> None:
    file = written(tmp_path / "tiny.gguf", "Q8_0")
    (tmp_path / "p.txt").write_text("a b c d e f g h i j k l m n")
    trace = kvscope.trace(str(file), [tmp_path / "p.txt"], output=tmp_path / "t", max_new_tokens=4)
    assert trace.header.model.quantization == "gguf Q8_0"
    assert trace.header.model.id == str(file)
    verdicts = compile_verify(trace, ["h2o"], "50%").execute()
    assert verdicts and all(one.decided and one.different == 0 and one.logit_difference < 1e-9 for one in verdicts)


def test_what_needs_no_weights(tmp_path: Path) -> None:
    file = written(tmp_path / "tiny.gguf")
    facts = model_facts(str(file))
    assert (facts.type.name, facts.layers, facts.heads, facts.kv_heads) == ("llama", 2, 4, 2)
    assert token_counter(ModelSource(str(file)))("a b c") == 4


def test_a_file_of_no_model(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"x")
    with pytest.raises(UsageError, match="is a file") as caught:
        load(ModelSource(str(tmp_path / "x.bin")))
    assert ".gguf" in caught.value.todo
    with pytest.raises(ModelError):
        load(ModelSource(str(tmp_path)))
