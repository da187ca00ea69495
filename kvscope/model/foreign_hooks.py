"""A model and transformers as they were, after another library has put hooks into them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvscope.core.errors import ModelError
from kvscope.core.model_types import CausalModel


@contextmanager
def attention_functions_as_before() -> Iterator[None]:
    """Restore transformers' registry of attention functions on exit: a library may replace them when it is imported."""
    own, shared = dict(ALL_ATTENTION_FUNCTIONS._local_mapping), dict(ALL_ATTENTION_FUNCTIONS._global_mapping)
    try:
        yield
    finally:
        # The registry has no method to restore it, and other modules hold these mappings: they are changed in place.
        for mapping, before in ((ALL_ATTENTION_FUNCTIONS._local_mapping, own), (_shared_mapping(), shared)):
            mapping.clear()
            mapping.update(before)


@contextmanager
def modules_as_before(model: nn.Module) -> Iterator[None]:
    """Remove, on exit, every attribute and submodule that was added to a module of the model."""
    before = [(module, set(vars(module)), set(module._modules)) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes, parts in before:
            for name in [*(set(vars(module)) - attributes), *(set(module._modules) - parts)]:
                delattr(module, name)


@contextmanager
def attention_kernel(model: CausalModel, kernel: str) -> Iterator[None]:
    """Let the model use another of transformers' attention kernels: ``sdpa``, or ``eager``, which returns the rows."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    chosen = [config for config in configs.values() if hasattr(config, "_attn_implementation_internal")]
    before = [(config, config._attn_implementation) for config in chosen]
    try:
        for config in chosen:
            config._attn_implementation_internal = kernel
        yield
    finally:
        for config, own in before:
            config._attn_implementation_internal = own


def attention_modules(model: CausalModel) -> dict[int, nn.Module]:
    """Return ``model.model.layers[..].self_attn`` by layer number: the modules into which libraries put their hooks.

    Raises
    ------
    ModelError
        If the model has no such modules.
    """
    inside = getattr(model, "model", None)
    layers = getattr(getattr(inside, "language_model", inside), "layers", ())
    found = [module for layer in layers if isinstance(module := getattr(layer, "self_attn", None), nn.Module)]
    if not found or len(found) < len(layers) or not all(hasattr(module, "layer_idx") for module in found):
        raise ModelError(
            f"{type(model).__name__} has no attention modules at model.layers[..].self_attn, where presses are put",
            "Use another model, such as a Llama, Mistral, Qwen or Phi, or policies of kvscope.",
        )
    return {int(module.layer_idx): module for module in found}  # type: ignore[arg-type]  # a number


def _shared_mapping() -> dict[str, object]:
    mapping: dict[str, object] = ALL_ATTENTION_FUNCTIONS._global_mapping
    return mapping
