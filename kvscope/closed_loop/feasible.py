"""Which plans can run inside a model, where attention is computed over the keys that are still held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kvscope.core.errors import UsageError
from kvscope.core.options import Loop, Positions
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.runs import RunSpec


def closed_runs(open_runs: Sequence[RunSpec], positions: Positions) -> list[RunSpec]:
    """Return the closed runs that belong to open ones; bounds, which know the future, have none."""
    feasible = [run for run in open_runs if not run.plan.policy.traits.clairvoyant]
    return [
        replace(run, number=len(open_runs) + place, loop=Loop.closed, positions=positions, open_run=run.number)
        for place, run in enumerate(feasible)
    ]


def require_closed(plan: EvictionPlan, positions: Positions = Positions.original) -> None:
    """Raise UsageError if a plan has no meaning where attention is really computed over the keys that are held."""
    traits = plan.policy.traits
    why = None
    if traits.clairvoyant:
        why = "looks ahead at attention that depends on what it evicts"
    elif "full_weights" in plan.needs and not traits.reads:
        why = "looks at attention on keys that it has evicted"
    elif positions == Positions.compacted and traits.reads:
        why = "holds every key, so there is nothing to compact"
    if why:
        raise UsageError(
            f"{plan.label} cannot run in the closed loop, {positions} positions: it {why}", "Leave it out."
        )
