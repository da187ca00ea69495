"""The closed loop on a trace: its model runs again on its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from kvscope.closed_loop.evaluate import Passage, TokenSink, evaluate
from kvscope.closed_loop.options import ClosedLoopOptions
from kvscope.core.errors import ModelError, TraceError
from kvscope.core.options import Prefill
from kvscope.engine.runs import RunSpec, Tally
from kvscope.metrics import Metric
from kvscope.model.loading import load
from kvscope.trace.reader import Trace


def score_trace(
    trace: Trace,
    runs: Sequence[RunSpec],
    metrics: Sequence[Metric],
    prefill: Prefill,
    sink: TokenSink,
    options: ClosedLoopOptions,
    *,
    device: str = "cpu",
    progress: Callable[[float], None] | None = None,
) -> Tally:
    """Run policies inside the model of a trace, over its tokens; raises what `passages_of` and `evaluate` raise."""
    model, passages = passages_of(trace, options, device)
    return evaluate(model, passages, runs, metrics, prefill, sink, progress=progress)


def passages_of(trace: Trace, options: ClosedLoopOptions, device: str = "cpu") -> tuple[Any, list[Passage]]:
    """Return the model of a trace, and the tokens of each sequence.

    Raises
    ------
    TraceError
        If the trace does not name a model, or was recorded in part.
    ModelError
        If the model cannot be loaded, or has other tokens.
    """
    name = options.model or trace.header.model.get("id")
    if trace.header.source != "model" or not name:
        raise TraceError(
            f"{trace.path} was imported and has no model, which the closed loop runs again",
            "Record a trace with kvscope trace, or leave --perplexity out.",
        )
    if len(trace.layers) != trace.header.n_layers:
        raise TraceError(
            f"{trace.path} holds {len(trace.layers)} of {trace.header.n_layers} layers, and policies act in all",
            "Record it again without --layers.",
        )
    if trace.header.head_numbers:
        raise TraceError(
            f"{trace.path} holds {trace.heads} of {trace.header.n_heads} query heads, and policies act in all",
            "Record it again without --heads.",
        )
    revision = None if options.model else trace.header.model.get("revision")
    loaded = load(str(name), revision=revision, dtype=options.dtype, device=device, device_map=options.device_map)
    vocabulary = loaded.text_config.vocab_size
    passages = []
    for sequence in trace.sequences:
        tokens = trace.tokens(sequence.index)
        if tokens["token_id"].max() >= vocabulary:
            raise ModelError(
                f"model {name} has {vocabulary} tokens, and the trace has token {tokens['token_id'].max()}",
                "Name the model that was traced with --model.",
            )
        ids = torch.from_numpy(tokens["token_id"].to_numpy().astype("int64"))
        passages.append(Passage(sequence, ids, tokens["logprob"].to_numpy()))
    return loaded.model, passages
