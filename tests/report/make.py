"""A small trace and replays of it, through the real writers, with numbers that a test can name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvscope.results.store import Replay, ReplayWriter
from kvscope.trace.reader import Trace, open_trace
from kvscope.trace.schema import TraceHeader
from kvscope.trace.writer import TraceWriter

LAYERS, HEADS, KV_HEADS, PROMPT, LENGTH = 2, 4, 2, 3, 6
TEXTS = ["The", " king", "\n", " said", " 4", "821"]
METRICS = {
    "held_keys": {"direction": "none", "range": [0.0, None], "summary": "Number of keys in the cache."},
    "retained_mass": {"direction": "higher", "range": [0.0, 1.0], "summary": "Share that is visible."},
    "ideal_mass": {"direction": "none", "range": [0.0, 1.0], "summary": "The same of the ideal set."},
    "output_error": {"direction": "lower", "range": [0.0, None], "summary": "Distance of the outputs."},
}
# policy -> budget -> retained mass
MASS: dict[str, dict[str | None, float | None]] = {
    "full": {None: None},
    "h2o": {"2": 0.5, "4": 0.75},
    "tova": {"2": 0.625, "4": 0.875},
    "window": {"2": 0.25, "4": 0.5},
}


def make_trace(
    path: Path, *, texts: Sequence[str] = TEXTS, sequences: int = 1, prompt_file: str = "prompt.txt", **header: Any
) -> Trace:
    """Return a trace of uniform attention rows."""
    head = TraceHeader(
        source="model",
        protocol="generated",
        model={"id": "tiny", "revision": "abc", "dtype": "float32"},
        layers=list(range(LAYERS)),
        n_layers=LAYERS,
        heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=2,
        layer_types=["full"] * LAYERS,
        sliding_window=[None] * LAYERS,
        prompts=[{"file": prompt_file, "sha256": "c" * 64}] * sequences,
        seed=7,
        versions={"kvscope": "0.1.0"},
        **header,
    )
    rows = np.tril(np.ones((LENGTH, LENGTH))) / np.arange(1, LENGTH + 1)[:, None]
    unknown = np.full(LENGTH, np.nan)
    with TraceWriter(path, head) as writer:
        for sequence in range(sequences):
            for layer in range(LAYERS):
                writer.attention(layer, sequence, 0, np.broadcast_to(rows, (HEADS, LENGTH, LENGTH)).astype(np.float32))
            writer.tokens(
                sequence,
                token_id=np.arange(LENGTH),
                text=texts,
                is_prompt=np.arange(LENGTH) < PROMPT,
                logprob=unknown,
                entropy=unknown,
            )
        writer.finish([{"prompt": PROMPT, "length": LENGTH, "forced": False}] * sequences)
    return open_trace(path)


def make_replay(
    path: Path,
    trace: Trace,
    *,
    mass: Mapping[str, Mapping[str | None, float | None]] = MASS,
    labels: Mapping[str, str] | None = None,
    command: str = "kvscope replay --policy h2o",
    prefill: str = "full",
) -> Replay:
    """Return a replay in which every policy holds the newest keys, and has the retained mass that `mass` says.

    Head ``h`` of layer ``l`` has ``mass + 0.01 h - 0.015 + 0.02 l - 0.01``, so that the mean is `mass`.
    """
    runs = [
        {
            "run": number,
            "policy": policy,
            "label": (labels or {}).get(policy, policy),
            "params": {},
            "budget": budget,
            "budget_keys": [LENGTH if budget is None else int(budget)] * len(trace.sequences),
            "prefill": prefill,
            "phase": "none" if budget is None else "step",
            "loop": "open",
            "scope": "kv_head",
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
        },
        "prefill": prefill,
        "loop": "open",
        "metrics": METRICS,
        "runs": runs,
        "versions": {"kvscope": "0.1.0", "numpy": "2"},
        "command": command,
    }
    with ReplayWriter(path, info) as writer:
        for run in runs:
            value = mass[run["policy"]][run["budget"]]
            for sequence in range(len(trace.sequences)):
                for layer in range(LAYERS):
                    writer.residency(run["run"], sequence, layer, **newest(run["budget"]))
                    writer.fidelity(run["run"], sequence, layer, np.arange(PROMPT, LENGTH), _values(run, value, layer))
        return writer.finish(seconds=1.5)


def newest(budget: str | None) -> dict[str, np.ndarray]:
    """Return stays of the newest `budget` keys after a full prefill."""
    keys = np.tile(np.arange(LENGTH), KV_HEADS)
    heads = np.repeat(np.arange(KV_HEADS), LENGTH)
    if budget is None:
        leave = np.full(len(keys), -1)
    else:
        leave = np.maximum(keys + int(budget), PROMPT - 1)
        leave[leave >= LENGTH] = -1
    return {"enter": keys, "leave": leave, "kv_head": heads, "key": keys}


def _values(run: dict[str, Any], mass: float | None, layer: int) -> dict[str, np.ndarray]:
    shape = (HEADS, LENGTH - PROMPT)
    shift = (0.01 * np.arange(HEADS) - 0.015 + 0.02 * layer - 0.01)[:, None]
    mean = np.full(shape, np.nan) if mass is None else mass + np.broadcast_to(shift, shape)
    ideal = np.full(shape, np.nan if mass is None else 0.9 + 0.01 * int(run["budget"]))
    return {
        "held_keys": np.full(shape, float(run["budget_keys"][0])),
        "retained_mass": mean,
        "ideal_mass": ideal,
        "output_error": 1 - mean,
    }
