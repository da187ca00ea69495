"""What a trace must have for a replay: signals, steps to score, right answers."""

from __future__ import annotations

from collections.abc import Sequence

from kvscope.core.budget import Budget
from kvscope.core.errors import ReplayError, UsageError
from kvscope.core.options import Prefill, ReplayOptions
from kvscope.engine.feasible import Workload, require_feasible
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.signals import require
from kvscope.trace.reader import Trace


def require_replayable(trace: Trace, plan: EvictionPlan, budgets: Sequence[Budget], prefill: Prefill) -> None:
    """Raise an error if a plan cannot run on a trace under these budgets: signals, phase, room for protected keys.

    Raises
    ------
    UsageError
        If the plan is not defined for the prefill, the layers or a budget.
    TraceError
        If the trace lacks a signal.
    """
    require(trace, plan)
    layers = tuple(trace.layers)
    kv_heads = tuple(trace.heads_of(layer).kv_heads for layer in layers)
    require_feasible(plan, budgets, Workload(trace.sequences, prefill, layers, kv_heads, trace.header.n_layers))


def require_steps(trace: Trace, prefill: Prefill) -> None:
    """Raise ReplayError if a sequence has no step to score."""
    for sequence in trace.sequences:
        if prefill is Prefill.full and sequence.prompt >= sequence.length:
            raise ReplayError(
                f"sequence {sequence.index} of {trace.path} ends with its prompt, so full prefill has no step to score",
                "Use --prefill stream, or record tokens after the prompt.",
            )


def require_answers(trace: Trace, options: ReplayOptions) -> None:
    """Raise UsageError if answers are to be generated and cannot be scored, or without the closed loop."""
    if options.closed is None:
        raise UsageError("answers are generated in the closed loop, which is off", "Give ReplayOptions.closed too.")
    if not any(sequence.answers for sequence in trace.record.sequences):
        raise UsageError(
            f"{trace.path} has no right answers, so answers under a policy cannot be scored",
            "Record it again with --answer, or from a dataset with answers.",
        )
