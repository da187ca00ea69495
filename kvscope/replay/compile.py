"""A replay is compiled, then executed: everything that can be wrong with it is found by `compile_replay`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvscope.closed_loop.feasible import require_closed
from kvscope.core.budget import Budget, parse_budgets
from kvscope.core.errors import ReplayError, TraceError, UsageError
from kvscope.core.options import OutputOptions, Prefill, ReplayOptions
from kvscope.engine.device import torch_device
from kvscope.engine.feasible import Workload, make_plan, named_policies, require_feasible
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.provenance import replay_record, source_of
from kvscope.engine.runs import RunSpec, runs_of
from kvscope.engine.signals import measurable, require
from kvscope.metrics import Metric
from kvscope.policies.base import Policy
from kvscope.replay.footprint import Footprint
from kvscope.replay.layer_group import step_through
from kvscope.replay.open_loop import OpenLoop
from kvscope.results.store import Replay
from kvscope.results.writer import ReplayWriter
from kvscope.trace.reader import Trace

if TYPE_CHECKING:
    from kvscope.closed_loop.job import ClosedLoopJob

OPEN_SHARE = 0.3  # of the progress of a replay with a closed loop
Progress = Callable[[float], None]


@dataclass(frozen=True)
class ReplayJob:
    """A replay in which nothing is left to check.

    Attributes
    ----------
    open : OpenLoop
        The runs over recorded attention.
    closed : ClosedLoopJob or None
        The same plans inside the model; bounds, which know the future, have an open run alone.
    skipped : dict of str to str
        Label of each policy that was asked for and cannot run here, and why; empty unless
        `ReplayOptions.skip_unsupported`.
    skipped_metrics : dict of str to str
        Name of each metric that the trace has no signal for, and why.
    """

    open: OpenLoop
    closed: ClosedLoopJob | None
    skipped: Mapping[str, str]
    skipped_metrics: Mapping[str, str]

    @property
    def runs(self) -> list[RunSpec]:
        """Every run, those of the open loop first."""
        return [*self.open.runs, *(() if self.closed is None else self.closed.runs)]

    @property
    def plans(self) -> list[EvictionPlan]:
        """The plan of each policy that runs."""
        return list(dict.fromkeys(run.plan for run in self.open.runs))

    @property
    def metrics(self) -> list[Metric]:
        """What is computed of each run."""
        return list(self.open.metrics)

    @property
    def footprint(self) -> Footprint:
        """The most that the open loop has in memory at once."""
        return max(self.open.footprints.values(), key=lambda one: one.bytes)

    def execute(self, output: OutputOptions, progress_callback: Progress | None = None) -> Replay:
        """Return the replay, written to `output`.

        Parameters
        ----------
        output : OutputOptions
            Folder, and whether to replace an existing one.
        progress_callback : callable, optional
            Called with the share that is done.

        Raises
        ------
        ReplayError
            If a replay is no result: nothing evicted below the length, scores that are not numbers.
        ModelError
            If the model gives other losses than the trace.
        OutputExists, ResultError
            If the output exists, or cannot be written.
        """
        started, trace = time.monotonic(), self.open.trace
        share = 1.0 if self.closed is None else OPEN_SHARE
        record = replay_record(
            source_of(trace),
            trace.sequences,
            self.runs,
            self.metrics,
            self.open.prefill,
            output.command,
            self.skipped_metrics,
        )
        with ReplayWriter(output.path, record, force=output.force) as writer:
            tally = step_through(self.open, writer, progress=_part(progress_callback, 0, share))
            counted = {run.number: tally.of(run.number) for run in self.open.runs}
            if self.closed is not None:
                tally = self.closed.execute(writer, _part(progress_callback, share, 1))
                counted |= {run.number: tally.of(run.number) for run in self.closed.runs}
            return writer.finish(counted, seconds=round(time.monotonic() - started, 3))


def compile_replay(
    trace: Trace,
    policies: Sequence[str | Policy],
    budgets: str | Sequence[str | int | Budget] = "20%",
    options: ReplayOptions = ReplayOptions(),  # noqa: B008  frozen
) -> ReplayJob:
    """Return the job that replays policies over a trace, with everything checked; nothing is written.

    Parameters
    ----------
    trace : Trace
        Recorded attention.
    policies : sequence of str or Policy
        As on the command line (``a2sf:alpha=0.7``), or ready policies.
    budgets : str, or sequence of str, int or Budget
        ``"20%,256"``; every policy runs under every budget.
    options : ReplayOptions
        All else.

    Raises
    ------
    UsageError
        Unknown names, parameters or budgets; protected keys beyond the budget; no policy that can run.
    TraceError
        If the trace lacks a signal that a policy or a named metric needs, or what the closed loop needs.
    ModelError
        If the model of a closed loop cannot be loaded or observed.
    ReplayError
        If there is no step to score, or the model fails its self-check.
    """
    chosen, limits = named_policies(policies, options.plan.params), parse_budgets(budgets)
    metrics, skipped_metrics = measurable(trace, options.metrics)
    require_steps(trace, options.prefill)
    device = torch_device(options.device)
    plans, skipped = _plans(trace, chosen, limits, options)
    runs = runs_of(plans, limits)
    closed = None
    if options.closed is not None:
        from kvscope.closed_loop.compile import compile_trace_loop  # loads transformers

        closed = compile_trace_loop(trace, runs, metrics, options)
    return ReplayJob(OpenLoop(trace, runs, metrics, options.prefill, device), closed, skipped, skipped_metrics)


def require_replayable(trace: Trace, plan: EvictionPlan, budgets: Sequence[Budget], prefill: Prefill) -> None:
    """Raise where a plan cannot run on a trace under these budgets: signals, phase, room for protected keys.

    Raises
    ------
    UsageError
        If the plan makes no sense here.
    TraceError
        If the trace lacks a signal.
    """
    require(trace, plan)
    layers = tuple(trace.layers)
    require_feasible(plan, budgets, Workload(trace.sequences, prefill, layers, trace.kv_heads, trace.header.n_layers))


def require_steps(trace: Trace, prefill: Prefill) -> None:
    """Raise ReplayError if a sequence has no step to score."""
    for sequence in trace.sequences:
        if prefill is Prefill.full and sequence.prompt >= sequence.length:
            raise ReplayError(
                f"sequence {sequence.index} of {trace.path} is all prompt: full prefill leaves no step to score",
                "Use --prefill stream, or record tokens after the prompt.",
            )


def _plans(
    trace: Trace, policies: Sequence[Policy], budgets: Sequence[Budget], options: ReplayOptions
) -> tuple[list[EvictionPlan], dict[str, str]]:
    """Return the plans that can run, and why each other policy cannot; raises unless those are to be skipped."""
    plans, skipped = [], {}
    for policy in policies:
        try:
            plan = make_plan(policy, options.plan)
            require_replayable(trace, plan, budgets, options.prefill)
            if options.closed is not None and not policy.traits.clairvoyant:  # bounds run in the open loop alone
                require_closed(plan, options.closed.positions)
            plans.append(plan)
        except (UsageError, TraceError) as error:
            if not options.skip_unsupported:
                raise
            skipped[policy.label] = error.what
    if not plans:
        raise UsageError(f"no policy can run on {trace.path}: {next(iter(skipped.values()))}", "Name other policies.")
    if options.closed is not None and all(plan.policy.traits.clairvoyant for plan in plans):
        require_closed(plans[0], options.closed.positions)
    return plans, skipped


def _part(callback: Progress | None, low: float, high: float) -> Progress | None:
    """Return a callback for a part of the work."""
    return None if callback is None else lambda share: callback(low + share * (high - low))
