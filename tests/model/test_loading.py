"""Names and loading: every failure has a message of two lines, and no test needs a network.

Two failures would be silent: weights that a checkpoint lacks are random afterwards, and some tokenizers are made
without a vocabulary when their files are missing.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file

from kvscope.core.errors import KvscopeError, ModelError, UsageError
from kvscope.core.options import ModelSource
from kvscope.model import explain, loading, names
from kvscope.model.loading import load
from kvscope.model.names import ALIASES, resolve
from tests.model.tiny import saved

WEIGHTS = "model.safetensors"
QUERY = "model.layers.1.self_attn.q_proj.weight"
COMMIT = "a" * 40


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def refused(source: Path | str, **options: Any) -> str:
    """Return the message with which loading refuses, after a look at its form."""
    with pytest.raises(ModelError) as caught:
        load(ModelSource(str(source), **options))
    assert caught.value.todo
    assert "\n" not in caught.value.what + caught.value.todo
    return str(caught.value)


def test_aliases() -> None:
    assert resolve("llama2-7b") == "meta-llama/Llama-2-7b-hf"
    assert resolve("org/name") == "org/name"
    assert all(alias == alias.lower() and target.count("/") == 1 for alias, target in ALIASES.items())
    with pytest.raises(UsageError, match="no model is called") as caught:
        resolve("lama2-7b")
    assert "llama2-7b" in caught.value.todo


def test_a_name_that_is_nothing_or_a_file(folder: Path) -> None:
    with pytest.raises(UsageError, match="no model is called ''"):
        resolve("")
    with pytest.raises(UsageError, match="is a file") as caught:
        resolve(str(folder / WEIGHTS))
    assert "folder" in caught.value.todo


def test_a_whole_folder(folder: Path) -> None:
    loaded = load(ModelSource(str(folder)))
    assert loaded.source == str(folder)
    assert loaded.context == 64
    assert len(loaded.tokenizer) == 64


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        (["config.json"], "has no config.json"),
        ([WEIGHTS], "has no weights, neither model.safetensors nor pytorch_model.bin"),
        (["tokenizer.json", "tokenizer_config.json"], "the tokenizer of folder"),
    ],
)
def test_files_that_a_folder_lacks(folder: Path, gone: list[str], message: str) -> None:
    for name in gone:
        (folder / name).unlink()
    said = refused(folder)
    assert message in said
    assert f"hf download ORG/NAME --local-dir {folder}" in said


def test_a_tokenizer_without_vocabulary(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    assert "has no vocabulary" in refused(folder)


@pytest.mark.parametrize("size", [0, 5, -500])
def test_weights_that_are_cut_short(folder: Path, size: int) -> None:
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:size])
    assert f"{file} is damaged or truncated" in refused(folder)


@pytest.mark.parametrize("what", ["missing", "of another shape"])
def test_weights_that_would_be_random(folder: Path, capfd: pytest.CaptureFixture[str], what: str) -> None:
    weights = load_file(folder / WEIGHTS)
    weights[QUERY] = weights[QUERY][:16].clone()
    if what == "missing":
        del weights[QUERY]
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    assert f"1 of the weights of folder {folder} are {what}, among them {QUERY}" in refused(folder)
    assert not capfd.readouterr().err, "transformers has its say on stderr"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "not a valid JSON file"),
        ("{}", "model_type"),
        ('{"model_type": "vit"}', "ViTConfig"),
        ('{"model_type": "mamba", "architectures": ["MambaForCausalLM"]}', "type mamba have no attention"),
        ('{"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}', "contains Python code"),
    ],
)
def test_configurations(folder: Path, config: str, message: str) -> None:
    (folder / "config.json").write_text(config)
    assert message in refused(folder)


def test_a_bundled_model_that_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(names, "files", lambda package: tmp_path)
    assert f"the bundled model is missing from {tmp_path / 'demo'}" in refused("demo")


def unanswered(*_: object, **__: object) -> None:
    client = __import__(explain.HttpError.__module__.partition(".")[0])
    raise client.ConnectError("Name or service not known")


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    asked: list[str] = []
    monkeypatch.setattr(loading, "get_hf_file_metadata", lambda url, **_: [asked.append(url), unanswered()])
    monkeypatch.setattr(explain, "is_offline_mode", lambda: False)
    said = refused("llama2-7b")
    assert "meta-llama/Llama-2-7b-hf is not on this machine, and the Hub cannot be reached" in said
    assert "hf download meta-llama/Llama-2-7b-hf" in said
    assert "HF_HOME" in said
    assert len(asked) == 1
    assert not capfd.readouterr().err


def test_a_hub_that_says_no_is_asked_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise answer(HfHubHTTPError)

    monkeypatch.setattr(loading, "get_hf_file_metadata", refuse)
    assert loading.hub_answers("org/name", None)
    monkeypatch.setattr(loading, "get_hf_file_metadata", lambda *_, **__: None)
    assert loading.hub_answers("org/name", None)


def test_offline_mode() -> None:
    said = refused("llama2-7b")
    assert "not on this machine, and HF_HUB_OFFLINE forbids" in said
    assert "Unset HF_HUB_OFFLINE" in said


@pytest.mark.parametrize(
    ("there", "message"),
    [
        (["config.json"], "the tokenizer of model org/name"),
        (["config.json", "tokenizer.json", "tokenizer_config.json"], "the weights of model org/name are not on this"),
    ],
)
def test_a_cache_with_a_part_of_a_model(
    monkeypatch: pytest.MonkeyPatch, whole: Path, tmp_path: Path, there: list[str], message: str
) -> None:
    cached(monkeypatch, tmp_path, whole, there)
    assert message in refused("org/name")


def test_a_cached_model_needs_no_network(monkeypatch: pytest.MonkeyPatch, whole: Path, tmp_path: Path) -> None:
    cached(monkeypatch, tmp_path, whole, [file.name for file in whole.iterdir()])
    loaded = load(ModelSource("org/name"))
    assert loaded.name == loaded.source == "org/name"
    assert loaded.revision == COMMIT


def cached(monkeypatch: pytest.MonkeyPatch, cache: Path, whole: Path, there: list[str]) -> None:
    """Put some files of a model where the Hub's cache has them."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    model = cache / "models--org--name"
    for part in (model / "refs", model / "snapshots" / COMMIT):
        part.mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT)
    for name in there:
        shutil.copy(whole / name, model / "snapshots" / COMMIT)


def answer(kind: type[Exception], text: str = "x") -> Exception:
    made = kind.__new__(kind)
    Exception.__init__(made, text)
    return made


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (answer(GatedRepoError), "is gated"),
        (answer(RepositoryNotFoundError), "on the Hub, or it is private"),
        (answer(LocalEntryNotFoundError), "is not on this machine"),
        (OSError("Max retries exceeded: Name resolution"), "is not on this machine"),
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (ImportError("needs tiktoken"), "needs tiktoken"),
        (ValueError("Unrecognized model"), "cannot be loaded: Unrecognized model"),
    ],
)
def test_what_loading_says(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", fail)
    with pytest.raises(KvscopeError, match=message) as caught:
        load(ModelSource("org/model"))
    assert caught.value.todo


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"version": "1.0"}'),
        ("tokenizer.json", '{"version": "1.0", "model": {"type": "BPE", "vocab": 3}}'),
        ("tokenizer.json", "[1]"),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[1]"),
        ("tokenizer_config.json", '{"tokenizer_class": 3}'),
        ("tokenizer_config.json", '{"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": {"a": 1}}'),
        ("config.json", "{"),
        ("config.json", "[1]"),
        ("config.json", '{"model_type": 3}'),
        ("model.safetensors", "nothing"),
    ],
)
def test_damaged_files_of_a_model(whole: Path, tmp_path: Path, name: str, content: str) -> None:
    """Whatever a library raises for them, a bare exception or a panic, the user reads two lines."""
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    (folder / name).write_text(content)
    with pytest.raises(KvscopeError) as caught:
        load(ModelSource(str(folder)))
    assert caught.value.todo and "\n" not in caught.value.what
