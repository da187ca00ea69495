"""Tiny random models of every causal and image-text type of transformers, made from shrunk configurations.

A type's configuration is built with its defaults, then every number that decides how large the model is gets a small
value: by the name of the field where types agree on it, by a table of the type where they do not.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    EvollaForProteinText2Text,
    MusicgenForConditionalGeneration,
    MusicgenMelodyForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.utils import is_timm_available

from tests.models.shrink import ALWAYS, BY_TYPE, FIRST, LAYERS, MROPE, PER_LAYER, ROPE, SIZES, per_layer

VOCABULARY = 128
SHARP = ("q_proj", "k_proj", "query", "qkv", "c_attn", "q_b_proj", "kv_b_proj", "key.", "in_proj")

CAUSAL = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
IMAGE_TEXT = tuple(name for name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if name not in CAUSAL)
TYPES = CAUSAL + IMAGE_TEXT
# Types whose published models are of a class that the automatic classes do not give for a whole configuration.
WHOLE = {
    "evolla": EvollaForProteinText2Text,
    "musicgen": MusicgenForConditionalGeneration,
    "musicgen_melody": MusicgenMelodyForConditionalGeneration,
}

# Types whose models transformers 5.23 cannot build: it refuses layers that all read the cache of another model.
NOT_BUILT = ("gemma4_assistant", "gemma4_unified_assistant")
TIMM = ("timm_wrapper", "gemma3n_vision")  # image encoders that need the package timm


def needs_timm(name: str) -> bool:
    """Return whether a type has an image encoder of the package timm, by its defaults."""
    vision = getattr(CONFIG_MAPPING[name](**FIRST.get(name, {})), "vision_config", None)
    return getattr(vision, "model_type", None) in TIMM


@contextmanager
def without_timm() -> Iterator[None]:
    """Build image encoders of timm without weights where it is not installed: they take no part in texts."""
    known = AutoModel._model_mapping._extra_content
    configs = [] if is_timm_available() else [CONFIG_MAPPING[name] for name in TIMM]
    for config in configs:
        known[config] = type("NoImages", (PreTrainedModel,), {"config_class": config})
    try:
        yield
    finally:
        for config in configs:
            del known[config]


def shrunk(config: PreTrainedConfig, kind: str | None = None) -> PreTrainedConfig:
    """Return a configuration of the same type with small sizes; what follows from sizes is derived again."""
    own = BY_TYPE.get(kind or config.model_type, {})
    settings: dict[str, Any] = {}
    for field, value in config.__dict__.items():
        if isinstance(value, PreTrainedConfig):
            settings[field] = shrunk(value)
        elif field in own or field.startswith("_"):
            continue
        elif field in SIZES and (value is not None or field in ALWAYS):
            many = isinstance(value, (list, tuple)) and isinstance(SIZES[field], int) and not field.endswith("_id")
            settings[field] = [SIZES[field]] * (LAYERS if field in PER_LAYER else len(value)) if many else SIZES[field]
        elif (shorter := per_layer(field, value)) is not value:
            settings[field] = shorter
    if settings.get("kv_lora_rank") and "num_key_value_heads" in settings:
        settings["num_key_value_heads"] = settings["num_attention_heads"]  # latent attention has keys for every head
    if config.model_type in MROPE:
        given = config.__dict__.get("rope_parameters") or ROPE
        settings["rope_parameters"] = {**given, "mrope_section": MROPE[config.model_type]}
    return type(config)(**{**settings, **own})


def config_of(name: str) -> PreTrainedConfig:
    """Return the shrunk configuration of a type."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return shrunk(CONFIG_MAPPING[name](**FIRST.get(name, {})))


def build(name: str) -> Any:
    """Return a random model of a type in eval mode, the same every time, with attention that tells keys apart."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    auto = AutoModelForImageTextToText if name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES else AutoModelForCausalLM
    config = config_of(name)
    torch.manual_seed(0)
    model = (WHOLE[name]._from_config(config) if name in WHOLE else auto.from_config(config)).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in parameter_name:  # so that layers matter beside the residual stream
                parameter *= 8 if any(part in parameter_name for part in SHARP) else 4
            if parameter_name.endswith(("sinks", "sink")):
                parameter.normal_()
    return model


def saved(folder: Path, name: str) -> Path:
    """Return a folder with a tiny model of a type, and a tokenizer of one token for each word."""
    if name in NOT_BUILT:
        config_of(name).save_pretrained(folder)
        save_file({"lm_head.weight": torch.zeros(VOCABULARY, 32)}, folder / "model.safetensors")
    else:
        build(name).save_pretrained(folder)
    words = {f"w{index}": index for index in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", pad_token="w0").save_pretrained(folder)
    if len(AutoTokenizer.from_pretrained(folder)("w5 w6").input_ids) < 2:  # the type has a tokenizer of its own: BPE
        letters = {letter: index for index, letter in enumerate(["<none>", *"w0123456789", "\u0120"])}
        tokenizer = Tokenizer(models.BPE(letters, [], unk_token="<none>"))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<none>").save_pretrained(folder)
    return folder
