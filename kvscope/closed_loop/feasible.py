"""Whether a plan can run inside a model, where attention is computed over the visible keys only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kvscope.core.errors import UsageError
from kvscope.core.merge_scheme import parse_merges
from kvscope.core.options import Loop, Positions
from kvscope.engine.plan import FILTER, GATE, SCORER, EvictionPlan
from kvscope.engine.runs import RunSpec
from kvscope.engine.signal_axes import VECTORS
from kvscope.engine.signals import ROWS

SIGNALS = frozenset(
    {
        *VECTORS,
        "mean_query",
        "value_l1",
        "value_l2",
        "key_l2",
        "value_out_l1",
        "reconstruction",
        "rotary",
        "token_kinds",
    }
)


def closed_runs(
    runs: Sequence[RunSpec], positions: Positions, opened: Sequence[RunSpec] | None = None
) -> list[RunSpec]:
    """Return a closed run for each run, except those of clairvoyant bounds; numbers follow those of the open runs.

    `opened` are the runs of the open loop; by default all of them.
    """
    opened = runs if opened is None else opened
    numbers = {(run.plan, run.budget, run.cache, run.merge): run.number for run in opened}
    feasible = [run for run in runs if not run.plan.policy.traits.clairvoyant]
    return [
        replace(
            run,
            number=number,
            loop=Loop.closed,
            positions=positions,
            open_run=numbers.get((run.plan, run.budget, run.cache, run.merge)),
        )
        for number, run in enumerate(feasible, start=len(opened))
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


def require_merging(plan: EvictionPlan, merges: str | Sequence[str]) -> None:
    """Raise UsageError if a plan holds every key although evicted ones are to be merged by one of these rules."""
    rule = next((rule for rule in parse_merges(merges) if rule is not None), None)
    if rule is not None and plan.policy.traits.reads:
        raise UsageError(
            f"{plan.label} holds every key, so {rule} has nothing to merge", "Use another policy, or omit --merge."
        )


def require_decodable(plan: EvictionPlan) -> None:
    """Raise UsageError if a plan needs more than a shortened cache holds, or a signal that decoding lacks."""
    if plan.policy.traits.reads or "full_weights" in plan.needs:
        why = "reads" if plan.policy.traits.reads else "observes the attention on"
        raise UsageError(
            f"{plan.policy.label} {why} keys that a smaller cache does not hold, so it cannot decode with one",
            "Use another policy, or replay this one in the closed loop.",
        )
    unknown = {name for name in plan.needs - ROWS - SIGNALS if not name.startswith((GATE, FILTER, SCORER))}
    if unknown:
        raise UsageError(
            f"{plan.policy.label} needs a signal called {sorted(unknown)[0]!r}, which decoding does not provide",
            f"Use one of the known signals: {', '.join(sorted(ROWS | SIGNALS))}.",
        )
