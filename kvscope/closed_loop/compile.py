"""Jobs of the closed loop: everything that can be wrong with one is found here, before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kvscope.closed_loop.decode import attention_facts, require_decodable
from kvscope.closed_loop.feasible import closed_runs, require_closed
from kvscope.closed_loop.gates import require_gates
from kvscope.closed_loop.job import ClosedLoopJob, TokenSink
from kvscope.closed_loop.passage import Passage
from kvscope.closed_loop.perplexity import PerplexityJob, describe_texts, passages_of_texts
from kvscope.closed_loop.self_check import self_check
from kvscope.closed_loop.trace_passages import load_model_of, passages_of
from kvscope.closed_loop.verify import VerifyJob, shortened
from kvscope.core.budget import Budget, parse_budgets
from kvscope.core.errors import UsageError
from kvscope.core.options import (
    Loop,
    ModelSource,
    PerplexityOptions,
    Positions,
    Prefill,
    ReplayOptions,
    VerifyOptions,
)
from kvscope.engine.feasible import Workload, make_plan, named_policies, require_feasible
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.runs import RunSpec, Tally, runs_of
from kvscope.metrics import METRICS, Metric
from kvscope.model.derotation import derotations
from kvscope.model.loading import load
from kvscope.model.prompts import read_text
from kvscope.policies.base import Policy
from kvscope.trace.reader import Trace

Policies = Sequence[str | Policy]
Budgets = str | Sequence[str | int | Budget]


def compile_closed_loop(
    model: Any, passages: Sequence[Passage], runs: Sequence[RunSpec], metrics: Sequence[Metric], prefill: Prefill
) -> ClosedLoopJob:
    """Return the job of runs that are known to fit the passages, once the model itself has been checked.

    Raises
    ------
    UsageError
        If a gate belongs to another model.
    ModelError
        If the model cannot be observed, or its keys cannot be given other positions.
    ReplayError
        If a run that evicts nothing differs from the model's own attention.
    """
    for plan in _plans_of(runs):
        require_gates(plan, model)
    with torch.inference_mode():
        layers = self_check(model, passages[0].ids, prefill)
        rotary = None
        if runs[0].positions == Positions.compacted:
            rotary = derotations(model, passages[0].ids[None, :1].to(model.get_input_embeddings().weight.device))
    return ClosedLoopJob(model, passages, runs, metrics, prefill, layers, rotary)


def compile_trace_loop(
    trace: Trace, open_runs: Sequence[RunSpec], metrics: Sequence[Metric], options: ReplayOptions
) -> ClosedLoopJob:
    """Return the job that runs the model of a trace again, with the plans of open runs that are known to fit it.

    Raises
    ------
    TraceError
        If the trace does not name a model, or was recorded in part.
    ModelError
        If the model cannot be loaded, has other tokens, or cannot be observed.
    ReplayError
        If the model fails its self-check.
    """
    assert options.closed is not None, "asked for"
    loaded = load_model_of(trace, options.closed, options.device)
    runs = closed_runs(open_runs, options.closed.positions)
    return compile_closed_loop(loaded.model, passages_of(trace, loaded), runs, metrics, options.prefill)


def compile_perplexity(
    source: ModelSource,
    files: Sequence[Path],
    policies: Policies,
    budgets: Budgets = "20%",
    options: PerplexityOptions = PerplexityOptions(),  # noqa: B008  frozen
) -> PerplexityJob:
    """Return the job that measures what policies cost in perplexity on text files.

    The tokens of each file are cut into windows, each of which begins with the tokenizer's first token, if it has one,
    and an empty cache. All other tokens are scored while the cache is held to the budget: streaming prefill. With a
    prompt, that many tokens of each window are read with the full cache first, and are not scored.

    Raises
    ------
    UsageError
        Unknown names, parameters or budgets; a text too short; a window beyond the context.
    ModelError
        The model cannot be loaded or observed.
    ReplayError
        If the model fails its self-check.
    """
    plans = [make_plan(policy, options.plan) for policy in named_policies(policies, options.plan.params)]
    for plan in plans:
        require_closed(plan, options.positions)
    limits = parse_budgets(budgets)
    metrics = [METRICS.get(name) for name in (options.metrics or METRICS.names())]
    if not files:
        raise UsageError("no text is named", "Name one or more text files.")
    texts = {file: read_text(file) for file in files}
    loaded = load(source)
    passages, window = passages_of_texts(loaded, texts, options)
    prefill = Prefill.stream if options.prompt == 1 else Prefill.full
    read = describe_texts(loaded, texts, passages, window)
    layers = read.layers
    workload = Workload([passage.sequence for passage in passages], prefill, layers, read.kv_heads, len(layers))
    for plan in plans:
        require_feasible(plan, limits, workload)
    runs = runs_of(plans, limits, Loop.closed, options.positions)
    return PerplexityJob(compile_closed_loop(loaded.model, passages, runs, metrics, prefill), read)


def compile_verify(
    trace: Trace,
    policies: Policies,
    budgets: Budgets = "20%",
    options: VerifyOptions = VerifyOptions(),  # noqa: B008  frozen
) -> VerifyJob:
    """Return the job that decodes a trace's tokens under each policy and budget, and compares with the closed loop.

    Raises
    ------
    UsageError
        If a policy holds every key (sparse readers), or cannot run in the closed loop; if there is nothing to decode.
    TraceError, ModelError, ReplayError
        As `compile_trace_loop`.
    """
    closed = options.closed
    closed = replace(closed, dtype="float64") if closed.dtype == "auto" else closed
    plans = [make_plan(policy, options.plan) for policy in named_policies(policies, options.plan.params)]
    limits, chosen = parse_budgets(budgets), trace.sequences[: options.sequences]
    cut = [shortened(sequence, options.tokens, options.prefill) for sequence in chosen]
    workload = Workload(cut, options.prefill, tuple(trace.layers), trace.kv_heads, trace.header.n_layers)
    for plan in plans:
        require_closed(plan, closed.positions)
        require_decodable(plan)
        require_feasible(plan, limits, workload)
    loaded = load_model_of(trace, closed, options.device)
    whole = passages_of(trace, loaded)
    passages = [Passage(own, text.ids[: own.length]) for own, text in zip(cut, whole[: len(cut)], strict=True)]
    runs = runs_of(plans, limits, Loop.closed, closed.positions)
    job = compile_closed_loop(loaded.model, passages, runs, [], options.prefill)
    with torch.inference_mode():
        facts = attention_facts(loaded.model, passages[0].ids[None].to(loaded.device))
    return VerifyJob(job, facts)


def evaluate(
    model: Any,
    passages: Sequence[Passage],
    runs: Sequence[RunSpec],
    metrics: Sequence[Metric],
    prefill: Prefill,
    sink: TokenSink,
    *,
    progress: Callable[[float], None] | None = None,
) -> Tally:
    """Run policies inside a loaded model over texts; `sink` gets losses, residency and fidelity.

    Raises
    ------
    UsageError
        If a plan cannot run in the closed loop, or not on these texts.
    ModelError, ReplayError
        As `compile_closed_loop` and `ClosedLoopJob.execute`.
    """
    config = model.config.get_text_config(decoder=True)
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    layers = tuple(range(config.num_hidden_layers))
    workload = Workload([passage.sequence for passage in passages], prefill, layers, kv_heads, len(layers))
    for plan in _plans_of(runs):
        own = [run for run in runs if run.plan == plan]
        require_closed(plan, own[0].positions)
        require_feasible(plan, [run.budget for run in own if run.budget is not None], workload)
    return compile_closed_loop(model, passages, runs, metrics, prefill).execute(sink, progress)


def _plans_of(runs: Sequence[RunSpec]) -> list[EvictionPlan]:
    return list(dict.fromkeys(run.plan for run in runs))
