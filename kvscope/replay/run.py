"""Open-loop replay: any number of policies and budgets over one trace, which is read once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kvscope.closed_loop.options import ClosedLoopOptions, require_closed
from kvscope.core.budget import Budget, parse_budgets
from kvscope.core.errors import ReplayError, TraceError, UsageError
from kvscope.core.options import Prefill
from kvscope.engine.device import torch_device
from kvscope.engine.plan import EvictionPlan, protection
from kvscope.engine.provenance import info, of_trace
from kvscope.engine.runs import RunSpec, runs_of
from kvscope.engine.signals import measurable, require
from kvscope.policies.base import Policy
from kvscope.policies.spec import parse_policies
from kvscope.replay.footprint import Footprint, footprint
from kvscope.replay.layer_group import step_through
from kvscope.results.store import Replay
from kvscope.results.writer import ReplayWriter
from kvscope.trace.reader import Trace

OPEN_SHARE = 0.3  # of the progress of a replay with a closed loop


def replay(
    trace: Trace,
    policies: Sequence[str | Policy],
    budgets: str | Sequence[str | int | Budget] = "20%",
    *,
    output: Path,
    prefill: Prefill = Prefill.full,
    metrics: Sequence[str] | None = None,
    params: Mapping[str, str] | None = None,
    compress: str | None = None,
    allocate: str | None = None,
    accumulate: str | None = None,
    closed: ClosedLoopOptions | None = None,
    device: str = "cpu",
    progress: Callable[[float], None] | None = None,
    announce: Callable[[Footprint], None] | None = None,
    command: str | None = None,
    force: bool = False,
) -> Replay:
    """Return what policies would have kept of a trace, and how faithful that is.

    Parameters
    ----------
    trace : Trace
        Recorded attention.
    policies : sequence of str or Policy
        As on the command line (``a2sf:alpha=0.7``), or ready policies.
    budgets : str, or sequence of str, int or Budget
        ``"20%,256"``; every policy runs under every budget.
    output : Path
        Folder to write: ``reports/NAME``.
    prefill : {"full", "stream"}
        Semantics of the prompt: one choice at its end, or eviction from the first step on.
    metrics : sequence of str, optional
        Names; by default all that this trace has the signals for.
    params : mapping of str to str, optional
        Parameters for every named policy that has them.
    compress : str, optional
        When every policy evicts: ``prefill``, ``step`` or ``every:N``; by default each as published.
    allocate : str, optional
        How the budget is shared out among layers and heads: ``uniform``, ``pyramid``, ``ada``, ``cake``.
    accumulate : str, optional
        Precision of live rows and sums: ``float32``, ``float16``, ``bfloat16``; the run says how many decisions that
        changed.
    closed : ClosedLoopOptions, optional
        Runs the model of the trace too, with the policies inside its attention: perplexity, and closed-loop fidelity.
    device : str
        Where to compute: ``cpu``, ``cuda``.
    progress : callable, optional
        Called with the share that is done.
    announce : callable, optional
        Called before the work begins, with the largest `Footprint` that it has in memory.
    command : str, optional
        Command line, for the provenance.
    force : bool
        Whether to replace an existing output.

    Raises
    ------
    UsageError
        Unknown names, parameters or budgets; protected keys beyond the budget.
    TraceError
        If the trace lacks a signal that a policy needs, or a metric that is named.
    ReplayError
        If a replay is no result: nothing evicted below the length, NaN scores, no step to score.
    ResultError
        If the output exists, or cannot be written.
    """
    if prefill not in ("full", "stream"):
        raise UsageError(f"prefill {prefill!r} is neither full nor stream", "Use --prefill full or --prefill stream.")
    chosen = parse_policies(policies, params)
    if not chosen:
        raise UsageError("no policy is named", "Name one or more: --policy h2o --policy tova")
    plans = [EvictionPlan.make(policy, compress, allocate, accumulate) for policy in chosen]
    runs = runs_of(plans, parse_budgets(budgets))
    wanted, left = measurable(trace, metrics)
    check(trace, runs, prefill)
    on = torch_device(device)
    again = [] if closed is None else closed.runs(runs)
    if closed is not None and not again:
        require_closed(runs[0].plan, closed.positions)
    if announce is not None:
        needs = [footprint(trace, one, [run.plan for run in runs], len(wanted)) for one in trace.sequences]
        announce(max(needs, key=lambda one: one.bytes))
    started = time.monotonic()
    share = 1.0 if closed is None else OPEN_SHARE
    about = info(of_trace(trace), trace.sequences, [*runs, *again], wanted, prefill, command) | {"left_out": left}
    with ReplayWriter(output, about, force=force) as writer:
        tally = step_through(trace, runs, wanted, prefill, on, writer, progress=_part(progress, 0, share))
        counted = {run.number: tally.of(run.number) for run in runs}
        if closed is not None:
            from kvscope.closed_loop.trace_loop import score_trace  # loads transformers

            tally = score_trace(
                trace, again, wanted, prefill, writer, closed, device=device, progress=_part(progress, share, 1)
            )
            counted |= {run.number: tally.of(run.number) for run in again}
        return writer.finish(counted, seconds=round(time.monotonic() - started, 3))


def _part(progress: Callable[[float], None] | None, low: float, high: float) -> Callable[[float], None] | None:
    """Return a callback for a part of the work."""
    return None if progress is None else lambda share: progress(low + share * (high - low))


def supported_policies(
    trace: Trace,
    policies: Sequence[Policy],
    budgets: Sequence[Budget],
    prefill: Prefill,
    closed: ClosedLoopOptions | None = None,
    **choices: str | None,
) -> tuple[list[Policy], dict[str, str]]:
    """Return the policies that this trace and prefill allow under every budget, and why each other one is left out.

    Parameters
    ----------
    **choices
        ``compress``, ``allocate``, ``accumulate``, as in `replay`.
    """
    fit, left = [], {}
    for policy in policies:
        try:
            runs = runs_of([EvictionPlan.make(policy, **choices)], budgets)
            check(trace, runs, prefill)
            if closed is not None:
                closed.runs(runs)
            fit.append(policy)
        except (UsageError, TraceError) as error:
            left[policy.label] = error.what
    return fit, left


def check(trace: Trace, runs: Sequence[RunSpec], prefill: Prefill) -> None:
    """Raise before any work what would make the runs impossible on this trace: signals, room, steps."""
    for plan in dict.fromkeys(run.plan for run in runs):
        require(trace, plan)
        plan.policy.fit(trace.layers, trace.kv_heads, trace.header.n_layers)
    _require_room(trace, runs, prefill)
    _require_steps(trace, prefill)


def _require_room(trace: Trace, runs: Sequence[RunSpec], prefill: Prefill) -> None:
    for run in runs:
        run.plan.require(prefill)
        for sequence in trace.sequences:
            protection(run.plan.policy, run.keys(sequence, prefill), sequence.prompt)


def _require_steps(trace: Trace, prefill: Prefill) -> None:
    for sequence in trace.sequences:
        if prefill == "full" and sequence.prompt >= sequence.length:
            raise ReplayError(
                f"sequence {sequence.index} of {trace.path} is all prompt: full prefill leaves no step to score",
                "Use --prefill stream, or record tokens after the prompt.",
            )
