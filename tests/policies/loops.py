"""A policy in both loops: what it evicts at the end of a prompt from a recorded trace, and inside the traced model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvscope.closed_loop.decode import decode
from kvscope.core.options import OutputOptions
from kvscope.engine.plan import EvictionPlan
from kvscope.model.generate import trace
from kvscope.policies.spec import parse_policy
from kvscope.replay.compile import compile_replay
from kvscope.trace.reader import Trace
from tests.model.tiny import build, saved

PROMPT, NEW, BUDGET = 20, 4, 9


def recorded(folder: Path, name: str = "llama", **options: Any) -> Trace:
    """Return a trace of a tiny model, by default with vectors."""
    prompt = folder / "prompt.txt"
    prompt.write_text(" ".join(f"w{1 + index * 7 % 60}" for index in range(PROMPT)))
    options = {"store": "maps+vectors", "max_new_tokens": NEW} | options
    return trace(str(saved(folder / "model", name)), [prompt], output=folder / "trace", **options)


def evicted_in_both(made: Trace, spec: str, folder: Path, name: str = "llama") -> tuple[np.ndarray, np.ndarray]:
    """Return which keys of the prompt leave at its end, bool ``[L, G, P]``, in the open loop and in decoding."""
    replay = compile_replay(made, [spec], BUDGET).execute(OutputOptions(folder / "replay", False, None))
    frame = replay.residency(replay.summary.runs[0].run).sort_values(["layer", "kv_head", "key"])
    shape = (len(made.layers), made.kv_heads, -1)
    leave = frame["leave"].fillna(-1).to_numpy(int).reshape(shape)[..., :PROMPT]
    ids = torch.from_numpy(made.tokens(0)["token_id"].to_numpy(copy=True))
    plan = EvictionPlan.published(parse_policy(spec))
    real = torch.stack(decode(build(name), ids, plan, BUDGET, prompt=PROMPT).leave)[..., :PROMPT]
    return leave == PROMPT - 1, (real == PROMPT - 1).numpy()
