"""Weights as people have them: in one file or several, pickled, tied, in 16 bits.

Every layout must give the same model, and no pickle may run: one that would is refused before anything in it is made.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import kvscope
from kvscope.core.options import ClosedLoopOptions, ModelSource, OutputOptions
from kvscope.core.recording_options import TextOptions
from kvscope.model.compile import compile_recording
from kvscope.model.loading import load
from tests.model.test_loading import COMMIT, QUERY, WEIGHTS, cached, refused
from tests.model.tiny import build, saved, tokens

PICKLED = "pytorch_model.bin"
FIRST, SECOND = "model-1-of-2.safetensors", "model-2-of-2.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def logits(source: Path, **options: Any) -> torch.Tensor:
    """Return the logits of the model in a folder, loaded as for a trace."""
    model = load(ModelSource(str(source), **options)).model
    with torch.inference_mode():
        return model(tokens(12)).logits  # type: ignore[no-any-return]


def expected(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with torch.inference_mode():
        return build("llama").to(dtype)(tokens(12)).logits  # type: ignore[no-any-return]


def split(folder: Path) -> None:
    """Divide the weights of a folder among two files and an index."""
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    second = {QUERY: weights.pop(QUERY)}
    save_file(weights, folder / FIRST, {"format": "pt"})
    save_file(second, folder / SECOND, {"format": "pt"})
    where = {**dict.fromkeys(weights, FIRST), QUERY: SECOND}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def test_weights_in_several_files(folder: Path) -> None:
    split(folder)
    assert torch.equal(logits(folder), expected())


def test_a_file_of_several_that_is_missing(folder: Path) -> None:
    split(folder)
    (folder / SECOND).unlink()
    said = refused(folder)
    assert f"folder {folder} lacks 1 of the 2 files of its weights, among them {SECOND}" in said
    assert f"hf download ORG/NAME --local-dir {folder}" in said


def test_a_file_of_several_that_is_damaged(folder: Path) -> None:
    split(folder)
    file = folder / SECOND
    file.write_bytes(file.read_bytes()[:-10])
    assert f"{file} is damaged or truncated" in refused(folder)


def test_a_weight_that_the_index_names_and_no_file_has(folder: Path) -> None:
    split(folder)
    save_file({"other": torch.zeros(1)}, folder / SECOND, {"format": "pt"})
    assert f"1 of the weights of folder {folder} are missing, among them {QUERY}" in refused(folder)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": {}}',
        '{"metadata": {}, "weight_map": []}',
        '{"metadata": {}, "weight_map": {"a": 3}}',
    ],
)
def test_an_index_that_is_damaged(folder: Path, text: str) -> None:
    split(folder)
    (folder / f"{WEIGHTS}.index.json").write_text(text)
    assert "model.safetensors.index.json is damaged" in refused(folder)


def test_weights_of_another_name(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "consolidated.safetensors")
    assert "nor an index of several files, only consolidated.safetensors" in refused(folder)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_weights(tmp_path: Path, zipped: bool) -> None:
    folder = saved(tmp_path / "m", safe=False)
    torch.save(build("llama").state_dict(), folder / PICKLED, _use_new_zipfile_serialization=zipped)
    assert torch.equal(logits(folder), expected())


def test_pickled_weights_in_several_files(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", safe=False)
    (folder / PICKLED).unlink()
    weights = build("llama").state_dict()
    second = {QUERY: weights.pop(QUERY)}
    torch.save(weights, folder / "pytorch_model-1.bin")
    torch.save(second, folder / "pytorch_model-2.bin")
    where = {**dict.fromkeys(weights, "pytorch_model-1.bin"), QUERY: "pytorch_model-2.bin"}
    (folder / f"{PICKLED}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert torch.equal(logits(folder), expected())
    (folder / "pytorch_model-2.bin").unlink()
    assert "lacks 1 of the 2 files of its weights, among them pytorch_model-2.bin" in refused(folder)


def test_safetensors_are_preferred(folder: Path) -> None:
    (folder / PICKLED).write_bytes(b"nothing")
    (folder / "training_args.bin").write_bytes(b"nothing")
    assert torch.equal(logits(folder), expected())


class Attack:
    """An object whose pickle calls a function when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["alone", "in a part"])
def test_a_pickle_never_runs(tmp_path: Path, zipped: bool, where: str) -> None:
    folder, mark = saved(tmp_path / "m", safe=False), tmp_path / "ran"
    file = folder / PICKLED
    weights = {**build("llama").state_dict(), "harmless": Attack(mark)}
    if where == "in a part":
        file.unlink()
        file = folder / "pytorch_model-1.bin"
        (folder / f"{PICKLED}.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, file.name)})
        )
    torch.save(weights, file, _use_new_zipfile_serialization=zipped)
    said = refused(folder)
    assert not mark.exists()
    assert f"{file} is a pickle that calls posix.mkdir" in said and "was not loaded" in said
    torch.load(file, weights_only=False)
    assert mark.exists(), "the pickle would have run"


@pytest.mark.parametrize("size", [0, 5, 100, -500])
def test_pickled_weights_that_are_cut_short(tmp_path: Path, size: int) -> None:
    file = saved(tmp_path / "m", safe=False) / PICKLED
    file.write_bytes(file.read_bytes()[:size])
    assert f"{file} is damaged" in refused(file.parent)


def test_a_pickle_of_something_else(tmp_path: Path) -> None:
    file = saved(tmp_path / "m", safe=False) / PICKLED
    file.write_bytes(b"\x80\x04\x95nothing")
    assert f"{file} is damaged, or contains something other than tensors" in refused(file.parent)


def test_a_cached_model_with_pickled_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path / "m", safe=False)
    cached(monkeypatch, tmp_path, folder, [file.name for file in folder.iterdir()])
    loaded = load(ModelSource("org/name"))
    assert (loaded.source, loaded.revision) == ("org/name", COMMIT)
    with torch.inference_mode():
        assert torch.equal(loaded.model(tokens(12)).logits, expected())
    assert not capfd.readouterr().err


def test_a_cached_model_with_a_pickle_that_calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder, mark = saved(tmp_path / "m", safe=False), tmp_path / "ran"
    torch.save({"a": Attack(mark)}, folder / PICKLED)
    cached(monkeypatch, tmp_path, folder, [file.name for file in folder.iterdir()])
    assert "is a pickle that calls posix.mkdir" in refused("org/name")
    assert not mark.exists()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_tied_weights(tmp_path: Path, kind: str) -> None:
    """A tied output layer is in no file, and is not a missing weight."""
    folder = saved(tmp_path / "m")
    sizes: dict[str, Any] = {"vocab_size": 64, "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": None}
    torch.manual_seed(0)
    if kind == "llama":
        config = LlamaConfig(**sizes, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
        model: Any = LlamaForCausalLM(config)
    else:
        model = GPT2LMHeadModel(GPT2Config(**sizes, n_embd=32, n_layer=2, n_head=4))
    model.eval().save_pretrained(folder)
    assert "lm_head.weight" not in load_file(folder / WEIGHTS)
    loaded = load(ModelSource(str(folder))).model
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    with torch.inference_mode():
        assert torch.equal(loaded(tokens(12)).logits, model(tokens(12)).logits)


def test_bfloat16_on_a_cpu(folder: Path) -> None:
    """Loaded in bfloat16 a model computes in it; by default its weights become float32, which holds them exactly."""
    exact, half = build("llama"), build("llama").to(torch.bfloat16)
    half.save_pretrained(folder)
    half.model.rotary_emb.inv_freq = exact.model.rotary_emb.inv_freq  # no weight: transformers keeps it in float32
    for parameter in exact.parameters():
        parameter.data = parameter.data.bfloat16().float()
    for dtype, model in (("bfloat16", half), ("auto", exact)):
        loaded = load(ModelSource(str(folder), dtype=dtype)).model
        assert loaded.dtype == model.dtype
        with torch.inference_mode():
            assert torch.equal(loaded(tokens(12)).logits, model(tokens(12)).logits)


def test_a_trace_and_a_closed_loop_in_bfloat16(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text(" ".join(f"w{n * 7 % 63 + 1}" for n in range(20)))
    options: dict[str, Any] = {"dtype": "bfloat16", "max_new_tokens": 4}
    trace = kvscope.trace(str(folder), [tmp_path / "p.txt"], output=tmp_path / "t", **options)
    assert trace.header.model.dtype == "bfloat16" and trace.header.vector_dtype == "bfloat16"
    closed = ClosedLoopOptions(dtype="bfloat16")
    replay = kvscope.replay(trace, ["h2o"], "100%,50%", output=tmp_path / "r", closed=closed)
    kept, evicted = (frame for _, frame in replay.tokens().groupby("run"))
    assert len(kept) == len(evicted) == 4
    assert kept["kl"].max() < min(1e-4, evicted["kl"].max()), "rounding of bfloat16 alone, where nothing is evicted"


def test_generation_settings_that_are_ignored_are_said_once(folder: Path, tmp_path: Path) -> None:
    settings = {"num_beams": 4, "repetition_penalty": 1.3, "forced_eos_token_id": 5, "no_repeat_ngram_size": 0}
    prompts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for prompt in prompts:
        prompt.write_text("w1 w2 w3 w4 w5")
    output, text = OutputOptions(tmp_path / "t"), TextOptions(max_new_tokens=3)
    before = compile_recording(ModelSource(str(folder)), prompts, output, text=text)
    assert before.notes == ()
    (folder / "generation_config.json").write_text(json.dumps(settings))
    plan = compile_recording(ModelSource(str(folder)), prompts, output, text=text)
    assert plan.notes == (
        "the model's generation settings num_beams=4, repetition_penalty=1.3, forced_eos_token_id=5 are ignored: "
        "tokens are chosen by their logits alone",
    )
    ignoring = plan.execute().tokens(0)["token_id"].tolist()
    (folder / "generation_config.json").write_text("{}")
    plain = compile_recording(ModelSource(str(folder)), prompts, OutputOptions(tmp_path / "u"), text=text)
    assert plain.execute().tokens(0)["token_id"].tolist() == ignoring
