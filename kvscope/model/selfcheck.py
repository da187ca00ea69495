"""Check on a few tokens that observing a model does not change it, and that its rows are valid attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Literal

import torch
from torch import Tensor

from kvscope.core.errors import ModelError
from kvscope.core.memory import is_out_of_memory
from kvscope.core.model_types import CausalModel, ModelConfig
from kvscope.model.attention_hook import Call, observe_attention
from kvscope.model.explain import first_line
from kvscope.model.outputs import OutputProjection
from kvscope.model.packing import VECTOR_DTYPES
from kvscope.model.short_cache import full_cache
from kvscope.trace.columns import VectorType
from kvscope.trace.layer_records import LayerAttention, LayerHeads, RotaryRecord

PROBE = 24  # tokens that are run
TOLERANCE = 1e-4  # allowed error of a row's sum in float32


@dataclass(frozen=True)
class AttentionFacts:
    """Facts read from the attention calls of a model.

    Attributes
    ----------
    sizes : dict of int to LayerHeads
        ``H``, ``G`` and the sizes of queries, keys and values by layer with attention.
    windows : dict of int to int or None
        Sliding window by layer with attention.
    chunks : dict of int to int
        Size of the chunks of each layer that attends in chunks.
    shared : dict of int to int
        For each layer that caches nothing, but reads the keys and values of an earlier one, that layer.
    latent_size : int or None
        Numbers that a layer caches per token where the heads share one latent vector.
    indexed : bool
        Whether a learned index chooses the keys that a query sees.
    others : dict of int to str
        Kind of each layer without attention, such as ``linear_attention``; it has no keys that could be evicted.
    scaling, softcap
        Factor and cap of the logits in the first layer.
    learned_sinks : bool
        Whether any layer has learned sinks.
    attention : dict of int to LayerAttention
        How each layer turns queries and keys into weights.
    vector_dtype : VectorType
        Smallest type that represents all queries, keys, values and layer inputs exactly; float32 for float64.
    from_modules : bool
        Whether rows are those that the model's modules return, beside which nothing is known.
    sink_rows : {"after", "before"} or None
        Whether rows are what learned sinks leave, or those before their share; None without learned sinks.
    rotary : list of RotaryRecord
        Rotary embedding of the layers; empty if it is not asked for, or a layer has none.
    projections : dict of int to OutputProjection
        Output projection of each layer, if it is asked for.
    """

    sizes: dict[int, LayerHeads]
    windows: dict[int, int | None]
    others: dict[int, str]
    scaling: float | None
    softcap: float | None
    learned_sinks: bool
    attention: dict[int, LayerAttention]
    vector_dtype: VectorType
    from_modules: bool = False
    sink_rows: Literal["after", "before"] | None = None
    chunks: dict[int, int] = field(default_factory=dict)
    shared: dict[int, int] = field(default_factory=dict)
    latent_size: int | None = None
    rotary: list[RotaryRecord] = field(default_factory=list)
    projections: dict[int, OutputProjection] = field(default_factory=dict)
    indexed: bool = False

    @property
    def heads(self) -> int:
        """``H``, the most of any layer."""
        return max(own.heads for own in self.sizes.values())

    @property
    def kv_heads(self) -> int:
        """``G``, the most of any layer."""
        return max(own.kv_heads for own in self.sizes.values())

    @property
    def head_dim(self) -> int:
        """``D`` of queries and keys, the largest of any layer."""
        return max(own.head_dim for own in self.sizes.values())


def self_check(model: CausalModel, ids: Tensor) -> AttentionFacts:
    """Return the facts of the model's attention, checked on the first tokens of a prompt ``[1, P]``.

    Raises
    ------
    ModelError
        If observing changes the output, no attention call is seen, a layer keeps keys but its attention is not seen,
        query heads do not share key/value heads evenly, or a row is not causal, not finite, or does not sum to one.
    """
    ids = ids[:, :PROBE]
    calls: list[Call] = []
    expected = plain_logits(model, ids)
    with observe_attention(model, calls.append):
        observed = model(input_ids=ids, use_cache=False).logits
    name = type(model).__name__
    if not torch.equal(expected, observed):
        difference = (expected - observed).abs().max().item()
        raise ModelError(
            f"observing the attention of {name} changes its logits by {difference:.3g}",
            "Trace another model, and please report this one.",
        )
    if not calls:
        raise ModelError(f"no attention of {name} was seen", "Trace a model with softmax attention in its layers.")
    for call in calls:
        _check_rows(name, call)
    _require_one_call(name, calls)
    first = calls[0]
    return AttentionFacts(
        sizes={call.layer: _heads(name, call) for call in calls},
        windows={call.layer: call.sliding_window for call in calls},
        chunks={call.layer: call.chunk for call in calls if call.chunk is not None},
        others=layers_without_attention(model, ids, [call.layer for call in calls]),
        scaling=first.scaling,
        softcap=first.softcap,
        learned_sinks=any(call.sinks is not None for call in calls),
        sink_rows="after" if any(call.sinks is not None for call in calls) else None,
        attention={call.layer: _attention(call) for call in calls},
        vector_dtype=_vector_dtype(calls),
        shared=_shared(calls),
        latent_size=latent_size(model, ids, {call.layer: call.key.shape[1] for call in calls}),
    )


def _heads(name: str, call: Call) -> LayerHeads:
    """Return the heads of a layer; raises ModelError if its query heads do not share key/value heads evenly."""
    heads, kv_heads = call.query.shape[1], call.key.shape[1]
    if heads % kv_heads:
        raise ModelError(
            f"{heads} query heads of layer {call.layer} of {name} do not share {kv_heads} key/value heads evenly",
            "Trace another model, and please report this one.",
        )
    return head_sizes(heads, kv_heads, call.query.shape[3], call.value.shape[3])


def head_sizes(heads: int, kv_heads: int, head_dim: int, value_dim: int) -> LayerHeads:
    """Return the heads of a layer, with the size of values where it is not that of keys."""
    return LayerHeads(heads, kv_heads, head_dim, None if value_dim == head_dim else value_dim)


def latent_size(model: CausalModel, ids: Tensor, kv_heads: Mapping[int, int]) -> int | None:
    """Return how many numbers a layer caches per token if the heads of every layer share one latent vector, else None.

    `kv_heads` has ``G`` of each layer with attention. Where layers differ in size, the most of any counts.
    """
    config = model.config.get_text_config(decoder=True)
    each = config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]
    if all(getattr(own, "kv_lora_rank", None) is None for own in each):
        return None
    cache = full_cache(model)
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    sizes: list[int] = []
    for layer, heads in kv_heads.items():
        keys, values = (getattr(cache.layers[layer], name, None) for name in ("keys", "values"))
        if keys is not None and values is not None and keys.numel():  # otherwise it reads another layer's
            if not keys.shape[1] == 1 < heads:
                return None
            sizes.append(int(keys.shape[-1] + values.shape[-1]))
    return max(sizes, default=None)


@dataclass(frozen=True)
class LayerCaches:
    """The caches of the layers with attention.

    Attributes
    ----------
    kv_heads : dict of int to int
        ``G`` of each layer.
    shared : dict of int to int
        For each layer that caches nothing but reads the keys and values of an earlier one, that layer.
    """

    kv_heads: dict[int, int]
    shared: dict[int, int]


def layer_caches(model: CausalModel, ids: Tensor) -> LayerCaches:
    """Return the caches of a model's layers, from one pass over the first tokens of ids ``[1, n]``."""
    calls: list[Call] = []
    with observe_attention(model, calls.append, inputs=False):
        model(input_ids=ids[:, :PROBE], use_cache=False)
    return LayerCaches({call.layer: call.key.shape[1] for call in calls}, _shared(calls))


def _shared(calls: list[Call]) -> dict[int, int]:
    """Return the layers that are given the keys of an earlier one, in the same memory, and which one that is.

    The calls are held, so that no memory is used twice.
    """
    first: dict[tuple[int, torch.device], int] = {}
    found = {}
    for call in calls:
        owner = first.setdefault((call.key.data_ptr(), call.key.device), call.layer)
        if owner != call.layer:
            found[call.layer] = owner
    return found


def plain_logits(model: CausalModel, ids: Tensor) -> Tensor:
    """Return the logits of ids ``[1, n]``; raises ModelError if the model does not run on text alone."""
    try:
        return model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"{type(model).__name__} does not run on a text prompt: {first_line(error)}",
            "Trace a model that takes text alone, and check that its files belong together.",
        ) from error


def _vector_dtype(calls: list[Call]) -> VectorType:
    parts = [part for call in calls for part in (call.query, call.key, call.value, call.hidden) if part is not None]
    found = reduce(torch.promote_types, {part.dtype for part in parts})
    return next((name for name, dtype in VECTOR_DTYPES.items() if dtype == found), "float32")


def _require_one_call(name: str, calls: list[Call]) -> None:
    """Raise ModelError if a layer number names several attention calls, so that their rows cannot be told apart."""
    numbers = [call.layer for call in calls]
    several = sorted({number for number in numbers if numbers.count(number) > 1})
    if several:
        raise ModelError(
            f"layer {several[0]} of {name} calls attention {numbers.count(several[0])} times for each token",
            "Trace a model with one attention in a layer.",
        )


def layers_without_attention(model: CausalModel, ids: Tensor, seen: list[int]) -> dict[int, str]:
    """Return the kind of each layer without attention; raises ModelError if it keeps keys all the same."""
    config = model.config.get_text_config(decoder=True)
    others = [layer for layer in range(layer_count(config)) if layer not in seen]
    if not others:
        return {}
    cache = full_cache(model)
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    for layer in others:
        keys = getattr(cache.layers[layer], "keys", None) if layer < len(cache.layers) else None
        if keys is not None and keys.numel():
            raise ModelError(
                f"layer {layer} of {type(model).__name__} caches keys, but its attention cannot be observed",
                "Trace another model, and please report this one.",
            )
    types = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or []
    return {layer: types[layer] if layer < len(types) else "no attention" for layer in others}


def layer_count(config: ModelConfig) -> int:
    """Return the number of layers of a model's configuration; raises ModelError if it does not say."""
    count = getattr(config, "num_hidden_layers", None)
    if count is None:
        raise ModelError(
            f"the configuration of a {config.model_type} model does not say how many layers it has",
            "Trace a model with one stack of decoder layers.",
        )
    return int(count)


def _attention(call: Call) -> LayerAttention:
    sinks = None if call.sinks is None else call.sinks.float().tolist()
    return LayerAttention(float(call.scaling), call.softcap, call.sliding_window, sinks)


def _check_rows(name: str, call: Call) -> None:
    count, where = call.query.shape[2], f"layer {call.layer} of {name}"
    rows = call.rows(0, count)[0]
    if not bool(torch.isfinite(rows).all()):
        raise ModelError(f"{where} has attention weights that are not finite", "Try --dtype float32.")
    if rows.shape[-1] != count or bool(rows.triu(1).any()):
        raise ModelError(f"{where} looks at later tokens", "Trace a causal language model.")
    sums = rows.sum(-1)
    low, high = sums.min().item(), sums.max().item()
    if high > 1 + TOLERANCE or (call.sinks is None and low < 1 - TOLERANCE):
        raise ModelError(f"rows of {where} sum to {low:.4f} to {high:.4f}", "Try --dtype float32.")
