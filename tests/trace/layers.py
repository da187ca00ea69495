"""Traces whose layers differ in their heads, made without a model, and traces of some of these layers alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kvscope.trace.layer_records import LayerAttention, LayerHeads
from kvscope.trace.reader import Trace, open_trace
from kvscope.trace.record import ModelRecord, PromptRecord, SequenceRecord, TraceHeader
from kvscope.trace.schema import STORES
from kvscope.trace.writer import TraceWriter

# Layers 1 and 3 have more heads, layer 4 larger ones, layer 5 values of another size.
HEADS = (
    LayerHeads(4, 2, 3),
    LayerHeads(6, 3, 3),
    LayerHeads(4, 2, 3),
    LayerHeads(6, 3, 3),
    LayerHeads(4, 2, 5),
    LayerHeads(4, 4, 3, 2),
)
PROMPT, LENGTH = 40, 52


def header(layers: Sequence[int], store: str = "maps+vectors") -> TraceHeader:
    own = [HEADS[layer] for layer in layers]
    return TraceHeader(
        source="model",
        protocol="generated",
        model=ModelRecord(id="test/layers"),
        layers=list(layers),
        n_layers=len(HEADS),
        heads=max(one.heads for one in own),
        kv_heads=max(one.kv_heads for one in own),
        head_dim=max(one.head_dim for one in own),
        value_dim=own[0].value_dim if len(set(own)) == 1 else None,
        layer_heads=own if len(set(own)) > 1 else [],
        layer_types=["full"] * len(own),
        sliding_window=[None] * len(own),
        stored=list(STORES[store]),
        attention=[LayerAttention(0.7) for _ in own] if store == "qkv" else [],
        prompts=[PromptRecord(file="prompt.txt", sha256="0", text="x")],
    )


def rows_of(layer: int, sequence: int = 0) -> np.ndarray:
    """Return the rows of a layer, float32 ``[H, T, T]``; layers differ in how far back they look."""
    random = np.random.default_rng(100 * sequence + layer)
    key = np.arange(LENGTH)
    logits = random.normal(size=(HEADS[layer].heads, LENGTH, LENGTH)) * (1 + layer) - 0.02 * layer * (
        key[:, None] - key
    )
    rows = np.exp(logits - logits.max(-1, keepdims=True)) * np.tri(LENGTH)
    return (rows / rows.sum(-1, keepdims=True)).astype(np.float32)


def vectors_of(layer: int, sequence: int = 0) -> dict[str, np.ndarray]:
    """Return queries, keys and values of a layer, float32 ``[heads, T, size]``."""
    random, own = np.random.default_rng(7 + 100 * sequence + layer), HEADS[layer]
    shapes = {"queries": (own.heads, own.head_dim), "keys": (own.kv_heads, own.head_dim)}
    shapes["values"] = (own.kv_heads, own.value_size)
    return {name: random.normal(size=(n, LENGTH, size)).astype(np.float32) for name, (n, size) in shapes.items()}


def record(
    path: Path, layers: Sequence[int] = tuple(range(len(HEADS))), store: str = "maps+vectors", sequences: int = 1
) -> Trace:
    """Return a trace of some of the layers; each layer has the same rows and vectors whatever the others."""
    with TraceWriter(path, header(layers, store)) as writer:
        for sequence in range(sequences):
            for layer in layers:
                _write(writer, layer, sequence)
            writer.tokens(
                sequence,
                token_id=np.arange(LENGTH),
                text=[f" t{index}" for index in range(LENGTH)],
                is_prompt=np.arange(LENGTH) < PROMPT,
                logprob=np.full(LENGTH, -1.0),
                entropy=np.full(LENGTH, 2.0),
            )
        writer.finish([SequenceRecord(PROMPT, LENGTH)] * sequences)
    return open_trace(path)


def _write(writer: TraceWriter, layer: int, sequence: int) -> None:
    """Write a layer with everything that the store has."""
    vectors = vectors_of(layer, sequence)
    if "maps" in writer.header.stored:
        writer.attention(layer, sequence, 0, rows_of(layer, sequence))
        writer.keys(
            layer,
            sequence,
            0,
            value_l1=np.abs(vectors["values"]).sum(-1),
            value_l2=np.sqrt(np.square(vectors["values"]).sum(-1)),
            key_l2=np.sqrt(np.square(vectors["keys"]).sum(-1)),
            similarity=np.zeros((HEADS[layer].kv_heads, LENGTH, LENGTH), np.float32),
        )
        writer.queries(layer, sequence, 0, vectors["queries"].mean(0))
    writer.vectors(layer, sequence, 0, **vectors)
