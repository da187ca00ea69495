"""Runs: one plan under one budget each. Their specification, the sink of their results, and their counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvscope.core.budget import Budget
from kvscope.core.cache_scheme import CacheScheme
from kvscope.core.merge_scheme import MergeScheme
from kvscope.core.options import Loop, Positions, Prefill
from kvscope.core.records import Certificate, RunCounts
from kvscope.core.residency import ResidencyIntervals
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.simulation import CacheSimulation
from kvscope.trace.reader import TokenSequence

EXACT = 1e-9  # retained mass per step; a schedule that is closer than this to its bound is optimal up to rounding


@dataclass(frozen=True)
class RunSpec:
    """One plan under one budget.

    Attributes
    ----------
    number : int
        Number of the run in its replay.
    plan : EvictionPlan
        The policy, and how it is run.
    budget : Budget or None
        None for a policy that keeps to no budget.
    loop, positions
        Whether it runs over recorded attention or inside the model, and there with which rotary positions.
    open_run : int or None
        For a closed run the number of the open run with the same plan and budget.
    cache : CacheScheme or None
        How its cache is quantised.
    merge : MergeScheme or None
        How what is evicted is merged into what stays.
    """

    number: int
    plan: EvictionPlan
    budget: Budget | None
    loop: Loop = Loop.open
    positions: Positions = Positions.original
    open_run: int | None = None
    cache: CacheScheme | None = None
    merge: MergeScheme | None = None

    @property
    def label(self) -> str:
        """The label of the plan, with a quantised cache and the merging rule: ``h2o + int4:kivi``, ``h2o + d2o``."""
        return " + ".join([self.plan.label, *(str(each) for each in (self.cache, self.merge) if each is not None)])

    def keys(self, sequence: TokenSequence, prefill: Prefill) -> int:
        """Return ``B`` for a sequence."""
        if self.budget is None:
            return sequence.length
        return self.budget.keys(prompt=sequence.prompt, length=sequence.length, prefill=prefill)


class Sink(Protocol):
    """Receives the results of a replay: a `ReplayWriter`, or code that needs the numbers without a file."""

    def residency(self, run: int, sequence: int, layer: int, intervals: ResidencyIntervals) -> None:
        """Receive the residency intervals of one layer."""

    def fidelity(
        self,
        run: int,
        sequence: int,
        layer: int,
        steps: NDArray[np.int64],
        values: Mapping[str, NDArray[np.float32]],
    ) -> None:
        """Receive the metrics of one layer at `steps`, each ``[H, S]``."""


@dataclass(frozen=True)
class LayerResult:
    """The result of one run in one layer of one sequence, on the host: what a `Sink` receives.

    Attributes
    ----------
    layer : int
        The layer.
    intervals : ResidencyIntervals
        Its residency intervals.
    steps : int64 array
        Scored steps ``[S]``.
    values : mapping of str to float32 array
        Metrics, each ``[H, S]``.
    """

    layer: int
    intervals: ResidencyIntervals
    steps: NDArray[np.int64]
    values: Mapping[str, NDArray[np.float32]]

    def write(self, sink: Sink, run: int, sequence: int) -> None:
        """Give the result to `sink`, as that of a run and sequence."""
        sink.residency(run, sequence, self.layer, self.intervals)
        sink.fidelity(run, sequence, self.layer, self.steps, self.values)


@dataclass
class Tally:
    """What a replay counts in addition to its metrics, by number of the run.

    Attributes
    ----------
    allocated : dict of int to list of int
        Keys allocated to all heads, and how many uniform allocation would give them.
    changed : dict of int to int
        Keys that are evicted at another step than in the float32 baseline.
    planned : dict of int to list of float
        Mass that a schedule loses, the least that any schedule can lose, and the number of steps times heads that both
        are summed over.
    """

    allocated: dict[int, list[int]] = field(default_factory=dict)
    changed: dict[int, int] = field(default_factory=dict)
    planned: dict[int, list[float]] = field(default_factory=dict)

    def add_budget(self, run: int, simulation: CacheSimulation, number: int) -> None:
        """Count the keys allocated to the heads of run `run`, which is number `number` of the simulation."""
        budget = simulation.state.budget[number]  # [L, S]
        allocated, uniform = self.allocated.get(run, [0, 0])
        shape = simulation.shape
        held = shape.kv_heads // budget.shape[1] if shape.kv_heads_of else 1  # keys of a layer that decides as one
        more = held * int(budget.sum()), held * simulation.budgets[number] * budget.numel()
        self.allocated[run] = [allocated + more[0], uniform + more[1]]

    def add_changed(self, run: int, keys: int) -> None:
        """Count keys that were evicted at another step than in the float32 baseline."""
        self.changed[run] = self.changed.get(run, 0) + keys

    def add_planned(self, run: int, lost: float, least: float, steps: int) -> None:
        """Add the mass that the schedule of a run loses over `steps` (steps times heads), and its lower bound."""
        before = self.planned.get(run, [0.0, 0.0, 0])
        self.planned[run] = [old + new for old, new in zip(before, (lost, least, steps), strict=True)]

    def add(self, other: Tally) -> None:
        """Add the counts of another tally."""
        for run, (allocated, uniform) in other.allocated.items():
            before = self.allocated.get(run, [0, 0])
            self.allocated[run] = [before[0] + allocated, before[1] + uniform]
        for run, keys in other.changed.items():
            self.add_changed(run, keys)
        for run, (lost, least, steps) in other.planned.items():
            self.add_planned(run, lost, least, int(steps))

    def of(self, run: int) -> RunCounts:
        """Return the counts of a run for its record."""
        certificate = None
        if run in self.planned:
            lost, least, steps = self.planned[run]
            gap = max(0.0, lost - least) / steps
            certificate = Certificate(gap < EXACT, gap)
        allocated, uniform = self.allocated[run]
        return RunCounts(allocated, uniform, self.changed.get(run), certificate)


def by_plan(runs: Sequence[RunSpec]) -> list[list[RunSpec]]:
    """Return the runs of each plan, cache and merging rule, in the order in which these come first."""
    kinds = dict.fromkeys((run.plan, run.cache, run.merge) for run in runs)
    return [[run for run in runs if (run.plan, run.cache, run.merge) == kind] for kind in kinds]


def runs_of(
    plans: Sequence[EvictionPlan],
    budgets: Sequence[Budget],
    loop: Loop = Loop.open,
    positions: Positions = Positions.original,
    caches: Sequence[CacheScheme | None] = (None,),
    merges: Sequence[MergeScheme | None] = (None,),
) -> list[RunSpec]:
    """Return a run for every plan, budget, cache and merging rule; a plan that keeps to no budget gets one for each."""
    found = [
        (plan, budget, cache, merge)
        for plan in plans
        for cache in caches or (None,)
        for merge in merges or (None,)
        for budget in (budgets if plan.policy.traits.bounded else [None])
    ]
    return [
        RunSpec(number, plan, budget, loop, positions, cache=cache, merge=merge)
        for number, (plan, budget, cache, merge) in enumerate(found)
    ]
