"""Why the attention calls of a model cannot be observed, where they cannot."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch import nn

from kvscope.core.errors import ModelError
from kvscope.core.model_types import CausalModel, ModelConfig

INDEXED = ("index_topk", "index_topk_blocks", "indexer_budget")  # fields of configurations with a learned index
# Types of transformers 5 with attention code of their own: their modules return rows only with eager attention.
OWN_CODE = frozenset(
    "big_bird bloom codegen cpmant falcon fuyu git gpt_neo gpt_neox_japanese gptj megatron-bert mpt mvp openai-gpt "
    "prophetnet rembert roformer trocr xglm".split()
)
NO_ATTENTION = frozenset("falcon_mamba mamba mamba2 rwkv xlstm".split())
# Types that do not continue a text token by token from cached keys and values, and what they do.
OTHER_MODELS = {
    **dict.fromkeys(
        ("musicgen", "musicgen_melody"), "turn a text into audio codes, several in each step, and continue no text"
    ),
    "diffusion_gemma": "write blocks of tokens by diffusion, in which a token sees later ones too",
    "pi0": "turn images and a text into movements of a robot, and continue no text",
    "shieldgemma2": "classify images, and continue no text",
    "reformer": "attend in hashed and local chunks and cache layer inputs, so there are no keys and values to evict",
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"),
        "draft tokens for another model, whose cache they read, and have no cache of their own",
    ),
}
SEVERAL_CALLS = frozenset({"diffllama"})  # types whose attention is the difference of two calls


def require_type(config: ModelConfig) -> None:
    """Raise ModelError for a type of models that no trace can be made of, whatever its weights are."""
    kind = config.model_type
    if kind in NO_ATTENTION:
        raise ModelError(
            f"models of type {kind} have no attention, so there is no cache to evict from",
            "Trace a model with attention; kvscope models lists the types.",
        )
    if kind in OTHER_MODELS:
        other = "the model that it drafts for" if kind.endswith("_assistant") else "a decoder of text"
        raise ModelError(
            f"models of type {kind} {OTHER_MODELS[kind]}", f"Trace {other}; kvscope models lists the types."
        )
    if getattr(config, "default_language", "") is None:
        languages = ", ".join(config.languages[:3]) + (", ..." if len(config.languages) > 3 else "")
        raise ModelError(
            f"the configuration of this {kind} model does not give the language of the text",
            f"Set default_language in its config.json to one of its languages: {languages}",
        )


def require_registry(model: nn.Module) -> None:
    """Raise ModelError if the model does not look up its attention function in transformers' registry.

    Models with indexed sparse attention are refused too: they apply the index only if the selected kernel has one of
    transformers' names, and would silently run dense attention here.
    """
    refuse_encoder_decoder(model)
    why = obstacle(model)
    if why:
        raise ModelError(
            f"{why}, so policies cannot run inside its attention",
            "Replay its trace in the open loop: kvscope replay without --perplexity.",
        )


def refuse_encoder_decoder(model: nn.Module) -> None:
    """Raise ModelError for a model with an encoder, whose cross-attention is not traced."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ModelError(
            f"{type(model).__name__} is an encoder-decoder, whose cross-attention is not traced",
            "Trace a decoder-only model.",
        )


def language_model(model: CausalModel) -> CausalModel:
    """Return the part of a multimodal model that reads tokens, without its image encoder; another model itself."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_decoder"):
        return model
    text = config.get_text_config(decoder=True)
    decoder = model.get_decoder()
    return decoder if text is not config and getattr(decoder, "config", None) is text else model


def obstacle(model: CausalModel) -> str:
    """Return why the attention calls of a model cannot be observed; empty if they can.

    Models with indexed sparse attention apply the index only if the selected kernel has one of transformers' names, and
    would silently run dense attention here.
    """
    name = type(model).__name__
    parts = list(model.modules())  # once: a walk over a large model takes milliseconds
    sources = {sys.modules[kind.__module__] for kind in set(map(type, parts))}
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in OWN_CODE or not any(hasattr(source, "ALL_ATTENTION_FUNCTIONS") for source in sources):
        return f"{name} does not use transformers' attention registry but code of its own"
    config = model.config.get_text_config(decoder=True) if hasattr(model, "config") else None
    if is_indexed(model):
        return f"{name} reads its cache through a learned index"
    if getattr(config, "rel_extent", None) is not None:
        return f"{name} adds a position bias to its logits"
    language = language_model(model)
    inner = parts if language is model else list(language.modules())
    if any(getattr(part, "layer_idx", 0) in (None, -1) for part in _attention_modules(inner, config)):
        return f"{name} shares its attention modules between layers"
    if getattr(config, "model_type", None) in SEVERAL_CALLS:
        return f"{name} calls attention several times in a layer"
    return ""


def _attention_modules(parts: Sequence[nn.Module], config: ModelConfig) -> list[nn.Module]:
    """Return the attention modules among those of a language model; other modules may have a number too."""
    return [part for part in parts if hasattr(part, "is_causal") and getattr(part, "config", None) is config]


def is_indexed(model: CausalModel) -> bool:
    """Return whether a learned index of the model chooses the keys that a query sees."""
    config = model.config.get_text_config(decoder=True) if hasattr(model, "config") else None
    return any(getattr(config, field, None) is not None for field in INDEXED)
