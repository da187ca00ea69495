"""``kvscope.replay``: replay policies over a trace in one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kvscope.core.budget import Budget
from kvscope.core.options import (
    ClosedLoopOptions,
    GenerateOptions,
    OutputOptions,
    PlanOptions,
    Prefill,
    ReplayOptions,
    choice,
)
from kvscope.policies.base import Policy
from kvscope.replay.compile import compile_replay
from kvscope.replay.footprint import Footprint
from kvscope.results.store import Replay
from kvscope.trace.reader import Trace


def replay(
    trace: Trace,
    policies: Sequence[str | Policy],
    budgets: str | Sequence[str | int | Budget] = "20%",
    *,
    output: Path,
    prefill: str = Prefill.full,
    metrics: Sequence[str] | None = None,
    params: Mapping[str, str] | None = None,
    compress: str | None = None,
    allocate: str | None = None,
    accumulate: str | None = None,
    scope: str | None = None,
    closed: ClosedLoopOptions | None = None,
    generate: GenerateOptions | None = None,
    device: str = "cpu",
    progress: Callable[[float], None] | None = None,
    announce: Callable[[Footprint], None] | None = None,
    command: str | None = None,
    force: bool = False,
) -> Replay:
    """Return the replay of policies over a trace: which keys they would have kept, and the metrics of that.

    Parameters
    ----------
    trace : Trace
        Recorded attention.
    policies : sequence of str or Policy
        Names as on the command line (``a2sf:alpha=0.7``), or policy objects.
    budgets : str, or sequence of str, int or Budget
        ``"20%,256"``; every policy runs under every budget.
    output, command, force, prefill, metrics, closed, generate, device, params, compress, allocate, accumulate, scope
        As in `OutputOptions`, `ReplayOptions` and `PlanOptions`.
    progress : callable, optional
        Called with the completed share, from 0 to 1.
    announce : callable, optional
        Called with the largest `Footprint` before the work begins.

    Raises
    ------
    UsageError, TraceError, ModelError, ReplayError
        As `compile_replay` and `ReplayJob.execute`.
    OutputExists, ResultError
        If the output exists, or cannot be written.
    """
    options = ReplayOptions(
        prefill=choice(Prefill, prefill, "prefill"),
        plan=PlanOptions(params or {}, compress, allocate, accumulate, scope),
        metrics=None if metrics is None else tuple(metrics),
        closed=closed,
        generate=generate,
        device=device,
    )
    job = compile_replay(trace, policies, budgets, options)
    if announce is not None:
        announce(job.footprint)
    return job.execute(OutputOptions(Path(output), force, command), progress)
