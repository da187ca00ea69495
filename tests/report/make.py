"""Small traces and replays of them, through the real writers, with numbers that a test can name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvscope.core.answer_records import ExampleRef
from kvscope.core.json_records import plain
from kvscope.core.records import REPLAY, ReplayRecord
from kvscope.core.residency import ResidencyIntervals
from kvscope.core.summary_records import BoundShares
from kvscope.results.store import Replay
from kvscope.results.writer import ReplayWriter
from kvscope.trace.prompt_parts import ImageRecord, SpanRecord
from kvscope.trace.reader import TokenSequence, Trace, open_trace
from kvscope.trace.record import ModelRecord, PromptRecord, SequenceRecord, TraceHeader
from kvscope.trace.writer import TraceWriter
from tests.results.make import with_summary

LAYERS, HEADS, KV_HEADS, PROMPT, LENGTH = 2, 4, 2, 3, 6
TEXTS = ["The", " king", "\n", " said", " 4", "821"]
METRICS = {
    "held_keys": {"direction": "none", "range": [0.0, None], "summary": "Number of keys in the cache."},
    "read_keys": {"direction": "none", "range": [0.0, None], "summary": "Number of keys the query attends to."},
    "retained_mass": {"direction": "higher", "range": [0.0, 1.0], "summary": "Share that is visible."},
    "ideal_mass": {"direction": "none", "range": [0.0, 1.0], "summary": "The same of the ideal set."},
    "output_error": {"direction": "lower", "range": [0.0, None], "summary": "Distance of the outputs."},
}
OUTCOMES = ("nll_full", "nll_policy", "kl", "top1_equal", "top1_correct")
# policy -> budget -> retained mass
MASS: dict[str, dict[str | None, float | None]] = {
    "full": {None: None},
    "h2o": {"2": 0.5, "4": 0.75},
    "tova": {"2": 0.625, "4": 0.875},
    "window": {"2": 0.25, "4": 0.5},
}
# What sets policies of other kinds apart in run.json.
KIND = {
    "full": {"phase": "none", "bounded": False},
    "snapkv": {"phase": "prefill"},
    "ada-kv": {"phase": "prefill", "allocate": "ada"},
    "r-kv": {"phase": "every:128"},
    "quest": {"reads": True},
    "attention-gate": {"bounded": False},
    "belady": {"clairvoyant": True},
    "ideal": {"clairvoyant": True},
}


def weights(length: int, heads: int = HEADS, seed: int = 0) -> np.ndarray:
    """Return causal rows that look at the first keys, the last keys and a few in between, float32 ``[H, T, T]``."""
    random = np.random.default_rng(seed)
    key = np.arange(length)
    logits = random.normal(size=(heads, length, length)) + 3.0 * (key < 2) - 0.1 * (key[:, None] - key)
    rows = np.exp(logits) * np.tri(length)
    return (rows / rows.sum(-1, keepdims=True)).astype(np.float32)


def make_trace(
    path: Path,
    *,
    texts: Sequence[str] = TEXTS,
    prompt: int = PROMPT,
    sequences: int = 1,
    prompt_file: str = "prompt.txt",
    stored: Sequence[str] = ("maps",),
    logprob: bool = False,
    images: Sequence[ImageRecord] = (),
    spans: Sequence[SpanRecord] = (),
    **header: Any,
) -> Trace:
    """Return a trace of `weights`; the layer is their seed."""
    length = len(texts)
    known_header: dict[str, Any] = {
        "source": "model",
        "protocol": "generated",
        "model": ModelRecord(id="tiny", revision="abc", dtype="float32"),
        "layers": list(range(LAYERS)),
        "n_layers": LAYERS,
        "heads": HEADS,
        "kv_heads": KV_HEADS,
        "head_dim": 2,
        "layer_types": ["full"] * LAYERS,
        "sliding_window": [None] * LAYERS,
        "prompts": [PromptRecord(file=prompt_file, sha256="c" * 64)] * sequences,
        "stored": list(stored),
        "seed": 7,
        "versions": {"kvscope": "0.1.0"},
    }
    head = TraceHeader(**{**known_header, **header})
    known = -0.25 * np.arange(length) if logprob else np.full(length, np.nan)
    with TraceWriter(path, head) as writer:
        for sequence in range(sequences):
            for layer in range(LAYERS):
                writer.attention(layer, sequence, 0, weights(length, seed=layer))
                if "value_l1" in stored:
                    norms = 1.0 + np.add.outer(np.arange(KV_HEADS), np.arange(length, dtype=np.float32))
                    named = {name: norms for name in ("value_l1", "value_l2", "key_l2") if name in stored}
                    writer.keys(layer, sequence, 0, **named)
                if "queries" in stored:
                    angle = np.arange(length, dtype=np.float32)
                    writer.queries(layer, sequence, 0, np.stack([np.cos(angle), np.sin(angle)], 1))
            writer.tokens(
                sequence,
                token_id=np.arange(length),
                text=texts,
                is_prompt=np.arange(length) < prompt,
                logprob=known,
                entropy=known,
            )
        writer.finish([SequenceRecord(prompt, length, images=list(images), spans=list(spans))] * sequences)
    return open_trace(path)


def make_replay(
    path: Path,
    trace: Trace,
    *,
    mass: Mapping[str, Mapping[str | None, float | None]] = MASS,
    labels: Mapping[str, str] | None = None,
    params: Mapping[str, Mapping[str, Any]] | None = None,
    command: str = "kvscope replay --policy h2o",
    prefill: str = "full",
    loop: str = "open",
    bounds: Mapping[str, Any] | None = None,
    examples: Sequence[ExampleRef] = (),
) -> Replay:
    """Return a replay in which every policy but first-keys holds the newest keys, with the mass that `mass` says.

    Head ``h`` of layer ``l`` has ``mass + 0.01 h - 0.015 + 0.02 l - 0.01``, so that the mean is `mass`. In the closed
    loop the loss of every token is ``1`` with the full cache and ``2 - mass`` without. The answer to each of
    `examples` is right where the mass is at least 0.7, and with the full cache.
    """
    shape = trace.sequences[0]
    runs = [
        {
            "run": number,
            "policy": policy.split(":")[0],
            "label": (labels or {}).get(policy, policy),
            "params": dict((params or {}).get(policy, {})),
            "budget": budget,
            "budget_keys": [shape.length if budget is None else int(budget)] * len(trace.sequences),
            "prefill": prefill,
            "phase": "step",
            "loop": loop,
            "scope": "kv_head",
            **KIND.get(policy, {}),
        }
        for number, (policy, budget) in enumerate((policy, budget) for policy in mass for budget in mass[policy])
    ]
    info = {
        "trace": {
            "name": trace.name,
            "path": str(trace.path),
            "identity": trace.identity,
            "model": "tiny",
            "sequences": [{"prompt": each.prompt, "length": each.length} for each in trace.sequences],
            "layers": trace.layers,
            "heads": HEADS,
            "kv_heads": KV_HEADS,
            "examples": [plain(example) for example in examples],
        },
        "prefill": prefill,
        "loop": loop,
        "metrics": METRICS,
        "runs": runs,
        "versions": {"kvscope": "0.1.0", "numpy": "2"},
        "command": command,
    }
    with ReplayWriter(path, REPLAY.decode(info, path, ReplayRecord)) as writer:
        for run, value in zip(
            runs, (value for of_policy in mass.values() for value in of_policy.values()), strict=True
        ):
            for sequence in range(len(trace.sequences)):
                _write_run(writer, run, sequence, value, shape)
                if loop == "closed":
                    answered = any(example.sequence == sequence for example in examples)
                    _write_losses(writer, run["run"], sequence, value, shape, answered=answered)
        made = writer.finish(seconds=1.5)
    if bounds is not None:  # as a replay with bounds has them
        for run in made.summary.runs:
            made = with_summary(made, run.run, bounds=BoundShares(**bounds))
    return made


def _write_run(
    writer: ReplayWriter, run: Mapping[str, Any], sequence: int, value: float | None, shape: TokenSequence
) -> None:
    """Write the residency and the fidelity of one run over one sequence."""
    scored = np.arange(shape.prompt, shape.length)
    for layer in range(LAYERS):
        columns = newest(run["budget"], shape.prompt, shape.length)
        if run["policy"] == "first-keys":
            columns["leave"] = np.where(columns["key"] < int(run["budget"]), -1, columns["key"] + 4)
            columns["leave"][columns["leave"] >= shape.length] = -1
        intervals = ResidencyIntervals.of(**columns, heads=KV_HEADS, length=shape.length)
        writer.residency(run["run"], sequence, layer, intervals)
        writer.fidelity(run["run"], sequence, layer, scored, _values(run, value, layer, len(scored)))


def _write_losses(
    writer: ReplayWriter, run: int, sequence: int, value: float | None, shape: TokenSequence, *, answered: bool
) -> None:
    """Write the losses of one run over one sequence, and what it answers."""
    scored = np.arange(shape.prompt, shape.length)
    loss = 1.0 if value is None else 2.0 - value
    losses = {name: np.full(len(scored), 1.0, np.float32) for name in OUTCOMES[:3]}
    losses |= {name: np.ones(len(scored), bool) for name in OUTCOMES[3:]}
    writer.tokens(run, sequence, scored, {**losses, "nll_policy": losses["kl"] * loss})
    if answered:
        right = value is None or value >= 0.7
        writer.answer(run, sequence, " king" if right else " time", 1, float(right))


def newest(budget: str | None, prompt: int = PROMPT, length: int = LENGTH) -> dict[str, np.ndarray]:
    """Return the residency of the newest `budget` keys after a full prefill."""
    keys = np.tile(np.arange(length), KV_HEADS)
    heads = np.repeat(np.arange(KV_HEADS), length)
    leave = np.full(len(keys), -1)
    if budget is not None:
        leave = np.maximum(keys + int(budget), prompt - 1)
        leave[leave >= length] = -1
    return {"enter": keys, "leave": leave, "kv_head": heads, "key": keys}


def _values(run: dict[str, Any], mass: float | None, layer: int, steps: int) -> dict[str, np.ndarray]:
    shape = (HEADS, steps)
    shift = (0.01 * np.arange(HEADS) - 0.015 + 0.02 * layer - 0.01)[:, None]
    mean = np.full(shape, np.nan) if mass is None else mass + np.broadcast_to(shift, shape)
    ideal = np.full(shape, np.nan if mass is None else 0.9 + 0.01 * int(run["budget"]))
    keys = np.full(shape, float(run["budget_keys"][0]))
    return {
        "held_keys": keys,
        "read_keys": keys + 1,
        "retained_mass": mean,
        "ideal_mass": ideal,
        "output_error": 1 - mean,
    }
