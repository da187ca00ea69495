"""Whether a plan can run inside a model, where attention is computed over the visible keys only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kvscope.core.errors import UsageError
from kvscope.core.options import Loop, Positions
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.runs import RunSpec


def closed_runs(open_runs: Sequence[RunSpec], positions: Positions) -> list[RunSpec]:
    """Return a closed run for each open run, except those of clairvoyant bounds."""
    feasible = [run for run in open_runs if not run.plan.policy.traits.clairvoyant]
    return [
        replace(run, number=number, loop=Loop.closed, positions=positions, open_run=run.number)
        for number, run in enumerate(feasible, start=len(open_runs))
    ]


def require_closed(plan: EvictionPlan, positions: Positions = Positions.original) -> None:
    """Raise UsageError if a plan needs attention that the closed loop does not compute, or has no compacted form."""
    traits = plan.policy.traits
    why = None
    if traits.clairvoyant:
        why = "needs future attention, which depends on what it evicts"
    elif "selection" in plan.needs:
        why = "follows the index of a model, which the trace of the model has alone"
    elif "full_weights" in plan.needs and not traits.reads:
        why = "needs the attention on keys that it has evicted"
    elif positions == Positions.compacted and traits.reads:
        why = "holds every key, so there is nothing to compact"
    if why:
        raise UsageError(
            f"{plan.label} cannot run in the closed loop with {positions} positions: it {why}", "Use another policy."
        )
