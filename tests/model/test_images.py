"""Prompts with images: rows are those of eager attention on them, and no image is ever dropped in silence."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kvscope
from kvscope.core.errors import KvscopeError, ModelError, UsageError
from kvscope.core.options import ModelSource
from kvscope.model.loading import load
from kvscope.model.processors import processor_of
from tests.model.tiny import saved as saved_text_model

pytest.importorskip("PIL")
from tests.models.multimodal import PLACES, picture, saved, words

KINDS = ("llava", "qwen2_5_vl", "qwen3_vl", "idefics3")
TOKENS = {"llava": 16, "qwen2_5_vl": 6, "qwen3_vl": 6, "idefics3": 20}  # of a picture of 24 x 16 pixels
ROUNDING = 1e-3  # a float16 weight beside a float32 one
NEW = 6


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("multimodal")
    return {kind: saved(base / kind, kind) for kind in (*KINDS, "gemma3")}


def text_of(kind: str) -> str:
    return f"{words(0, 5)} {PLACES[kind]} {words(9, 6)}"


def lines(folder: Path, *entries: dict[str, Any]) -> Path:
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return file


def traced(model: Path, prompts: Path, **options: Any) -> kvscope.Trace:
    options = {"max_new_tokens": NEW, "output": prompts.parent / "trace", "force": True} | options
    return kvscope.trace(str(model), [prompts], **options)


def refusal(model: Path, prompts: Path, **options: Any) -> str:
    with pytest.raises(KvscopeError) as caught:
        traced(model, prompts, **options)
    assert isinstance(caught.value, (UsageError, ModelError))
    assert len(str(caught.value).splitlines()) == 2
    return str(caught.value)


def eager_rows(folder: Path, ids: torch.Tensor, text: str, images: list[Path]) -> list[np.ndarray]:
    """Return the rows of eager attention in one pass over `ids`, whose images a processor of its own read."""
    from PIL import Image

    loaded = load(ModelSource(str(folder)))
    loaded.model.set_attn_implementation("eager")
    pictures = [Image.open(path).convert("RGB") for path in images]
    inputs = dict(processor_of(loaded, "test")(text=[text], images=[pictures], return_tensors="pt"))
    assert inputs.pop("input_ids")[0].tolist() == ids[0, : inputs["attention_mask"].shape[1]].tolist()
    inputs.pop("attention_mask")
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = (ids == loaded.model.config.image_token_id).int()
    with torch.inference_mode():
        maps = loaded.model(input_ids=ids, use_cache=False, output_attentions=True, **inputs).attentions
    return [one[0].float().numpy() for one in maps]


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_eager_attention(kind: str, images: int, folders: dict[str, Path], tmp_path: Path) -> None:
    files = [picture(tmp_path / f"{n}.png", 24, 16, seed=n) for n in range(images)]
    text = " ".join([text_of(kind)] * images)
    trace = traced(folders[kind], lines(tmp_path, {"prompt": text, "images": [file.name for file in files]}))
    ids = torch.from_numpy(trace.tokens(0)["token_id"].to_numpy().astype("int64"))[None]
    maps = eager_rows(folders[kind], ids, text, files)
    for layer in trace.layers:
        assert np.abs(np.asarray(trace.attention(0, layer)) - maps[layer]).max() < ROUNDING
    model = load(ModelSource(str(folders[kind]))).model
    token = getattr(model.config, "image_token_id", None) or model.config.image_token_index
    found = trace.record.sequences[0].images
    assert [image.tokens for image in found] == [TOKENS[kind]] * images
    inside = torch.zeros(ids.shape[1], dtype=torch.bool)
    for image in found:
        inside[image.start : image.stop] = True
        assert ids[0, image.start] == ids[0, image.stop - 1] == token
    assert not (ids[0][~inside][: trace.sequences[0].prompt] == token).any()
    assert [(span.name, span.start, span.stop) for span in trace.record.sequences[0].spans] == [
        (f"image {n}", image.start, image.stop) for n, image in enumerate(found, 1)
    ]
    assert [(image.width, image.height) for image in found] == [(24, 16)] * images


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_generate(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    from PIL import Image

    file = picture(tmp_path / "a.png", 24, 16)
    trace = traced(folders[kind], lines(tmp_path, {"prompt": text_of(kind), "images": ["a.png"]}))
    loaded = load(ModelSource(str(folders[kind])))
    processor = processor_of(loaded, "test")
    inputs = processor(text=[text_of(kind)], images=[[Image.open(file)]], return_tensors="pt")
    made = loaded.model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[0].tolist()
    assert trace.tokens(0)["token_id"].tolist()[: len(made)] == made


@pytest.mark.parametrize("kind", KINDS)
def test_another_image_changes_the_rows(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    for seed in (0, 1):
        picture(tmp_path / f"{seed}.png", 24, 16, seed)
    entries = [{"prompt": text_of(kind), "images": [f"{seed}.png"]} for seed in (0, 1)]
    trace = traced(folders[kind], lines(tmp_path, *entries), max_new_tokens=0)
    last = trace.layers[-1]
    assert np.abs(np.asarray(trace.attention(0, last)) - np.asarray(trace.attention(1, last))).max() > ROUNDING


def test_a_text_after_an_image_is_read_as_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 48, 32)
    text = {"prompt": words(20, 12)}
    both = traced(folders["qwen2_5_vl"], lines(tmp_path, {"prompt": text_of("qwen2_5_vl"), "images": ["a.png"]}, text))
    alone = traced(folders["qwen2_5_vl"], lines(tmp_path, text), output=tmp_path / "alone")
    assert both.tokens(1)["token_id"].tolist() == alone.tokens(0)["token_id"].tolist()
    for layer in alone.layers:
        np.testing.assert_array_equal(both.attention(1, layer), alone.attention(0, layer))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["path", "url", "image", "image_url"])
def test_images_in_messages(kind: str, name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 24, 16)
    part = {"type": "image", name: "a.png"} if name != "image_url" else {"type": name, name: {"url": "a.png"}}
    message = {"role": "user", "content": [part, {"type": "text", "text": words(0, 4)}]}
    trace = traced(folders[kind], lines(tmp_path, {"messages": [message]}), max_new_tokens=1)
    (image,) = trace.record.sequences[0].images
    assert image.tokens == TOKENS[kind]
    text = "".join(trace.tokens(0)["text"])
    assert text.split()[0] == "w1" and words(0, 4) in text


def test_chat_and_images_of_an_option(folders: dict[str, Path], tmp_path: Path) -> None:
    prompt, image = tmp_path / "p.txt", picture(tmp_path / "a.png", 24, 16)
    prompt.write_text(words(0, 4))
    trace = traced(folders["llava"], prompt, chat=True, images=[image], max_new_tokens=1)
    assert [one.tokens for one in trace.record.sequences[0].images] == [16]
    assert "no place for" in refusal(folders["llava"], prompt, images=[image])
    prompt.write_text(text_of("llava"))
    trace = traced(folders["llava"], prompt, images=[image], max_new_tokens=1)
    assert [one.file for one in trace.record.sequences[0].images] == [str(image)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_forced_continuation(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    file = picture(tmp_path / "a.png", 24, 16)
    entry = {"prompt": text_of(kind) + " ", "images": ["a.png"], "continuation": "w7 w8 w9"}
    trace = traced(folders[kind], lines(tmp_path, entry))
    sequence = trace.record.sequences[0]
    assert (sequence.length - sequence.prompt, sequence.forced) == (3, True)
    ids = torch.from_numpy(trace.tokens(0)["token_id"].to_numpy().astype("int64"))[None]
    maps = eager_rows(folders[kind], ids, text_of(kind), [file])
    for layer in trace.layers:
        assert np.abs(np.asarray(trace.attention(0, layer)) - maps[layer]).max() < ROUNDING


def test_images_that_look_ahead_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    prompts = lines(tmp_path, {"prompt": text_of("gemma3"), "images": ["a.png"]})
    for store in ("maps", "qkv", "topk:8"):
        said = refusal(folders["gemma3"], prompts, store=store)
        assert "lets the tokens of an image attend to later ones" in said and "Gemma3" in said
    text = lines(tmp_path, {"prompt": words(0, 9)})
    assert not traced(folders["gemma3"], text).record.sequences[0].images


def test_what_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 24, 16)
    (tmp_path / "text.png").write_text("no image")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    llava, text = folders["llava"], text_of("llava")

    def said(images: Any, prompt: str = text, **options: Any) -> str:
        return refusal(llava, lines(tmp_path, {"prompt": prompt, "images": images}), **options)

    assert "No such file" in said(["missing.png"])
    assert "not an image that Pillow reads" in said(["text.png"])
    assert "cannot be read" in said(["cut.png"])
    assert "Is a directory" in said(["."])
    assert "is an address, not a file" in said(["https://example.org/a.png"])
    assert "is an address, not a file" in said(["data:image/png;base64,AAAA"])
    assert "images is not a list" in said({"a": 1})
    assert "not named by a path" in said([3])
    assert "1 image and no place for images" in said(["a.png"], words(0, 5))
    assert "2 images and 1 place for images" in said(["a.png", "a.png"])
    assert "1 image and 2 places for images" in said(["a.png"], f"{text} <image>")
    assert "cannot read a prompt in chunks: its images" in said(["a.png"], prefill_chunk=4)
    own = lines(tmp_path, {"prompt": text, "images": ["a.png"]})
    assert "has images of its own" in refusal(llava, own, images=[tmp_path / "a.png"])


def test_more_that_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 24, 16)
    llava, text = folders["llava"], {"type": "text", "text": words(0, 5)}

    def said(content: Any, **beside: Any) -> str:
        return refusal(llava, lines(tmp_path, {"messages": [{"role": "user", "content": content}], **beside}))

    assert "more image(s) than its messages have places for" in said([text], images=["a.png"])
    assert "names no image" in said([{"type": "image"}, text])
    small = saved_text_model(tmp_path / "small")
    prompts = lines(tmp_path, {"prompt": "w1 <image>", "images": ["a.png"]})
    assert "reads text alone" in refusal(small, prompts)
    two = lines(tmp_path, {"prompt": "w1"}, {"prompt": "w2"})
    assert "--image is for one prompt" in refusal(llava, two, images=[tmp_path / "a.png"])


def test_a_model_without_its_processor(folders: dict[str, Path], tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 24, 16)
    prompts = lines(tmp_path, {"prompt": text_of("llava"), "images": ["a.png"]})
    model = Path(shutil.copytree(folders["llava"], tmp_path / "model"))
    for name in ("processor_config.json", "preprocessor_config.json"):
        (model / name).unlink(missing_ok=True)
    assert "has no image processor" in refusal(model, prompts)
    text = lines(tmp_path, {"prompt": words(0, 5)})
    assert traced(model, text).sequences[0].prompt == 5


def test_images_without_text_between_them(folders: dict[str, Path], tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 24, 16)
    picture(tmp_path / "b.png", 32, 24)
    beside = {"images": ["a.png", "b.png"]}
    trace = traced(folders["llava"], lines(tmp_path, {"prompt": "w3 <image> <image> w4", **beside}))
    assert [(one.start, one.stop) for one in trace.record.sequences[0].images] == [(1, 17), (17, 33)]
    one, two = PLACES["qwen3_vl"], "<|image_pad|> <|image_pad|>"
    trace = traced(folders["qwen3_vl"], lines(tmp_path, {"prompt": f"w3 {one} {one}", **beside}))
    assert [(one.start, one.stop) for one in trace.record.sequences[0].images] == [(2, 8), (10, 22)]
    both = lines(tmp_path, {"prompt": f"w3 {one}", "images": ["a.png"]}, {"prompt": f"w3 {two}", **beside})
    said = refusal(folders["qwen3_vl"], both, output=tmp_path / "new")
    assert "fails on the images of prompt" in said and "line 2" in said
    assert not (tmp_path / "new").exists()


def test_a_loaded_model(folders: dict[str, Path], tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 24, 16)
    prompts = lines(tmp_path, {"prompt": text_of("llava"), "images": ["a.png"]})
    loaded = load(ModelSource(str(folders["llava"])))
    made = kvscope.trace((loaded.model, loaded.tokenizer), [prompts], output=tmp_path / "t", max_new_tokens=0)
    assert [one.tokens for one in made.record.sequences[0].images] == [16]
    loaded.model.config.name_or_path = ""
    with pytest.raises(ModelError, match="without a name has no processor"):
        kvscope.trace((loaded.model, loaded.tokenizer), [prompts], output=tmp_path / "u", max_new_tokens=0)


def test_without_pillow(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "a.png", 24, 16)
    prompts = lines(tmp_path, {"prompt": text_of("llava"), "images": ["a.png"]})
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    said = refusal(folders["llava"], prompts)
    assert "need the package Pillow" in said and 'pip install "kvscope[images]"' in said
    assert "reads text alone" in refusal(saved_text_model(tmp_path / "small"), prompts)
    assert traced(folders["llava"], lines(tmp_path, {"prompt": words(0, 5)})).sequences[0].prompt == 5


@pytest.mark.parametrize("kind", ["llava", "idefics3"])
def test_the_processor_that_transformers_chooses(
    kind: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(tmp_path / "a.png", 24, 16)
    prompts = lines(tmp_path, {"prompt": text_of(kind), "images": ["a.png"]})
    known = traced(folders[kind], prompts, output=tmp_path / "known")
    monkeypatch.setattr("kvscope.model.processors.is_torchvision_available", lambda: True)
    chosen = traced(folders[kind], prompts, output=tmp_path / "chosen")
    assert chosen.tokens(0)["token_id"].tolist() == known.tokens(0)["token_id"].tolist()


def test_an_image_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 24, 16)
    trace = traced(folders["llava"], lines(tmp_path, {"prompt": "<image>", "images": ["a.png"]}))
    (image,) = trace.record.sequences[0].images
    assert (image.start, image.stop, trace.sequences[0].prompt) == (0, 16, 16)


def test_huge_images_are_refused(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "a.png", 24, 16)
    prompts = lines(tmp_path, {"prompt": text_of("llava"), "images": ["a.png"]})
    monkeypatch.setattr("kvscope.model.image_files.MOST_PIXELS", 100)
    assert "24 x 16 pixels" in refusal(folders["llava"], prompts)
    monkeypatch.setattr("kvscope.model.image_files.MOST_BYTES", 10)
    assert "has more than" in refusal(folders["llava"], prompts)


def test_a_whole_prompt_read_from_standard_places(folders: dict[str, Path], tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    picture(inner / "a.png", 24, 16)
    trace = traced(folders["llava"], lines(inner, {"prompt": text_of("llava"), "images": "a.png"}), max_new_tokens=0)
    (image,) = trace.record.sequences[0].images
    assert image.file == str(inner / "a.png")


@pytest.mark.parametrize("kind", KINDS)
def test_every_store_holds_the_same_rows(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 24, 16)
    prompts = lines(tmp_path, {"prompt": text_of(kind), "images": ["a.png"]})
    maps = traced(folders[kind], prompts, output=tmp_path / "maps")
    for store in ("qkv", "topk:128"):
        other = traced(folders[kind], prompts, output=tmp_path / store.partition(":")[0], store=store)
        assert other.record.sequences[0].images == maps.record.sequences[0].images
        for layer in maps.layers:
            assert np.abs(other.attention(0, layer) - maps.attention(0, layer)).max() < ROUNDING
