"""The header of a recording: the part of ``trace.json`` that is known before it starts."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, replace
from hashlib import sha256
from typing import Any

from kvscope.core.errors import ModelError
from kvscope.core.recording_options import Sampling, StoreOptions
from kvscope.core.version import versions
from kvscope.model.image_prompts import PromptImage
from kvscope.model.loading import Loaded
from kvscope.model.prompts import Prompt
from kvscope.model.sample import sample
from kvscope.model.selfcheck import AttentionFacts, layer_count
from kvscope.model.token_kinds import special_ids
from kvscope.trace.layer_records import AttentionKernel, LayerAttention, RotaryRecord
from kvscope.trace.prompt_parts import ExampleRecord, ImageRecord, SpanRecord
from kvscope.trace.record import (
    ModelRecord,
    PromptRecord,
    SamplingRecord,
    SequenceRecord,
    TraceHeader,
)
from kvscope.trace.schema import MAPS, QKV, STORES, parse_store


def header(
    loaded: Loaded,
    facts: AttentionFacts,
    prompts: Sequence[Prompt],
    selected: StoreOptions,
    sampling: Sampling,
    *,
    seed: int,
    command: str | None,
    prefill_chunk: int | None,
) -> TraceHeader:
    """Return the header of a recording.

    Parameters
    ----------
    loaded, facts
        The model, and the facts of its attention.
    prompts, sampling, seed, command, prefill_chunk
        The prompts as tokens, how the next token is chosen, and fields of the header.
    selected : StoreOptions
        With the layers and heads (empty for all) to record, and whether layer inputs are stored.

    Raises ModelError if a layer to record has no attention.
    """
    layers, heads = list(selected.layers or ()), list(selected.heads or ())
    windows, (store, top) = _windows(loaded, facts, layers), parse_store(selected.store)
    known = TraceHeader(
        source="model",
        protocol="forced" if all(_is_forced(prompt) for prompt in prompts) else "generated",
        model=_model(loaded, facts, sample(loaded.model) if selected.hidden else None),
        layers=layers,
        n_layers=layer_count(loaded.text_config),
        rows_from="module" if facts.from_modules else None,
        other_layers={str(layer): kind for layer, kind in facts.others.items()},
        **_heads(facts, layers, heads),
        layer_types=[_kind(facts, layer) for layer in layers],
        sliding_window=windows,
        learned_sinks=facts.learned_sinks,
        softcap=facts.softcap,
        stored=_stored(facts, store, selected),
        attention=[_narrowed(facts.attention[layer], heads) for layer in layers] if store == QKV else [],
        top=top,
        head_numbers=heads,
        n_heads=facts.sizes[layers[0]].heads if heads else None,
        query_stride=selected.query_stride,
        vector_dtype=facts.vector_dtype,
        prompts=[_prompt(prompt) for prompt in prompts],
        device=str(loaded.device),
        sampling=SamplingRecord(**asdict(sampling)),
        tokenizer=type(loaded.tokenizer).__name__,
        special_tokens=special_ids(loaded.tokenizer) if hasattr(loaded.tokenizer, "all_special_ids") else None,
        versions=_versions(),
        seed=seed,
        command=command,
        prefill_chunk=prefill_chunk,
    )
    return _with_caches(known, facts)


def _with_caches(known: TraceHeader, facts: AttentionFacts) -> TraceHeader:
    """Return a header that also says what is particular about the caches of the layers, and about learned sinks."""
    return replace(
        known,
        chunk_size=[facts.chunks.get(layer) for layer in known.layers] if facts.chunks else [],
        shared_cache={str(layer): facts.shared[layer] for layer in known.layers if layer in facts.shared},
        latent_size=facts.latent_size,
        sink_rows=facts.sink_rows,
        indexed=facts.indexed,
        rotary=_rotary(facts.rotary, known.layers),
    )


def _rotary(found: Sequence[RotaryRecord], layers: Sequence[int]) -> list[RotaryRecord]:
    """Return the rotary embedding of the recorded layers only."""
    parts = [replace(each, layers=[layer for layer in each.layers if layer in layers]) for each in found]
    return [each for each in parts if each.layers]


def _heads(facts: AttentionFacts, layers: Sequence[int], selected: Sequence[int]) -> dict[str, Any]:
    """Return the fields of a header about the heads of the recorded layers, of which some may be selected."""
    sizes = [facts.sizes[layer] for layer in layers]
    if selected:  # of layers with the same heads
        sizes = [replace(own, heads=len(selected), kv_heads=len(selected) * own.kv_heads // own.heads) for own in sizes]
    most = {name: max(getattr(own, name) for own in sizes) for name in ("heads", "kv_heads", "head_dim")}
    if len(set(sizes)) == 1:
        return {**most, "value_dim": sizes[0].value_dim}
    return {**most, "layer_heads": sizes}


def _kind(facts: AttentionFacts, layer: int) -> str:
    """Return which keys a query of a layer sees: ``full``, ``sliding`` or ``chunked``."""
    if layer in facts.chunks:
        return "chunked"
    return "full" if facts.windows[layer] is None else "sliding"


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **versions("torch", "transformers", "pyarrow")}


def _stored(facts: AttentionFacts, store: str, selected: StoreOptions) -> list[str]:
    """Return the signals that are stored; of a model whose modules return the rows these alone."""
    asked = {"hidden": selected.hidden, "value_out_l1": selected.outputs, "reconstruction": selected.reread}
    beside = [name for name, chosen in asked.items() if chosen]
    return [MAPS] if facts.from_modules else [*STORES[store], *beside]


def _windows(loaded: Loaded, facts: AttentionFacts, layers: Sequence[int]) -> list[int | None]:
    """Return the sliding window of each layer; raises ModelError if a layer has no attention."""
    missing = [layer for layer in layers if layer not in facts.windows]
    if missing:
        raise ModelError(
            f"layers {missing} of {loaded.name} have no attention",
            f"Record the layers with attention: --layers {','.join(map(str, facts.windows))}",
        )
    return [facts.windows[layer] for layer in layers]


def _prompt(prompt: Prompt) -> PromptRecord:
    return PromptRecord(
        file=prompt.source.file,
        text=prompt.text if prompt.rendered else None,
        sha256=sha256(prompt.text.encode()).hexdigest(),
        tokens=len(prompt.ids),
        field=prompt.source.field,
    )


def _narrowed(attention: LayerAttention, heads: list[int]) -> LayerAttention:
    """Return the attention parameters of a layer for the given heads only; an empty list means all."""
    if not heads or attention.sinks is None:
        return attention
    return replace(attention, sinks=[attention.sinks[head] for head in heads])


def _model(loaded: Loaded, facts: AttentionFacts, weights: list[float] | None) -> ModelRecord:
    config = loaded.model.config
    described = config.to_dict()
    described.pop("_name_or_path", None)  # a local path would end up in the trace; "id" names the model
    return ModelRecord(
        id=loaded.name if loaded.name == loaded.source or loaded.name == "demo" else loaded.source,
        revision=loaded.revision,
        class_name=type(loaded.model).__name__,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        quantization=loaded.quantization,
        base=loaded.base,
        config=json.loads(json.dumps(described, default=str)),
        attention=AttentionKernel(config._attn_implementation, facts.scaling),
        weights=weights,
    )


def _is_forced(prompt: Prompt) -> bool:
    return prompt.forced is not None and not prompt.generated


def sequence_record(prompt: Prompt, length: int) -> SequenceRecord:
    """Return the entry of a sequence of `length` tokens for ``trace.json``."""
    source = prompt.source
    return SequenceRecord(
        prompt=len(prompt.ids),
        length=length,
        forced=_is_forced(prompt),
        answers=None if source.answers is None else list(source.answers),
        example=None if source.example is None else ExampleRecord(**asdict(source.example)),
        spans=[SpanRecord(span.name, span.start, span.stop) for span in prompt.spans],
        images=[] if prompt.inputs is None else [_image(image) for image in prompt.inputs.images],
    )


def _image(image: PromptImage) -> ImageRecord:
    file = image.file
    return ImageRecord(file.name, file.sha256, file.width, file.height, image.start, image.stop, image.tokens)
