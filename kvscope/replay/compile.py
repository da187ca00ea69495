"""Compilation of replays: `compile_replay` checks all input and returns a job that only has to be executed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from kvscope.closed_loop.feasible import require_closed, require_decodable, require_merging
from kvscope.core.budget import Budget, parse_budgets
from kvscope.core.cache_scheme import parse_caches
from kvscope.core.errors import KvscopeError, TraceError, UsageError
from kvscope.core.merge_scheme import parse_merges
from kvscope.core.options import OutputOptions, ReplayOptions
from kvscope.core.progress import Progress, part_of
from kvscope.engine.cache_size import with_size
from kvscope.engine.feasible import make_plan, named_policies
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.provenance import replay_record, source_of
from kvscope.engine.runs import RunSpec, Tally, runs_of
from kvscope.engine.signals import measurable
from kvscope.kernels.device import torch_device
from kvscope.metrics import Metric
from kvscope.policies.base import Policy
from kvscope.policies.press import Press
from kvscope.policies.spec import Named
from kvscope.presses.build import build
from kvscope.replay.feasible import require_answers, require_replayable, require_steps
from kvscope.replay.footprint import Footprint
from kvscope.replay.layer_group import step_through
from kvscope.replay.open_loop import OpenLoop
from kvscope.replay.quantised import open_runs, step_quantised
from kvscope.results.answers import SCORE
from kvscope.results.outcome import OUTCOMES
from kvscope.results.store import Replay
from kvscope.results.writer import ReplayWriter
from kvscope.trace.reader import Trace

if TYPE_CHECKING:
    from kvscope.closed_loop.generation import GenerateJob
    from kvscope.closed_loop.job import ClosedLoopJob

OPEN_SHARE = 0.3  # share of the progress bar that the open loop takes in a replay with a closed loop
CLOSED_SHARE = 0.5  # where the closed loop ends in a replay that generates answers too


@dataclass(frozen=True)
class ReplayJob:
    """A replay whose input has been checked.

    Attributes
    ----------
    open : OpenLoop
        The runs over recorded attention.
    closed : ClosedLoopJob or None
        The same plans inside the model, without the clairvoyant bounds, which run in the open loop only.
    skipped : dict of str to str
        For the label of each requested policy that cannot run on this trace: the reason. Empty unless
        `ReplayOptions.skip_unsupported` is set.
    skipped_metrics : dict of str to str
        For the name of each metric whose signal the trace lacks: the reason.
    generate : GenerateJob or None
        Continues the prompts under the closed runs, and scores what the model says.
    remedies : dict of str to str
        What to do about each entry of `skipped`.
    """

    open: OpenLoop
    closed: ClosedLoopJob | None
    skipped: Mapping[str, str]
    skipped_metrics: Mapping[str, str]
    generate: GenerateJob | None = None
    remedies: Mapping[str, str] = field(default_factory=dict)

    @property
    def runs(self) -> list[RunSpec]:
        """Every run, those of the open loop first."""
        return [*self.open.runs, *(() if self.closed is None else self.closed.runs)]

    @property
    def plans(self) -> list[EvictionPlan]:
        """The plan of each policy that is run."""
        return list(dict.fromkeys(run.plan for run in self.runs))

    @property
    def metrics(self) -> list[Metric]:
        """The metrics that are computed for each run."""
        return list(self.open.metrics)

    @property
    def metric_names(self) -> list[str]:
        """Names of all metrics that the replay will have, those of the closed loop and of answers included."""
        closed = () if self.closed is None else tuple(OUTCOMES)
        answers = () if self.generate is None else (SCORE,)
        return [*(metric.name for metric in self.metrics), *closed, *answers]

    @property
    def footprint(self) -> Footprint:
        """The largest amount of memory that the open loop uses at a time."""
        return max(self.open.footprints.values(), key=lambda one: one.bytes)

    def execute(self, output: OutputOptions, progress_callback: Progress | None = None) -> Replay:
        """Execute the job and return the replay that was written to `output`.

        Parameters
        ----------
        output : OutputOptions
            Folder, and whether to replace an existing one.
        progress_callback : callable, optional
            Called with the completed share, from 0 to 1.

        Raises
        ------
        ReplayError
            If a run is invalid: nothing was evicted although the budget is exceeded, or scores are not numbers.
        ModelError
            If the model's losses differ from those in the trace.
        OutputExists, ResultError
            If the output exists, or cannot be written.
        """
        started, trace = time.monotonic(), self.open.trace
        share = 1.0 if self.closed is None else OPEN_SHARE
        source = source_of(trace)
        if self.generate is not None:
            source = self.generate.scored_as(source)
        record = replay_record(
            source,
            trace.sequences,
            self.runs,
            self.metrics,
            self.open.prefill,
            output.command,
            self.skipped_metrics,
            str(self.open.device),
        )
        with ReplayWriter(output.path, record, force=output.force) as writer:
            part = part_of(progress_callback, 0, share)
            coded = any(run.cache is not None for run in self.open.runs)
            tally = self._opened(writer, part) if coded else step_through(self.open, writer, progress=part)
            counted = {run.number: tally.of(run.number) for run in self.open.runs}
            if self.closed is not None:
                end = 1.0 if self.generate is None else CLOSED_SHARE
                tally = self.closed.execute(writer, part_of(progress_callback, share, end))
                counted |= {run.number: tally.of(run.number) for run in self.closed.runs}
            if self.generate is not None:
                self.generate.execute(writer, part_of(progress_callback, CLOSED_SHARE, 1))
            return writer.finish(counted, seconds=round(time.monotonic() - started, 3))

    def _opened(self, writer: ReplayWriter, progress: Progress | None) -> Tally:
        """Execute the open loop: runs in 16 bit over recorded rows, those with quantised caches over their own."""
        plain = [run for run in self.open.runs if run.cache is None]
        coded = [run for run in self.open.runs if run.cache is not None]
        share, tally = len(plain) / max(1, len(self.open.runs)), Tally()
        if plain:
            tally.add(step_through(replace(self.open, runs=plain), writer, progress=part_of(progress, 0, share)))
        if coded:
            tally.add(step_quantised(replace(self.open, runs=coded), writer, part_of(progress, share, 1)))
        return tally


def compile_replay(
    trace: Trace,
    policies: Named | Sequence[Named],
    budgets: str | float | Budget | Sequence[str | float | Budget] = "20%",
    options: ReplayOptions = ReplayOptions(),  # noqa: B008  frozen
) -> ReplayJob:
    """Check a replay of policies over a trace and return it as a job; nothing is written.

    Parameters
    ----------
    trace : Trace
        Recorded attention.
    policies, budgets
        As of `kvscope.replay`.
    options : ReplayOptions
        All other choices.

    Raises
    ------
    UsageError
        For unknown names, parameters or budgets; if protected keys exceed the budget; if no policy can run.
    TraceError
        If the trace lacks a signal that a policy or a named metric needs, or data that the closed loop needs.
    ModelError
        If the model of a closed loop cannot be loaded, or its attention cannot be observed.
    ReplayError
        If there is no step to score, or the model fails its self-check.
    """
    chosen, limits = named_policies(policies, options.plan.params), parse_budgets(budgets)
    if options.generate is not None:
        require_answers(trace, options)
    metrics, skipped_metrics = measurable(trace, options.metrics)
    require_steps(trace, options.prefill)
    device = torch_device(options.device)
    plans, refused = _plans(trace, chosen, limits, options)
    skipped, remedies = ({label: getattr(why, part) for label, why in refused.items()} for part in ("what", "todo"))
    caches, loaded = parse_caches(options.plan.caches), None
    every = runs_of(plans, limits, caches=caches, merges=parse_merges(options.plan.merges, caches))
    if any(isinstance(plan.policy, Press) for plan in plans):
        from kvscope.closed_loop.press_choices import followed  # loads transformers

        every, loaded = followed(trace, every, options)
    metrics = with_size(metrics, caches)
    runs, alone = open_runs(trace, every, options)
    closed = generate = None
    if options.closed is not None:
        from kvscope.closed_loop.compile import compile_trace_loop  # loads transformers

        closed, generate = compile_trace_loop(trace, every, metrics, options, loaded, runs)
    opened = OpenLoop(trace, runs, metrics, options.prefill, device)
    return ReplayJob(opened, closed, skipped | alone, skipped_metrics, generate, remedies)


def unsupported(
    trace: Trace, policy: Policy, budget: Budget | None, options: ReplayOptions
) -> UsageError | TraceError | None:
    """Return why a policy cannot run on a trace under a budget, as `compile_replay` would raise it; None if it can.

    The budget of a policy that holds to none is None. The model of a closed loop is not loaded.
    """
    try:
        _plan(trace, policy, [] if budget is None else [budget], options)
    except (UsageError, TraceError) as error:
        return error
    return None


def _plans(
    trace: Trace, policies: Sequence[Policy], budgets: Sequence[Budget], options: ReplayOptions
) -> tuple[list[EvictionPlan], dict[str, KvscopeError]]:
    """Return the plans that can run, and the error of each policy that is skipped; raises if none may be skipped."""
    plans: list[EvictionPlan] = []
    skipped: dict[str, KvscopeError] = {}
    for policy in policies:
        try:
            plans.append(_plan(trace, policy, budgets, options))
        except (UsageError, TraceError) as error:
            if not options.skip_unsupported:
                raise
            skipped[policy.label] = error
    if not plans:
        reason = next(iter(skipped.values())).what
        raise UsageError(f"no selected policy can run on {trace.path}: {reason}", "Select other policies.")
    if options.closed is not None and all(plan.policy.traits.clairvoyant for plan in plans):
        require_closed(plans[0], options.closed.positions)
    return plans, skipped


def _plan(trace: Trace, policy: Policy, budgets: Sequence[Budget], options: ReplayOptions) -> EvictionPlan:
    """Return the plan of a policy; raises UsageError or TraceError if it cannot run on the trace."""
    if isinstance(policy, Press):
        build(policy.call)  # before the model is loaded
    plan = make_plan(policy, options.plan, latent=trace.header.latent_size is not None)
    require_replayable(trace, plan, budgets, options.prefill)
    if options.closed is not None and not policy.traits.clairvoyant:  # bounds run in the open loop alone
        require_closed(plan, options.closed.positions)
        require_merging(plan, options.plan.merges)
        if options.generate is not None:
            require_decodable(plan)
    return plan
