"""What the configuration of a model says, before its weights are loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig
from transformers.cache_utils import CacheLayerMixin, DynamicCache

from kvscope.core.errors import UsageError
from kvscope.core.json import JsonDict
from kvscope.core.model_types import ModelConfig
from kvscope.core.registry import nearest
from kvscope.model.adapter import adapter_of, base_of
from kvscope.model.explain import explained
from kvscope.model.gguf_file import place_of
from kvscope.model.known_types import TypeRecord, known_types
from kvscope.model.loading import hub_answers
from kvscope.model.named_windows import named_windows
from kvscope.model.names import ALIASES, DEMO, resolve
from kvscope.model.obstacles import language_model, require_type
from kvscope.model.read_weights import without_weights
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
        Layers, and how many of them have attention over keys that are cached.
    reading_layers : int
        How many of these read the cache of an earlier layer.
    heads, kv_heads, head_dim : int
        ``H``, ``G`` and ``D``; the most of any layer where the configuration names them layer by layer.
    layer_heads : tuple of LayerHeads
        The same of every layer, where they differ; otherwise empty.
    windows : tuple of int or None
        Sliding window of every layer with attention, as its configuration names it; empty if none has one.
    base : str or None
        Of an adapter: the model that it changes, whose facts these are.
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
    windows: tuple[int | None, ...] = ()
    reading_layers: int = 0
    base: str | None = None

    @property
    def plain(self) -> JsonDict:
        """The facts as plain data."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]


def model_facts(name: str) -> ModelFacts:
    """Return what the configuration of a model says: an alias, a folder or a Hub id; its weights are not loaded.

    Of an adapter it is that of its base model. How many query heads share a key/value head is read from the model's own
    modules, which are built without memory: some types derive it in their code.

    Raises
    ------
    UsageError
        If it is neither a model nor a type.
    ModelError
        If its configuration cannot be read, does not say how many layers it has, or is of a type without a trace.
    """
    try:
        source = resolve(name)
    except UsageError as error:
        known = [DEMO, *ALIASES, *known_types()]
        raise UsageError(f"no model or type is called {name!r}", nearest(name.lower(), known)) from error
    config, base = _config(source)
    require_type(config)
    unknown = TypeRecord(config.model_type, "unknown", "-", "-", "-", "transformers did not have this type")
    text = config.get_text_config(decoder=True)
    with explained(source, "configuration"):
        built, (numbers, reading) = _built(config, named_heads(text)), _attention_layers(config)
    every, windows = built.heads, named_windows(text, len(built.heads))
    layers = [every[layer] for layer in numbers]
    differ = len(set(every)) > 1 and len(numbers) == len(every)
    owning = [layer for layer in numbers if layer not in reading]
    cached = sum(_cached_numbers(text, layer, built.cached[layer], every[layer].head_dim) for layer in owning)
    cached += sum(built.index[layer] for layer in _indexed_layers(config))
    return ModelFacts(
        name=name,
        source=source,
        type=known_types().get(config.model_type, unknown),
        layers=layer_count(text),
        attention_layers=len(numbers),
        heads=max(own.heads for own in layers or every),
        kv_heads=max(own.kv_heads for own in layers or every),
        head_dim=max(own.head_dim for own in layers or every),
        cache_bytes=NUMBER * cached,
        trace_bytes=estimate_layers(layers, lengths=[LENGTH]),
        layer_heads=tuple(layers) if differ else (),
        windows=tuple(windows) if any(window is not None for window in windows) else (),
        reading_layers=len(reading),
        base=base,
    )


def _config(source: str) -> tuple[ModelConfig, str | None]:
    """Return the configuration of a model, or of the base of an adapter with the name of that base."""
    local = Path(source).exists()
    adapter = adapter_of(source, None, offline=not local and not hub_answers(source, None))
    base, revision = base_of(adapter) if adapter is not None else (None, None)
    read = source if base is None else resolve(base)
    with explained(read, "configuration"):
        place, named = place_of(read)
        local = Path(read).exists()
        found = AutoConfig.from_pretrained(place, **named, revision=revision, local_files_only=local)
    return found, base


@dataclass
class _Built:
    """What the modules of a model say of its layers.

    Attributes
    ----------
    heads : list of LayerHeads
        Heads of each layer, as they share keys and values.
    cached : list of int
        Heads that each layer caches: fewer where a model repeats them before it attends (JetMoE).
    index : list of int
        Numbers of the key of a learned index that each layer has.
    """

    heads: list[LayerHeads]
    cached: list[int]
    index: list[int]


def _built(config: ModelConfig, named: list[LayerHeads]) -> _Built:
    """Return what the modules of a model say, which are built without memory, beside what its configuration names."""
    found = _Built(list(named), [own.kv_heads for own in named], [0] * len(named))
    for module in language_model(without_weights(config)).modules():
        layer, group = getattr(module, "layer_idx", None), getattr(module, "num_key_value_groups", None)
        if not isinstance(layer, int) or not isinstance(group, int) or not 0 <= layer < len(named):
            continue
        size = getattr(module, "qk_head_dim", None)  # of latent attention: what is rotated, and the rest
        own = replace(found.heads[layer], kv_heads=named[layer].heads // group)
        found.heads[layer] = replace(own, head_dim=size) if isinstance(size, int) else own
        cached = getattr(module, "num_key_value_heads", None)
        found.cached[layer] = cached if isinstance(cached, int) else own.kv_heads
        found.index[layer] = _index_numbers(getattr(module, "indexer", None))
    return found


def _index_numbers(index: nn.Module | None) -> int:
    """Return how many numbers of a learned index are cached per token; 0 without one."""
    of_key = int(getattr(index, "head_dim", 0) or getattr(index, "index_head_dim", 0))
    if hasattr(index, "index_kpool"):  # its keys are pooled by weights, which are cached too, with a mark of padding
        return 2 * of_key + 1
    return of_key * int(getattr(index, "index_kv_heads", 1))


def named_heads(config: ModelConfig) -> list[LayerHeads]:
    """Return the heads of every layer as a configuration names them: layer by layer, or once for all."""
    differ, found = getattr(config, "is_heterogeneous", False), []
    for layer, one in enumerate(config.per_layer_config if differ else [config] * layer_count(config)):
        own = {name: _of_layer(value, layer) for name, value in vars(one).items() if "heads" in name}
        heads = int(own.get("num_attention_heads_per_layer") or _of_layer(one.num_attention_heads, layer))
        named = own.get("num_key_value_heads") or (None if differ else getattr(one, "num_key_value_heads", None))
        named = named or own.get("num_kv_heads")
        if vars(one).get("multi_query") and not vars(one).get("new_decoder_architecture"):
            named = 1
        kv_heads = int(_of_layer(named, layer) or heads)
        found.append(LayerHeads(heads, kv_heads, _head_dim(vars(one)) or config.hidden_size // heads))
    return found


def _head_dim(own: Mapping[str, Any]) -> int:
    """Return the size of a head that a configuration names; 0 if it names none."""
    return int(own.get("head_dim") or own.get("attention_head_dim") or 0)


def _of_layer(value: Any, layer: int) -> Any:
    """Return the item of a layer, where a field of a configuration is a list of one for each."""
    return value[layer] if isinstance(value, (list, tuple)) and layer < len(value) else value


def _attention_layers(config: ModelConfig) -> tuple[list[int], list[int]]:
    """Return the layers with attention over cached keys, and those of them that read the cache of an earlier one."""
    text = config.get_text_config(decoder=True)
    layers = DynamicCache(config=config).layers
    if not layers:
        return list(range(layer_count(text))), []
    modes = getattr(text, "kv_sharing_modes", None) or [None] * len(layers)
    reading = [number for number, mode in enumerate(modes[: len(layers)]) if str(mode).startswith("reuse")]
    caching = [number for number, layer in enumerate(layers) if isinstance(layer, CacheLayerMixin)]
    return sorted({*caching, *reading}), reading


def _indexed_layers(config: ModelConfig) -> list[int]:
    """Return the layers that cache keys of a learned index, too."""
    return [number for number, layer in enumerate(DynamicCache(config=config).layers) if hasattr(layer, "indexer_keys")]


def _cached_numbers(config: ModelConfig, layer: int, kv_heads: int, head_dim: int) -> int:
    """Return how many numbers a layer caches per token: keys and values, or one latent vector and a rotary key."""
    own = config.per_layer_config[layer] if getattr(config, "is_heterogeneous", False) else config
    latent = getattr(own, "kv_lora_rank", None)
    if latent:
        rotated = _of_layer(getattr(own, "no_rope_layers", None) or 1, layer)  # 0 in a layer without positions
        return int(latent) + (int(getattr(own, "qk_rope_head_dim", 0) or 0) if rotated else 0)
    return 2 * kv_heads * head_dim
