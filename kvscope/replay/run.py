"""``kvscope.replay``: replay policies over a trace in one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

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
from kvscope.metrics import Metric, Rows
from kvscope.metrics.base import metric_name
from kvscope.policies.spec import Named
from kvscope.replay.compile import compile_replay
from kvscope.replay.footprint import Footprint
from kvscope.results.place import written
from kvscope.results.store import Replay
from kvscope.trace.reader import Trace


def replay(
    trace: Trace,
    policies: Named | Sequence[Named],
    budgets: str | float | Budget | Sequence[str | float | Budget] = "20%",
    *,
    output: Path | str | None = None,
    prefill: str = Prefill.full,
    metrics: Sequence[str | Metric | Callable[[Rows], Tensor]] | None = None,
    params: Mapping[str, str] | None = None,
    compress: str | None = None,
    allocate: str | None = None,
    accumulate: str | None = None,
    scope: str | None = None,
    cache: str | Sequence[str] = (),
    merge: str | Sequence[str] = (),
    closed: ClosedLoopOptions | None = None,
    generate: GenerateOptions | None = None,
    device: str = "cpu",
    progress: Callable[[float], None] | None = None,
    announce: Callable[[Footprint], None] | None = None,
    command: str | None = None,
    force: bool = False,
) -> Replay:
    """Return the replay of policies over a trace: which keys each policy retains, and what that costs in each metric.

    Parameters
    ----------
    trace : Trace
        Recorded attention.
    policies : str, Policy, class of a policy, or sequence of these
        Names as on the command line (``a2sf:alpha=0.7``), policy objects, or classes, which have default parameters.
    budgets : str, int, float, Budget, or sequence of these
        ``256`` keys per key/value head; ``"20%"`` or ``0.2`` of the prompt, with streaming prefill of the sequence.
    output : Path or str, optional
        Folder to write. If omitted, the replay is in a temporary folder that is removed with the returned object.
    metrics : sequence of str, Metric or function, optional
        Names of metrics, or functions with the decorator ``@kvscope.metric``; all metrics by default.
    command, force, prefill, closed, generate, device, params, compress, allocate, accumulate, scope, cache, merge
        See `OutputOptions`, `ReplayOptions` and `PlanOptions`; `cache` and `merge` as on the command line:
        ``"16bit,int4:kivi"``, ``"none,d2o"``.
    progress, announce : callable, optional
        `progress` gets the completed share, from 0 to 1; `announce` gets the largest `Footprint` before the work.

    Raises
    ------
    UsageError, TraceError, ModelError, ReplayError, OutputExists, ResultError
        As `compile_replay` and `ReplayJob.execute`.
    """
    options = ReplayOptions(
        prefill=choice(Prefill, prefill, "prefill"),
        plan=PlanOptions(params or {}, compress, allocate, accumulate, scope, cache, merge),
        metrics=None if metrics is None else tuple(metric_name(metric) for metric in metrics),
        closed=closed,
        generate=generate,
        device=device,
    )
    job = compile_replay(trace, policies, budgets, options)
    if announce is not None:
        announce(job.footprint)
    return written(lambda path: job.execute(OutputOptions(path, force, command), progress), output)
