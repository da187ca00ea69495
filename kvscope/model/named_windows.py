"""The sliding windows that a configuration names: for a model that has not run, and for rows of modules."""

from __future__ import annotations

from kvscope.core.model_types import ModelConfig

SIZES = ("sliding_window", "sliding_window_size", "window_size")  # fields for the size of a window
KINDS = ("layer_types", "attention_layers")  # fields for the kind of each layer
WINDOWED = frozenset({"sliding_attention", "hybrid_sliding", "local"})  # kinds that have a window


def named_windows(config: ModelConfig, layers: int) -> list[int | None]:
    """Return the sliding window of each layer, as the configuration of a language model names it; None for none.

    Where it has kinds of layers, those of `WINDOWED` have the window, otherwise all layers do.
    """
    sizes = [getattr(config, name, None) for name in SIZES]
    size = next((size for size in sizes if isinstance(size, int) and size > 0), None)
    if size is None or getattr(config, "use_sliding_window", None) is False:
        return [None] * layers
    kinds = next((kinds for name in KINDS if (kinds := getattr(config, name, None))), None)
    if kinds is None:
        return [size] * layers
    return [size if kind in WINDOWED else None for kind in kinds[:layers]]
