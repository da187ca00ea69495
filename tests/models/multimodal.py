"""Tiny random multimodal models with processors of their own: one token for each word, small images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvscope.model.processors import without_videos
from tests.models.build import build

pytest.importorskip("PIL")
from PIL import Image

WORDS = 100
PLACES = {
    "llava": "<image>",
    "qwen2_5_vl": "<|vision_start|> <|image_pad|> <|vision_end|>",
    "qwen3_vl": "<|vision_start|> <|image_pad|> <|vision_end|>",
    "gemma3": "<start_of_image>",
    "idefics3": "<image>",
}
CHAT = (
    "{% for m in messages %}w1 {% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}PLACE {% else %}{{ p['text'] }} {% endif %}{% endfor %}{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}w2{% endif %}"
)


def words(first: int, count: int) -> str:
    """Return words of the vocabulary."""
    return " ".join(f"w{(7 * number) % 90 + 3}" for number in range(first, first + count))


def picture(path: Path, width: int = 16, height: int = 16, seed: int = 0) -> Path:
    """Write a picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def saved(folder: Path, kind: str) -> Path:
    """Return a folder with a tiny model of a type, its tokenizer and its processor."""
    model = build(kind)
    special = _special(kind, model.config)
    model.save_pretrained(folder)
    _processor(kind, _tokenizer(special), model.config).save_pretrained(folder)
    return folder


def _tokenizer(special: dict[str, int]) -> PreTrainedTokenizerFast:
    vocabulary = {f"w{index}": index for index in range(WORDS)} | special
    for free in set(range(128)) - set(vocabulary.values()):
        vocabulary[f"x{free}"] = free
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    extra = {"image_token": next(iter(special))}
    if "<start_of_image>" in special:
        extra |= {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="w0", pad_token="w0", extra_special_tokens=extra
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)}, replace_extra_special_tokens=False)
    return tokenizer


def _special(kind: str, config: Any) -> dict[str, int]:
    """Return the special tokens of a type, that of images first."""
    image = getattr(config, "image_token_id", None) or config.image_token_index
    if kind.startswith("qwen"):
        numbers = (image, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id)
        names = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
        return dict(zip(names, numbers, strict=True))
    free = [number for number in range(WORDS, 128) if number not in (image, 127)]
    names = {
        "gemma3": ("<image_soft_token>", "<start_of_image>", "<end_of_image>"),
        "idefics3": ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"),
    }.get(kind, ("<image>",))
    return dict(zip(names, [image, *free], strict=False))


def _processor(kind: str, tokenizer: Any, config: Any) -> Any:
    chat = CHAT.replace("PLACE", PLACES[kind])
    if kind == "llava":
        made = transformers.CLIPImageProcessorPil(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, do_center_crop=True
        )
        strategy = config.vision_feature_select_strategy
        return transformers.LlavaProcessor(
            made,
            tokenizer,
            patch_size=4,
            vision_feature_select_strategy=strategy,
            num_additional_image_tokens=1,
            chat_template=chat,
        )
    if kind.startswith("qwen"):
        pixels = 4 * 4 * 4
        made = transformers.Qwen2VLImageProcessorPil(
            size={"shortest_edge": pixels, "longest_edge": pixels * 30}, patch_size=4, merge_size=2
        )
        known = transformers.Qwen3VLProcessor if kind == "qwen3_vl" else transformers.Qwen2_5_VLProcessor
        return without_videos(known)(made, tokenizer, chat_template=chat)
    if kind == "gemma3":
        made = transformers.Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
        return transformers.Gemma3Processor(
            made, tokenizer, image_seq_length=config.mm_tokens_per_image, chat_template=chat
        )
    made = transformers.Idefics3ImageProcessorPil(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 16}, do_image_splitting=True
    )
    length = (16 // 4) ** 2 // config.scale_factor**2
    return transformers.Idefics3Processor(made, tokenizer, image_seq_len=length, chat_template=chat)
