"""Compilation of closed-loop jobs: all input is checked here, before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from kvscope.closed_loop.decode import attention_facts
from kvscope.closed_loop.feasible import closed_runs, require_closed, require_decodable, require_merging
from kvscope.closed_loop.gates import require_gates
from kvscope.closed_loop.generation import GenerateJob, examples_to_generate
from kvscope.closed_loop.job import ClosedLoopJob, TokenSink
from kvscope.closed_loop.model_limits import require_mergeable, require_positions, require_quantisable, unrotated_of
from kvscope.closed_loop.model_signals import ModelSignals
from kvscope.closed_loop.passage import Passage, probe_of, require_decodable_images
from kvscope.closed_loop.perplexity import PerplexityJob, describe_texts, passages_of_texts
from kvscope.closed_loop.press_choices import with_choices
from kvscope.closed_loop.readings import with_readings
from kvscope.closed_loop.self_check import self_check
from kvscope.closed_loop.trace_passages import load_model_of, passages_of
from kvscope.closed_loop.verify import VerifyJob, shortened
from kvscope.core.budget import Budget, parse_budgets
from kvscope.core.cache_scheme import parse_caches
from kvscope.core.errors import UsageError
from kvscope.core.merge_scheme import parse_merges
from kvscope.core.model_types import CausalModel
from kvscope.core.options import (
    GenerateOptions,
    Loop,
    ModelSource,
    PerplexityOptions,
    Positions,
    Prefill,
    ReplayOptions,
    VerifyOptions,
)
from kvscope.core.text_files import read_text, require_one_input
from kvscope.engine.cache_size import with_size
from kvscope.engine.feasible import Workload, make_plan, named_policies, require_feasible
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.rows import own_counts
from kvscope.engine.runs import RunSpec, Tally, runs_of
from kvscope.kernels.device import torch_device
from kvscope.metrics import METRICS, Metric
from kvscope.model.derotation import derotations
from kvscope.model.loading import Loaded, load
from kvscope.model.obstacles import require_registry
from kvscope.model.run import stop_ids
from kvscope.model.selfcheck import LayerCaches, layer_caches, layer_count
from kvscope.policies.spec import Named
from kvscope.trace.reader import TokenSequence, Trace

Policies = Named | Sequence[Named]
Budgets = str | float | Budget | Sequence[str | float | Budget]


def compile_closed_loop(
    model: CausalModel,
    passages: Sequence[Passage],
    runs: Sequence[RunSpec],
    metrics: Sequence[Metric],
    prefill: Prefill,
    caches: LayerCaches | None = None,
) -> ClosedLoopJob:
    """Check the model and return the job of runs that have been checked against the passages; `caches` if known.

    Raises
    ------
    UsageError
        If a gate was trained for another model.
    ModelError
        If the model's attention cannot be observed, or the positions of its keys cannot be changed.
    ReplayError
        If a run that evicts nothing differs from the model's own attention.
    """
    with torch.inference_mode():
        require_registry(model)
        probe = probe_of(model, passages)
        caches = caches or layer_caches(model, probe)
        kv_heads, shared = caches.kv_heads, caches.shared
        for plan in _plans_of(runs):
            require_gates(plan, model, kv_heads.values())
        require_positions(passages, runs)
        require_quantisable(model, passages, runs)
        require_mergeable(model, passages, runs)
        layers, token = self_check(model, probe[0], prefill), probe[:, :1]
        rotary = derotations(model, token) if runs[0].positions == Positions.compacted else None
        given = ModelSignals.of(model, _plans_of(runs), probe, passages)
        unrotated = unrotated_of(model, token, runs)
    runs = with_choices(model, passages, runs, prefill)
    heads = own_counts(kv_heads[layer] for layer in layers)
    return ClosedLoopJob(model, passages, runs, metrics, prefill, layers, rotary, heads, shared, given, unrotated)


def compile_trace_loop(
    trace: Trace,
    runs: Sequence[RunSpec],
    metrics: Sequence[Metric],
    options: ReplayOptions,
    loaded: Loaded | None = None,
    opened: Sequence[RunSpec] | None = None,
) -> tuple[ClosedLoopJob, GenerateJob | None]:
    """Return the job that runs the model of a trace again, with plans of runs that were checked against that trace.

    The second job lets it continue the prompts under the same runs, if options ask for that. `loaded` is its model,
    and `opened` are the runs of the open loop, by default all of them.

    Raises
    ------
    UsageError
        As `compile_generation`.
    TraceError
        If the trace does not name a model, or lacks layers or heads.
    ModelError
        If the model cannot be loaded, has other tokens, or its attention cannot be observed.
    ReplayError
        If the model fails its self-check.
    """
    assert options.closed is not None, "called only with a closed loop"
    loaded = loaded or load_model_of(trace, options.closed, str(torch_device(options.device)))
    inside = closed_runs(runs, options.closed.positions, opened)
    passages = with_readings(loaded, passages_of(trace, loaded), _plans_of(inside))
    closed = compile_closed_loop(loaded.model, passages, inside, metrics, options.prefill)
    return closed, None if options.generate is None else compile_generation(trace, closed, loaded, options.generate)


def compile_generation(trace: Trace, closed: ClosedLoopJob, loaded: Loaded, options: GenerateOptions) -> GenerateJob:
    """Return the job that lets the model of a closed loop continue the prompts of a trace under each of its runs.

    Raises
    ------
    UsageError
        If a metric is unknown or needs a package that is not installed; if a policy holds every key (sparse readers);
        if no token or more tokens than the model's context holds are to be generated; if prompts have images and
        are to be decoded token by token.
    ModelError
        If the model has layers that cannot be decoded with a shortened cache.
    """
    examples = examples_to_generate(trace, options.metric)
    for plan in _plans_of(closed.runs):
        require_decodable(plan)
    require_decodable_images(closed.passages, closed.prefill)
    with torch.inference_mode():
        facts = attention_facts(loaded.model, closed.passages[0].text_ids[None].to(loaded.device))
    job = GenerateJob(closed, facts, examples, loaded.tokenizer, stop_ids(loaded), options.max_new_tokens)
    for example in examples:
        _require_room(closed.passages[example.sequence].sequence, job.most_tokens(example.sequence), loaded.context)
    return job


def _require_room(sequence: TokenSequence, new: int, context: int | None) -> None:
    """Raise UsageError if nothing is to be generated after a prompt, or more than the model's context holds."""
    if new < 1:
        raise UsageError(
            f"sequence {sequence.index} has no tokens after its prompt, so its answer would be empty",
            "Give the length of an answer: --max-new-tokens 32.",
        )
    if context is not None and sequence.prompt + new > context:
        raise UsageError(
            f"sequence {sequence.index} has a prompt of {sequence.prompt} tokens, and {new} more exceed the model's "
            f"context of {context}",
            "Lower --max-new-tokens.",
        )


def compile_perplexity(
    source: ModelSource,
    files: Sequence[Path],
    policies: Policies,
    budgets: Budgets = "20%",
    options: PerplexityOptions = PerplexityOptions(),  # noqa: B008  frozen
) -> PerplexityJob:
    """Return the job that measures the perplexity of text files under each policy and budget.

    The tokens of each file are divided into windows. Each window starts with an empty cache and the tokens that the
    tokenizer puts before every text, if there are any; then the text is scored under the budget (streaming prefill),
    without such tokens all of it but its first token. If a prompt length is given, that many tokens of each window are
    read with the full cache first and are not scored.

    Raises
    ------
    UsageError
        For unknown names, parameters or budgets; if a text is too short, or a window exceeds the context.
    ModelError
        If the model cannot be loaded, or its attention cannot be observed.
    ReplayError
        If the model fails its self-check.
    """
    named = named_policies(policies, options.plan.params)
    for policy in named:  # before the model is loaded
        require_closed(make_plan(policy, options.plan, latent=False), options.positions)
        require_merging(make_plan(policy, options.plan, latent=False), options.plan.merges)
    limits, caches = parse_budgets(budgets), parse_caches(options.plan.caches)
    merges = parse_merges(options.plan.merges, caches)
    metrics = with_size([METRICS.get(name) for name in (options.metrics or METRICS.names())], caches)
    if not files:
        raise UsageError("no text file is given", "Give one or more text files.")
    require_one_input(files)
    texts = {file: read_text(file) for file in files}
    loaded = load(replace(source, device=str(torch_device(source.device))))
    reads_kinds = any("token_kinds" in policy.traits.needs for policy in named)
    read = passages_of_texts(loaded, texts, options, kinds=reads_kinds)
    passages = read.passages
    prefill = Prefill.stream if options.prompt == 1 else Prefill.full
    source_ref = describe_texts(loaded, texts, read)
    layers = source_ref.layers
    plans = [make_plan(policy, options.plan, latent=source_ref.latent_size is not None) for policy in named]
    kv_heads = tuple(source_ref.heads_of(layer).kv_heads for layer in layers)
    workload = Workload([passage.sequence for passage in passages], prefill, layers, kv_heads, len(layers))
    for plan in plans:
        require_feasible(plan, limits, workload)
    runs = runs_of(plans, limits, Loop.closed, options.positions, caches, merges)
    passages = with_readings(loaded, passages, plans)
    return PerplexityJob(compile_closed_loop(loaded.model, passages, runs, metrics, prefill), source_ref, read.notes)


def compile_verify(
    trace: Trace,
    policies: Policies,
    budgets: Budgets = "20%",
    options: VerifyOptions = VerifyOptions(),  # noqa: B008  frozen
) -> VerifyJob:
    """Return the job that decodes a trace's tokens under each policy and budget and compares that with the closed loop.

    Raises
    ------
    UsageError
        If a policy holds every key (sparse readers) or cannot run in the closed loop; if there is no token to decode.
    TraceError, ModelError, ReplayError
        As `compile_trace_loop`.
    """
    closed = options.closed
    closed = replace(closed, dtype="float64") if closed.dtype == "auto" else closed
    latent = trace.header.latent_size is not None
    named = named_policies(policies, options.plan.params)
    plans = [make_plan(policy, options.plan, latent=latent) for policy in named]
    caches = parse_caches(options.plan.caches)
    merges = parse_merges(options.plan.merges, caches)
    limits, chosen = parse_budgets(budgets), trace.sequences[: options.sequences]
    cut = [shortened(sequence, options.tokens, options.prefill) for sequence in chosen]
    kv_heads = tuple(trace.heads_of(layer).kv_heads for layer in trace.layers)
    workload = Workload(cut, options.prefill, tuple(trace.layers), kv_heads, trace.header.n_layers)
    for plan in plans:
        require_closed(plan, closed.positions)
        require_decodable(plan)
        require_feasible(plan, limits, workload)
    loaded = load_model_of(trace, closed, str(torch_device(options.device)))
    whole = passages_of(trace, loaded)
    passages = [
        Passage(part, text.ids[: part.length], prefix=text.prefix, images=text.images, kinds=text.kinds)
        for part, text in zip(cut, whole[: len(cut)], strict=True)
    ]
    require_decodable_images(passages, options.prefill)
    passages = with_readings(loaded, passages, plans)
    runs = runs_of(plans, limits, Loop.closed, closed.positions, caches, merges)
    job = compile_closed_loop(loaded.model, passages, runs, [], options.prefill)
    with torch.inference_mode():
        facts = attention_facts(loaded.model, passages[0].text_ids[None].to(loaded.device))
    return VerifyJob(job, facts)


def evaluate(
    model: CausalModel,
    passages: Sequence[Passage],
    runs: Sequence[RunSpec],
    metrics: Sequence[Metric],
    prefill: Prefill,
    sink: TokenSink,
    *,
    progress: Callable[[float], None] | None = None,
) -> Tally:
    """Run policies inside a loaded model over texts and return the counts; `sink` gets losses, residency and fidelity.

    Layers and key/value heads are those that the model's attention is called with, as in a trace of it.

    Raises
    ------
    UsageError
        If a plan cannot run in the closed loop, or not on these texts.
    ModelError, ReplayError
        As `compile_closed_loop` and `ClosedLoopJob.execute`.
    """
    with torch.inference_mode():
        caches = layer_caches(model, probe_of(model, passages))
    layers, number = tuple(sorted(caches.kv_heads)), layer_count(model.config.get_text_config(decoder=True))
    kv_heads = tuple(caches.kv_heads[layer] for layer in layers)
    workload = Workload([passage.sequence for passage in passages], prefill, layers, kv_heads, number)
    for plan in _plans_of(runs):
        plan_runs = [run for run in runs if run.plan == plan]
        require_closed(plan, plan_runs[0].positions)
        require_feasible(plan, [run.budget for run in plan_runs if run.budget is not None], workload)
    return compile_closed_loop(model, passages, runs, metrics, prefill, caches).execute(sink, progress)


def _plans_of(runs: Sequence[RunSpec]) -> list[EvictionPlan]:
    return list(dict.fromkeys(run.plan for run in runs))
