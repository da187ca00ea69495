"""What the configuration of a model says, before its weights are loaded."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.cache_utils import CacheLayerMixin, DynamicCache

from kvscope.core.errors import UsageError
from kvscope.core.json import JsonDict
from kvscope.core.model_types import ModelConfig
from kvscope.core.registry import nearest
from kvscope.model.explain import explained
from kvscope.model.gguf_file import place_of
from kvscope.model.known_types import TypeRecord, known_types
from kvscope.model.names import ALIASES, DEMO, resolve
from kvscope.model.selfcheck import layer_count
from kvscope.trace.layer_records import LayerHeads
from kvscope.trace.space import estimate_layers

LENGTH = 1000  # tokens for which the size of a trace is estimated
NUMBER = 2  # bytes of a cached number: weights are published in 16 bit


@dataclass(frozen=True)
class ModelFacts:
    """What a model's configuration says.

    Attributes
    ----------
    name, source : str
        As given, and the folder or Hub id that it stands for.
    type : TypeRecord
        What is known of its type.
    layers, attention_layers : int
        Layers, and how many of them cache keys.
    heads, kv_heads, head_dim : int
        ``H``, ``G`` and ``D``; the most of any layer where the configuration names them layer by layer.
    layer_heads : tuple of LayerHeads
        The same of every layer, where they differ; otherwise empty.
    cache_bytes : int
        Bytes that one token takes in the cache of all layers, in 16 bit.
    trace_bytes : int
        Estimated bytes of a trace of 1,000 tokens, store ``maps``.
    """

    name: str
    source: str
    type: TypeRecord
    layers: int
    attention_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    cache_bytes: int
    trace_bytes: int
    layer_heads: tuple[LayerHeads, ...] = ()

    @property
    def plain(self) -> JsonDict:
        """The facts as plain data."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]


def model_facts(name: str) -> ModelFacts:
    """Return what the configuration of a model says: an alias, a folder or a Hub id; its weights are not loaded.

    Raises
    ------
    UsageError
        If it is neither a model nor a type.
    ModelError
        If its configuration cannot be read, or does not say how many layers it has.
    """
    try:
        source = resolve(name)
    except UsageError as error:
        known = [DEMO, *ALIASES, *known_types()]
        raise UsageError(f"no model or type is called {name!r}", nearest(name.lower(), known)) from error
    with explained(source, "configuration"):
        place, named = place_of(source)
        config = AutoConfig.from_pretrained(place, **named, local_files_only=Path(source).exists())
    unknown = TypeRecord(config.model_type, "unknown", "-", "-", "-", "transformers did not have this type")
    text = config.get_text_config(decoder=True)
    every, attended = named_heads(text), _attention_layers(config)
    differ = len(set(every)) > 1 and attended == len(every)
    layers = every if differ else every[:1] * attended
    cached = sum(_cached_numbers(text, own.kv_heads, own.head_dim) for own in layers)
    return ModelFacts(
        name=name,
        source=source,
        type=known_types().get(config.model_type, unknown),
        layers=layer_count(text),
        attention_layers=attended,
        heads=max(own.heads for own in layers or every),
        kv_heads=max(own.kv_heads for own in layers or every),
        head_dim=max(own.head_dim for own in layers or every),
        cache_bytes=NUMBER * cached,
        trace_bytes=estimate_layers(layers, lengths=[LENGTH]),
        layer_heads=tuple(layers) if differ else (),
    )


def named_heads(config: ModelConfig) -> list[LayerHeads]:
    """Return the heads of every layer as a configuration names them: layer by layer, or once for all."""
    differ, found = getattr(config, "is_heterogeneous", False), []
    for layer, one in enumerate(config.per_layer_config if differ else [config] * layer_count(config)):
        own = {name: _of_layer(value, layer) for name, value in vars(one).items() if "heads" in name}
        heads = int(own.get("num_attention_heads_per_layer") or _of_layer(one.num_attention_heads, layer))
        named = own.get("num_key_value_heads") or (None if differ else getattr(one, "num_key_value_heads", None))
        kv_heads = int(_of_layer(named, layer) or heads)
        found.append(LayerHeads(heads, kv_heads, int(vars(one).get("head_dim") or config.hidden_size // heads)))
    return found


def _of_layer(value: Any, layer: int) -> Any:
    """Return the item of a layer, where a field of a configuration is a list of one for each."""
    return value[layer] if isinstance(value, (list, tuple)) and layer < len(value) else value


def _attention_layers(config: ModelConfig) -> int:
    """Return how many layers cache keys."""
    layers = DynamicCache(config=config).layers
    if not layers:
        return layer_count(config.get_text_config(decoder=True))
    return sum(isinstance(layer, CacheLayerMixin) for layer in layers)


def _cached_numbers(config: ModelConfig, kv_heads: int, head_dim: int) -> int:
    """Return how many numbers a layer caches per token: keys and values, or one latent vector and a rotary key."""
    latent = getattr(config, "kv_lora_rank", None)
    if latent:
        return int(latent) + int(getattr(config, "qk_rope_head_dim", 0) or 0)
    return 2 * kv_heads * head_dim
