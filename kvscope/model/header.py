"""What ``trace.json`` says of a recording before it starts."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, replace
from hashlib import sha256
from importlib.metadata import version
from typing import Any

from kvscope.core.errors import ModelError
from kvscope.model.loading import Loaded
from kvscope.model.prompts import Prompt
from kvscope.model.sample import sample
from kvscope.model.sampling import Sampling
from kvscope.model.selfcheck import AttentionFacts
from kvscope.trace.record import (
    AttentionKernel,
    LayerAttention,
    ModelRecord,
    PromptRecord,
    SamplingRecord,
    TraceHeader,
)
from kvscope.trace.schema import QKV, STORES, parse_store


def header(
    loaded: Loaded,
    facts: AttentionFacts,
    layers: list[int],
    prompts: Sequence[Prompt],
    sampling: Sampling,
    **given: Any,
) -> TraceHeader:
    """Return the header of a recording.

    Parameters
    ----------
    loaded, facts
        The model, and what its attention calls showed.
    layers : list of int
        Layers to record.
    prompts, sampling
        What it reads, and how it goes on.
    **given
        ``store``, ``hidden`` and ``head_numbers``; and fields of the header as they are: ``seed``, ``command``,
        ``prefill_chunk``, ``query_stride``.

    Raises
    ------
    ModelError
        If a layer to record has no attention.
    """
    missing = [layer for layer in layers if layer not in facts.windows]
    if missing:
        raise ModelError(
            f"layers {missing} of {loaded.name} have no attention",
            f"Record the others: --layers {','.join(map(str, facts.windows))}",
        )
    hidden, part = bool(given.pop("hidden")), list(given.pop("head_numbers"))
    store, top = parse_store(given.pop("store"))
    stored = [*STORES[store], *(["hidden"] if hidden else [])]
    windows = [facts.windows[layer] for layer in layers]
    return TraceHeader(
        source="model",
        protocol="forced" if all(prompt.forced is not None for prompt in prompts) else "generated",
        model=_model(loaded, facts, sample(loaded.model) if hidden else None),
        layers=layers,
        n_layers=loaded.text_config.num_hidden_layers,
        heads=len(part) or facts.heads,
        kv_heads=len(part) * facts.kv_heads // facts.heads or facts.kv_heads,
        head_dim=facts.head_dim,
        layer_types=["full" if window is None else "sliding" for window in windows],
        sliding_window=windows,
        learned_sinks=facts.learned_sinks,
        softcap=facts.softcap,
        stored=stored,
        attention=[_narrowed(facts.attention[layer], part) for layer in layers] if store == QKV else [],
        top=top,
        head_numbers=part,
        n_heads=facts.heads if part else None,
        prompts=[
            PromptRecord(file=prompt.file, sha256=sha256(prompt.text.encode()).hexdigest(), tokens=len(prompt.ids))
            for prompt in prompts
        ],
        device=str(loaded.device),
        sampling=SamplingRecord(**asdict(sampling)),
        tokenizer=type(loaded.tokenizer).__name__,
        versions={
            "python": platform.python_version(),
            **{name: version(name) for name in ("kvscope", "torch", "transformers", "pyarrow")},
        },
        **given,
    )


def _narrowed(attention: LayerAttention, heads: list[int]) -> LayerAttention:
    """Return how a layer makes weights of some heads alone; of all where none is named."""
    if not heads or attention.sinks is None:
        return attention
    return replace(attention, sinks=[attention.sinks[head] for head in heads])


def _model(loaded: Loaded, facts: AttentionFacts, weights: list[float] | None) -> ModelRecord:
    config = loaded.model.config
    described = config.to_dict()
    described.pop("_name_or_path", None)  # a path would tell of the machine, and "id" names the model
    return ModelRecord(
        id=loaded.name if loaded.name == loaded.source or loaded.name == "demo" else loaded.source,
        revision=loaded.revision,
        class_name=type(loaded.model).__name__,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        config=json.loads(json.dumps(described, default=str)),
        attention=AttentionKernel(config._attn_implementation, facts.scaling),
        weights=weights,
    )
