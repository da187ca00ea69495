"""Models of known shapes with random weights: time and memory depend on the shape alone."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvscope.model.loading import Loaded

SHAPES: dict[str, dict[str, Any]] = {
    "llama2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    },
    "llama3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
    },
    "100m": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "vocab_size": 16000,
        "max_position_embeddings": 8192,
    },
    "thin": {  # as many layers as 7B has, and next to nothing to compute
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 64,
        "max_position_embeddings": 4096,
    },
    "tiny": {  # to try a benchmark out: its figures mean nothing
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "max_position_embeddings": 1024,
    },
}


def random_model(shape: str, device: str) -> Any:
    """Return a model of a known shape, made on the device: in bfloat16 on a GPU, in float32 on a CPU."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(usual if device == "cpu" else torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(LlamaConfig(**SHAPES[shape])).eval()
    finally:
        torch.set_default_dtype(usual)


def random_loaded(shape: str, device: str) -> Loaded:
    """Return the same model as a loaded one, without a tokenizer."""
    return Loaded(random_model(shape, device), None, f"random {shape}", "made here", None)
