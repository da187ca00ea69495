"""Compilation of a parameter search: all input is checked here, and the job only has to be executed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import product

from kvscope.core.budget import Budget
from kvscope.core.errors import UsageError
from kvscope.core.options import TuneLevel, TuneOptions
from kvscope.engine.allocation import ALLOCATORS
from kvscope.engine.plan import EvictionPlan
from kvscope.kernels.device import torch_device
from kvscope.metrics import METRICS, Metric
from kvscope.policies.base import Policy
from kvscope.policies.spec import parse_policies
from kvscope.policies.tuned import Tuned
from kvscope.replay.feasible import require_replayable, require_steps
from kvscope.trace.reader import Trace
from kvscope.tune.search import Place, TuneJob, run_as


def compile_tune(
    traces: Sequence[Trace],
    policy: str,
    grid: Mapping[str, Sequence[str]],
    budget: str | int | Budget = "20%",
    options: TuneOptions = TuneOptions(),  # noqa: B008  frozen
) -> TuneJob:
    """Return the job that finds the best setting of a policy for the model, each layer or each head.

    Parameters
    ----------
    traces : sequence of Trace
        Traces of one model.
    policy : str
        The policy to tune, as on the command line.
    grid : mapping of str to sequence of str
        Values of each parameter; every combination is tried.
    budget : str, int or Budget
        The budget of every setting.
    options : TuneOptions
        All other choices.

    Raises
    ------
    UsageError
        For an unknown name or value, a metric without a best value, settings that protect different keys or cannot
        decide as asked, fewer than two sequences, traces of different models, or a trace that is given twice.
    TraceError
        If a trace lacks a signal.
    ReplayError
        If a sequence has no step to score.
    """
    metric = _metric(options.metric)
    latent = traces[0].header.latent_size is not None
    settings = _with_scope(_settings(policy, grid), options.scope)
    _require_own_heads([run_as(each, options.scope, latent=latent) for each in settings], options.level)
    _require_equal_heads(traces, options.level)
    searched, held_out = _split(traces, options.held_out)
    limit, device = Budget.parse(budget), torch_device(options.device)
    layers = tuple(traces[0].layers)
    combined = tuple(settings[:1] if options.level is TuneLevel.model else settings)
    # Whether the heads of one policy may use these settings does not depend on which head uses which.
    candidate = Tuned(options.source, combined, layers, ((0,),) * len(layers))
    for trace in traces:
        for each in (candidate, *settings):
            plan = run_as(each, options.scope, latent=latent)
            require_replayable(trace, plan, [limit], options.prefill)
        require_steps(trace, options.prefill)
    return TuneJob(traces, settings, list(grid), limit, metric, options, device, searched, held_out)


def _metric(name: str) -> Metric:
    metric = METRICS.get(name)
    if metric.direction == "none" or metric.pooled:
        raise UsageError(
            f"metric {name} has no best value for a step", "Use --metric retained_mass or --metric ideal_cosine."
        )
    return metric


def usual_grid(policy: str) -> dict[str, list[str]]:
    """Return the values that the policy declares for a search; raises UsageError if it declares none."""
    (made,) = parse_policies([policy])
    grid = {item.name: [str(value) for value in item.metadata.get("search", ())] for item in fields(made)}
    found = {name: values for name, values in grid.items() if values}
    if not found:
        raise UsageError(f"{made.name} does not declare values for a search", "Give values: --grid NAME=VALUE,VALUE")
    return found


def _settings(policy: str, grid: Mapping[str, Sequence[str]]) -> list[Policy]:
    if not grid or any(not values for values in grid.values()):
        raise UsageError("there is nothing to search", "Give values: --grid alpha=0.1,0.3,0.5")
    found = []
    for values in product(*grid.values()):
        found += parse_policies([policy], dict(zip(grid, values, strict=True)))
    distinct = list(dict.fromkeys(found))
    if len(distinct) < 2:
        raise UsageError("the grid has one setting", "Give two values or more: --grid alpha=0.1,0.3,0.5")
    return distinct


def _with_scope(settings: Sequence[Policy], scope: str | None) -> list[Policy]:
    """Return settings of which those with a parameter for it say what decides, so that a file of them says it too."""
    return list(settings) if scope is None else [run_as(each, scope, latent=False).policy for each in settings]


def _require_own_heads(plans: Sequence[EvictionPlan], level: TuneLevel) -> None:
    """Raise UsageError if heads are to be tuned one by one but do not decide independently."""
    for plan in plans:
        if level == "head" and plan.decides == "layer":
            head = ", or --scope kv_head" if plan.scope == "layer" else ""  # not where its rule decides so
            raise UsageError(f"{plan.policy.label} decides per layer", f"Use --per layer or --per model{head}.")
        if level == "head" and ALLOCATORS.get(plan.allocate).spans == "heads":
            raise UsageError(f"the heads of {plan.policy.label} share a budget", "Use --per layer or --per model.")


def _require_equal_heads(traces: Sequence[Trace], level: TuneLevel) -> None:
    """Raise UsageError if heads are to be tuned one by one and layers have different numbers of them."""
    for trace in traces:
        if level == "head" and len({trace.heads_of(layer).kv_heads for layer in trace.layers}) > 1:
            raise UsageError(f"the layers of {trace.path} differ in their heads", "Use --per layer or --per model.")


def _split(traces: Sequence[Trace], held_out: int | None) -> tuple[list[Place], list[Place]]:
    if len({trace.identity for trace in traces}) < len(traces):
        raise UsageError("a trace is given twice", "Give each trace once: held-out text must not be searched.")
    shapes = {(tuple(trace.layers), trace.heads, trace.kv_heads, str(trace.header.model.id)) for trace in traces}
    if len(shapes) != 1:
        raise UsageError("the traces are of different models", "Tune on traces of one model.")
    every = [(number, sequence.index) for number, trace in enumerate(traces) for sequence in trace.sequences]
    count = max(1, len(every) // 4) if held_out is None else held_out
    if not 1 <= count < len(every):
        raise UsageError(
            f"{count} of {len(every)} sequences cannot be held out",
            "Record several prompts, so that the gain is measured on text that was not searched.",
        )
    return every[:-count], every[-count:]
