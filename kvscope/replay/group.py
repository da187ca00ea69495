"""A group of layers of one sequence: every run stepped over it together, then scored and written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from kvscope.budget import Budget, Prefill
from kvscope.metrics import Metric
from kvscope.replay.bounds import Schedules, schedules
from kvscope.replay.engine import Scan
from kvscope.replay.layers import Layers
from kvscope.replay.memory import footprint
from kvscope.replay.plan import Plan
from kvscope.replay.rows import Block
from kvscope.replay.score import Scorer, Scoring
from kvscope.replay.signals import ROWS
from kvscope.trace.reader import Sequence as TraceSequence
from kvscope.trace.reader import Trace

Array = NDArray[Any]
EXACT = 1e-9  # retained mass of a step: what is nearer than this to the best is the best, up to rounding


@dataclass(frozen=True)
class Run:
    """One plan under one budget; `budget` is None for a policy that the engine holds to none.

    `loop` and `positions` say how it is made; `open_run` is the number of the open run of the same plan and budget.
    """

    number: int
    plan: Plan
    budget: Budget | None
    loop: Literal["open", "closed"] = "open"
    positions: Literal["original", "compacted"] = "original"
    open_run: int | None = None

    def keys(self, sequence: TraceSequence, prefill: Prefill) -> int:
        """Return ``B`` for a sequence."""
        if self.budget is None:
            return sequence.length
        return self.budget.keys(prompt=sequence.prompt, length=sequence.length, prefill=prefill)


class Sink(Protocol):
    """Who takes what a group found: a `ReplayWriter`, or whoever wants the numbers alone."""

    def residency(
        self, run: int, sequence: int, layer: int, *, enter: Array, leave: Array, kv_head: Array, key: Array
    ) -> None:
        """Take stays of keys."""

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

    def add_budget(self, run: int, scan: Scan, number: int) -> None:
        """Count the keys that run `run`, which is the scan's `number`, handed out to its heads."""
        share = scan.budget[number]  # [L, S]
        handed, uniform = self.allocated.get(run, [0, 0])
        self.allocated[run] = [handed + int(share.sum()), uniform + scan.budgets[number] * share.numel()]

    def add_changed(self, run: int, keys: int) -> None:
        """Count keys that left at another step than with sums in float32."""
        self.changed[run] = self.changed.get(run, 0) + keys

    def add_planned(self, run: int, lost: float, least: float, steps: int) -> None:
        """Count what the schedule of a run loses over so many steps of heads, and the least that it could lose."""
        before = self.planned.get(run, [0.0, 0.0, 0])
        self.planned[run] = [old + new for old, new in zip(before, (lost, least, steps), strict=True)]

    def of(self, run: int) -> dict[str, Any]:
        """Return what is known of a run, for its description."""
        handed, uniform = self.allocated[run]
        counted: dict[str, Any] = {"allocated_keys": handed, "uniform_keys": uniform}
        if run in self.changed:
            counted["decisions_changed"] = self.changed[run]
        if run in self.planned:
            lost, least, steps = self.planned[run]
            gap = max(0.0, lost - least) / steps
            counted["certificate"] = {"exact": gap < EXACT, "gap": gap}
        return counted


class Group:
    """All runs over one group of layers of one sequence, stepped together through blocks of rows."""

    def __init__(
        self,
        trace: Trace,
        sequence: TraceSequence,
        layers: list[int],
        runs: Sequence[Run],
        metrics: Sequence[Metric],
        prefill: Prefill,
        device: torch.device,
        block_steps: int,
    ) -> None:
        self.sequence, self.layers, self._block_steps = sequence, layers, block_steps
        self.source = Layers(trace, sequence, layers, device)
        self.shape = self.source.shape
        self.first = sequence.prompt if prefill == "full" else 0
        self.scans: list[tuple[list[Run], Scan, Scorer]] = []
        self.twins: dict[int, Scan] = {}  # by index in `scans`: the same in float32, where that is not what is asked
        self.plans: dict[int, Schedules] = {}  # by index in `scans`: what a clairvoyant policy follows
        for plan in dict.fromkeys(run.plan for run in runs):
            own = [run for run in runs if run.plan == plan]
            keys = [run.keys(sequence, prefill) for run in own]

            def scan(plan: Plan, keys: list[int] = keys) -> Scan:
                signals = {name: self.source.signal(name) for name in sorted(plan.needs - ROWS)}
                if "schedule" in plan.needs:
                    best = schedules(self.source.layer_rows, self.shape, keys, prefill, plan.policy.traits.scope)
                    self.plans[len(self.scans)] = best
                    signals["schedule"] = best.leaves.to(device)
                return Scan(plan, keys, self.shape, prefill, signals, missing_mass=self.source.missing, device=device)

            if plan.accumulate is not None:
                self.twins[len(self.scans)] = scan(replace(plan, accumulate=None))
            made = scan(plan)
            self.scans.append((own, made, Scorer(made, metrics, self.first)))
        values = self.source.signal("values") if any("values" in metric.needs for metric in metrics) else None
        self._scoring = Scoring([scorer for _, _, scorer in self.scans], values)

    def step_all(self) -> Iterator[float]:
        """Step every scan over the whole sequence, and score it; yields the share that is done."""
        for start in range(0, self.shape.length, self._block_steps):
            stop = min(start + self._block_steps, self.shape.length)
            rows = self.source.rows(start, stop)
            missing = None if self.source.missing is None else self.source.missing[..., start:stop]
            block = Block(rows, start, missing)
            for scan in (*(scan for _, scan, _ in self.scans), *self.twins.values()):
                scan.block(block)
            self._scoring.add(rows, start, missing)
            for _, scan, _ in self.scans:
                scan.release(stop)
            yield stop / self.shape.length
        for _, scan, _ in self.scans:
            scan.check()

    def write(self, sink: Sink, tally: Tally) -> None:
        """Hand on residency and fidelity of every run and layer, and add to the tally."""
        steps = np.arange(self.first, self.shape.length)
        for index, (own, scan, scorer) in enumerate(self.scans):
            values = {name: value.cpu().numpy() for name, value in scorer.values().items()}
            for number, run in enumerate(own):
                self._count(index, number, run, tally)
                for position, layer in enumerate(self.layers):
                    stays = scan.stays(number, position)
                    sink.residency(
                        run.number,
                        self.sequence.index,
                        layer,
                        enter=stays.enter.cpu().numpy(),
                        leave=stays.leave.cpu().numpy(),
                        kv_head=stays.kv_head.cpu().numpy(),
                        key=stays.key.cpu().numpy(),
                    )
                    one = {name: value[number, position] for name, value in values.items()}
                    sink.fidelity(run.number, self.sequence.index, layer, steps, one)

    def _count(self, index: int, number: int, run: Run, tally: Tally) -> None:
        scan = self.scans[index][1]
        tally.add_budget(run.number, scan, number)
        if index in self.plans:
            best, steps = self.plans[index], (self.shape.length - self.first) * scan.budget[number].numel()
            tally.add_planned(run.number, float(best.lost[number]), float(best.least[number]), steps)
        if index in self.twins:
            tally.add_changed(run.number, int((scan.leave[number] != self.twins[index].leave[number]).sum()))


def step_through(
    trace: Trace,
    runs: Sequence[Run],
    metrics: Sequence[Metric],
    prefill: Prefill,
    device: torch.device,
    sink: Sink,
    *,
    sequences: Sequence[TraceSequence] | None = None,
    progress: Callable[[float], None] | None = None,
) -> Tally:
    """Step all runs through a trace, which is read once; `sink` gets what they left and how faithful that is.

    Parameters
    ----------
    sequences : sequence, optional
        Of the trace; all by default.
    """
    tally = Tally()
    groups = []
    for sequence in trace.sequences if sequences is None else sequences:
        needs = footprint(trace, sequence, [run.plan for run in runs], len(metrics))
        starts = range(0, len(trace.layers), needs.layers)
        groups += [(sequence, trace.layers[start : start + needs.layers], needs.steps) for start in starts]
    for number, (sequence, layers, steps) in enumerate(groups):
        group = Group(trace, sequence, layers, runs, metrics, prefill, device, steps)
        for share in group.step_all():
            if progress is not None:
                progress((number + share) / len(groups))
        group.write(sink, tally)
    return tally
