"""What ``trace.json`` says of a layer's attention: its heads and their sizes, and how it makes weights.

Layers may differ in their heads, and in the size of them. What is read of a layer is read with its own heads
(`kvscope.trace.record.TraceHeader.heads_of`); nothing is padded. A simulation steps layers together only if their heads
agree, so policies and metrics never see a head that a layer does not have; results have a row for each head there is.
The fields ``heads``, ``kv_heads`` and ``head_dim`` of a header are then the most of any layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from kvscope.core.json_records import Finite, Number, Positive, about


@dataclass(frozen=True)
class LayerAttention:
    """How a layer turns queries and keys into weights: scale, cap, mask, softmax with sinks, whose part is dropped."""

    scaling: Annotated[Finite, about("factor of the logits")]
    softcap: Annotated[Finite | None, about("cap of the scaled logits: softcap * tanh(logits / softcap)")] = None
    sliding_window: Annotated[Positive | None, about("largest number of keys that a query sees, its own included")] = (
        None
    )
    sinks: Annotated[list[float] | None, about("learned sink logit of each query head")] = None
    mask: Annotated[str, about("`causal`: a query sees itself and earlier keys, within the window")] = "causal"


@dataclass(frozen=True)
class LayerHeads:
    """Heads of one layer, and their sizes."""

    heads: Annotated[Positive, about("query heads that were recorded, H")]
    kv_heads: Annotated[Positive, about("key/value heads that were recorded, G")]
    head_dim: Annotated[Number, about("size of a query and of a key, D")]
    value_dim: Annotated[Number | None, about("size of a value, if it is not D", omit=True)] = None

    @property
    def value_size(self) -> int:
        """Size of a value."""
        return self.head_dim if self.value_dim is None else self.value_dim


@dataclass(frozen=True)
class RotaryRecord:
    """How some layers turn queries and keys by their positions (rotary embedding): pairs of dimensions of a head.

    At position ``p`` dimension ``d`` with partner ``e`` becomes ``scale * (x_d cos(p f_d) -+ x_e sin(p f_d))``, minus
    for the lower of both; a dimension that is its own partner stays as it is.
    """

    layers: Annotated[list[Number], about("layers of the model")]
    frequencies: Annotated[list[Finite], about("of each dimension of a head, radians per position; 0 if not turned")]
    partners: Annotated[list[Number], about("of each dimension the other one of its pair; itself if not turned")]
    scale: Annotated[Finite, about("factor of the turned dimensions")] = 1.0


@dataclass(frozen=True)
class AttentionKernel:
    """How the model computed attention while it was recorded."""

    kernel: Annotated[str | None, about("attention implementation in transformers: `sdpa`, `eager`, ...")] = None
    scaling: Annotated[Finite | None, about("factor of the logits, of the first layer")] = None


def heads_text(layers: Mapping[int, LayerHeads]) -> str:
    """Return how many heads of which size layers have; where they differ, of each kind which layers have it."""
    kinds: dict[str, list[int]] = {}
    for layer, own in layers.items():
        text = f"{own.heads} query heads, {own.kv_heads} key/value heads of size {own.head_dim}"
        text += "" if own.value_dim is None else f", values of size {own.value_dim}"
        kinds.setdefault(text, []).append(layer)
    if len(kinds) == 1:
        return next(iter(kinds))
    parts = [f"layer{'s' * (len(of) > 1)} {', '.join(map(str, of))}: {text}" for text, of in kinds.items()]
    return "; ".join(parts)
