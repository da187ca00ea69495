"""What a user may choose about the closed loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvscope.core.errors import UsageError
from kvscope.core.options import Loop, Positions
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.runs import RunSpec


@dataclass(frozen=True)
class ClosedLoopOptions:
    """How the model runs again.

    Attributes
    ----------
    positions : {"original", "compacted"}
        Whether keys keep the rotation of their place in the text, or get that of their place in the cache.
    model : str or None
        Name or folder of the model, where it is no longer what the trace calls it.
    dtype : str
        As for a trace: ``auto``, ``float32``, ``float64``, ``float16``, ``bfloat16``.
    device_map : str or None
        How its parts are placed.
    """

    positions: Positions = Positions.original
    model: str | None = None
    dtype: str = "auto"
    device_map: str | None = None

    def runs(self, open_runs: Sequence[RunSpec]) -> list[RunSpec]:
        """Return the closed runs that go with open ones; bounds, which know the future, have an open one alone.

        Raises
        ------
        UsageError
            If a policy cannot run in the closed loop.
        """
        feasible = [run for run in open_runs if not run.plan.policy.traits.clairvoyant]
        for run in feasible:
            require_closed(run.plan, self.positions)
        return [
            replace(run, number=len(open_runs) + place, loop=Loop.closed, positions=self.positions, open_run=run.number)
            for place, run in enumerate(feasible)
        ]


def require_closed(plan: EvictionPlan, positions: Positions = Positions.original) -> None:
    """Raise UsageError if a plan has no meaning where attention is really computed over the keys that are held."""
    if positions not in ("original", "compacted"):
        raise UsageError(f"positions {positions!r} are unknown", "Use --positions original or --positions compacted.")
    traits = plan.policy.traits
    why = None
    if traits.clairvoyant:
        why = "looks ahead at attention that depends on what it evicts"
    elif "full_weights" in plan.needs and not traits.reads:
        why = "looks at attention on keys that it has evicted"
    elif positions == "compacted" and traits.reads:
        why = "holds every key, so there is nothing to compact"
    if why:
        raise UsageError(
            f"{plan.label} cannot run in the closed loop, {positions} positions: it {why}", "Leave it out."
        )
