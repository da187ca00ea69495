"""The attention functions of transformers that a hook calls in its place, and what their modules are."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvscope.core.model_types import ModelConfig


def is_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Return whether a kernel that gets no mask hides later keys, as transformers' kernels decide it."""
    given = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)


def function_of(kernel: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Return the attention function of the kernel called `kernel`, for one module."""
    if kernel == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[no-any-return]  # of a model
    return ALL_ATTENTION_FUNCTIONS[kernel]  # type: ignore[no-any-return]


def layer_and_chunk(module: nn.Module) -> tuple[int, int | None]:
    """Return the number of the layer of an attention module, and the size of the chunks in which it attends, if any."""
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    config: ModelConfig | None = getattr(module, "config", None)
    types = getattr(config, "layer_types", None) or []
    chunked = layer < len(types) and types[layer] == "chunked_attention"
    return layer, getattr(config, "attention_chunk_size", None) if chunked else None
