"""A run is one plan under one budget: what it is, who takes its results, and what is counted beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from numpy.typing import NDArray

from kvscope.core.budget import Budget
from kvscope.core.options import Loop, Positions, Prefill
from kvscope.core.records import Certificate, RunCounts
from kvscope.core.residency import ResidencyIntervals
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.simulation import CacheSimulation
from kvscope.trace.reader import TokenSequence

Array = NDArray[Any]
EXACT = 1e-9  # retained mass of a step: what is nearer than this to the best is the best, up to rounding


@dataclass(frozen=True)
class RunSpec:
    """One plan under one budget; `budget` is None for a policy that the engine holds to none.

    `loop` and `positions` say how it is made; `open_run` is the number of the open run of the same plan and budget.
    """

    number: int
    plan: EvictionPlan
    budget: Budget | None
    loop: Loop = Loop.open
    positions: Positions = Positions.original
    open_run: int | None = None

    def keys(self, sequence: TokenSequence, prefill: Prefill) -> int:
        """Return ``B`` for a sequence."""
        if self.budget is None:
            return sequence.length
        return self.budget.keys(prompt=sequence.prompt, length=sequence.length, prefill=prefill)


class Sink(Protocol):
    """Who takes what a group found: a `ReplayWriter`, or whoever wants the numbers alone."""

    def residency(self, run: int, sequence: int, layer: int, intervals: ResidencyIntervals) -> None:
        """Take the residency intervals of a layer."""

    def fidelity(self, run: int, sequence: int, layer: int, steps: Array, values: Mapping[str, Array]) -> None:
        """Take metrics, each ``[H, S]``."""


@dataclass
class Tally:
    """What a replay counts beside its metrics, by number of the run.

    Attributes
    ----------
    allocated : dict of int to list of int
        Keys handed out to heads and, beside it, those of the uniform share.
    changed : dict of int to int
        Keys that leave at another step than they would with sums in float32.
    planned : dict of int to list of float
        Mass that a schedule loses, the least that any could lose, and the number of steps and heads they are sums over.
    """

    allocated: dict[int, list[int]] = field(default_factory=dict)
    changed: dict[int, int] = field(default_factory=dict)
    planned: dict[int, list[float]] = field(default_factory=dict)

    def add_budget(self, run: int, simulation: CacheSimulation, number: int) -> None:
        """Count the keys that run `run`, which is the simulation's `number`, handed out to its heads."""
        share = simulation.state.budget[number]  # [L, S]
        handed, uniform = self.allocated.get(run, [0, 0])
        self.allocated[run] = [handed + int(share.sum()), uniform + simulation.budgets[number] * share.numel()]

    def add_changed(self, run: int, keys: int) -> None:
        """Count keys that left at another step than with sums in float32."""
        self.changed[run] = self.changed.get(run, 0) + keys

    def add_planned(self, run: int, lost: float, least: float, steps: int) -> None:
        """Count what the schedule of a run loses over so many steps of heads, and the least that it could lose."""
        before = self.planned.get(run, [0.0, 0.0, 0])
        self.planned[run] = [old + new for old, new in zip(before, (lost, least, steps), strict=True)]

    def of(self, run: int) -> RunCounts:
        """Return what is known of a run at its end, for its record."""
        certificate = None
        if run in self.planned:
            lost, least, steps = self.planned[run]
            gap = max(0.0, lost - least) / steps
            certificate = Certificate(gap < EXACT, gap)
        handed, uniform = self.allocated[run]
        return RunCounts(handed, uniform, self.changed.get(run), certificate)


def runs_of(
    plans: Sequence[EvictionPlan],
    budgets: Sequence[Budget],
    loop: Loop = Loop.open,
    positions: Positions = Positions.original,
) -> list[RunSpec]:
    """Return every plan under every budget, those without a budget once."""
    pairs = [
        (plan, budget)
        for plan in plans
        for budget in (budgets if plan.policy.traits.bounded or plan.policy.traits.reads else [None])
    ]
    return [RunSpec(number, plan, budget, loop, positions) for number, (plan, budget) in enumerate(pairs)]
