"""Small traces for tests, made without a model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from kvscope.core.seal import sealed
from kvscope.trace.record import ModelRecord, PromptRecord, SequenceRecord, TraceHeader
from kvscope.trace.schema import HEADER, SEALED_SINCE
from kvscope.trace.writer import TraceWriter

STORED = ["maps", "value_l1", "value_l2", "key_l2", "similarity", "queries"]


def header(heads: int = 2, kv_heads: int = 2, stored: list[str] | None = None) -> TraceHeader:
    return TraceHeader(
        source="model",
        protocol="generated",
        model=ModelRecord(id="test/tiny"),
        layers=[0, 2],
        n_layers=3,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=3,
        layer_types=["full", "full"],
        sliding_window=[None, None],
        stored=STORED if stored is None else stored,
        prompts=[PromptRecord(file="prompt.txt", sha256="0", text="x")],
    )


def rows_of(seed: int, heads: int, length: int) -> np.ndarray:
    """Return causal rows that sum to one, float32 ``[H, T, T]``."""
    logits = np.random.default_rng(seed).normal(size=(heads, length, length)) * 2
    weights = np.exp(logits) * np.tri(length)
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


def record(
    path: Path,
    *,
    lengths: list[int],
    prompt: int | None = None,
    heads: int = 2,
    kv_heads: int = 2,
    block: int = 5,
    stored: list[str] | None = None,
    texts: list[str] | None = None,
    ids: list[list[int]] | None = None,
    sequences: list[SequenceRecord] | None = None,
    force: bool = False,
) -> list[dict[int, np.ndarray]]:
    """Record a trace of random rows; returns the rows of each sequence by layer.

    `ids` are the tokens of each sequence; `sequences` replaces what the trace says of them.
    """
    made = []
    with TraceWriter(path, header(heads, kv_heads, stored), force=force) as writer:
        for sequence, length in enumerate(lengths):
            of_layer = {layer: rows_of(10 * sequence + layer, heads, length) for layer in (0, 2)}
            for layer, rows in of_layer.items():
                for first in range(0, length, block):
                    stop = min(first + block, length)
                    writer.attention(layer, sequence, first, rows[:, first:stop, :stop])
                _signals(writer, layer, sequence, kv_heads, length)
            writer.tokens(
                sequence,
                token_id=np.arange(length) if ids is None else np.array(ids[sequence]),
                text=texts or [f"t{index}" for index in range(length)],
                is_prompt=np.arange(length) < (prompt or max(1, length // 2)),
                logprob=np.full(length, -1.0),
                entropy=np.full(length, 2.0),
            )
            made.append(of_layer)
        writer.finish(sequences or [SequenceRecord(prompt or max(1, length // 2), length) for length in lengths])
    return made


def _signals(writer: TraceWriter, layer: int, sequence: int, kv_heads: int, length: int) -> None:
    plain = np.arange(kv_heads)[:, None] + np.arange(length, dtype=np.float32)
    cosines = np.broadcast_to(np.arange(length)[:, None] / 10 + np.arange(length) / 100, (kv_heads, length, length))
    made = {"value_l1": plain + 10, "value_l2": plain + 20, "key_l2": plain + 30, "similarity": cosines % 1}
    stored = {name: values for name, values in made.items() if name in writer.header.stored}
    if stored:
        writer.keys(layer, sequence, 0, **stored)
    if "queries" in writer.header.stored:
        writer.queries(layer, sequence, 0, np.arange(length * 3, dtype=np.float32).reshape(length, 3))


def change_header(path: Path, changes: dict[str, object], *, version: int | None = None) -> None:
    """Change fields of a trace.json with the checksum that fits; below version 6 without one."""
    file = path / HEADER
    data = json.loads(file.read_text()) | changes
    if version is not None:
        data["schema"] = version
    file.write_text(json.dumps(sealed(data)))
    if data["schema"] < SEALED_SINCE:
        data.pop("sha256", None)
        file.write_text(json.dumps(data))
