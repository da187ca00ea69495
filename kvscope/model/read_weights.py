"""Read the weights of a model with transformers, and refuse what it would fill with random numbers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, TypeAlias

import torch
import transformers
from huggingface_hub import snapshot_download
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    GenerationMixin,
    PreTrainedModel,
)

from kvscope.core.errors import ModelError
from kvscope.core.model_types import CausalModel, ModelConfig
from kvscope.model.explain import kind, lacks_safetensors
from kvscope.model.weight_files import CONFIG, PICKLED, require_files

Loader: TypeAlias = type[AutoModelForCausalLM] | type[AutoModelForMultimodalLM] | type[PreTrainedModel]


def loader_of(config: ModelConfig) -> Loader:
    """Return the class of transformers that loads a model whose language model can be traced on text."""
    if type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING:
        whole = str(getattr(MODEL_FOR_MULTIMODAL_LM_MAPPING[type(config)], "__name__", ""))
        alone = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
        causal = alone and whole not in (getattr(config, "architectures", None) or ())
        return AutoModelForCausalLM if causal else AutoModelForMultimodalLM
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    return _named_class(config) or AutoModelForCausalLM


def _named_class(config: ModelConfig) -> type[PreTrainedModel] | None:
    """Return the class with a language model that a configuration names, of a type that no automatic class knows."""
    for name in getattr(config, "architectures", None) or ():
        named = getattr(transformers, name, None)
        if isinstance(named, type) and issubclass(named, GenerationMixin) and issubclass(named, PreTrainedModel):
            return named if named.config_class is type(config) else None
    return None


def without_weights(config: ModelConfig) -> CausalModel:
    """Return the model of a configuration, built without memory."""
    loader = loader_of(config)
    with torch.device("meta"):
        build = loader._from_config if issubclass(loader, PreTrainedModel) else loader.from_config
        return build(config)  # type: ignore[no-untyped-call]


def read_model(source: str, loader: type[Any], safe: bool, options: dict[str, Any]) -> CausalModel:
    """Return the model; raises ModelError for missing weights, which transformers would fill with random numbers.

    A model of the Hub that has no safetensors is read from its pickled files, after the check that local ones pass.
    """
    try:
        model, info = _read(source, loader, safe, options)
    except OSError as error:
        if not safe or not lacks_safetensors(error):
            raise
        folder = _pickled_snapshot(source, options)
        if folder is None:
            raise
        model, info = _read(str(folder), loader, require_files(folder), options)
    missing = set(info["missing_keys"]).intersection(name for name, _ in model.named_parameters())
    for names, what in (({name for name, *_ in info["mismatched_keys"]}, "of another shape"), (missing, "missing")):
        if names:
            raise ModelError(
                f"{len(names)} of the weights of {kind(source)} {source} are {what}, among them {min(names)}",
                "Download it again, or name the model whose weights were saved.",
            )
    return model


def _pickled_snapshot(source: str, options: dict[str, Any]) -> Path | None:
    """Return the folder of the cache with the pickled weights of a Hub model; None if it has none."""
    name = PICKLED.partition(".")[0]
    revision, offline = options["revision"], options["local_files_only"]
    files = [CONFIG, f"{name}*"]
    folder = Path(snapshot_download(source, revision=revision, allow_patterns=files, local_files_only=offline))
    return folder if any(folder.glob(f"{name}*.bin")) else None


def _read(source: str, loader: type[Any], safe: bool, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the model as transformers loads it, and what it says about its weights."""
    log = logging.getLogger("transformers.modeling_utils")
    before, log.disabled = log.disabled, True  # it logs a table of every missing weight
    try:
        return loader.from_pretrained(  # type: ignore[no-any-return]
            source,
            use_safetensors=safe,
            weights_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    finally:
        log.disabled = before
