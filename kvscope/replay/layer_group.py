"""A group of layers of one sequence: every run stepped over it together, then scored and written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvscope.bounds.schedules import Schedules, schedules
from kvscope.engine.layers import Layers
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.rows import Block
from kvscope.engine.runs import RunSpec, Sink, Tally
from kvscope.engine.scan import Scan
from kvscope.engine.scoring import Scorer, Scoring
from kvscope.engine.signals import ROWS
from kvscope.replay.open_loop import OpenLoop
from kvscope.trace.reader import TokenSequence

Array = NDArray[Any]


class LayerGroup:
    """All runs over one group of layers of one sequence, stepped together through blocks of rows."""

    def __init__(self, work: OpenLoop, sequence: TokenSequence, layers: list[int], block_steps: int) -> None:
        runs, metrics, prefill, device = work.runs, work.metrics, work.prefill, work.device
        self.sequence, self.layers, self._block_steps = sequence, layers, block_steps
        self.source = Layers(work.trace, sequence, layers, device)
        self.shape = self.source.shape
        self.first = sequence.prompt if prefill == "full" else 0
        self.scans: list[tuple[list[RunSpec], Scan, Scorer]] = []
        self.twins: dict[int, Scan] = {}  # by index in `scans`: the same in float32, where that is not what is asked
        self.plans: dict[int, Schedules] = {}  # by index in `scans`: what a clairvoyant policy follows
        for plan in dict.fromkeys(run.plan for run in runs):
            own = [run for run in runs if run.plan == plan]
            keys = [run.keys(sequence, prefill) for run in own]

            def scan(plan: EvictionPlan, keys: list[int] = keys) -> Scan:
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
                    sink.residency(run.number, self.sequence.index, layer, scan.residency(number, position))
                    one = {name: value[number, position] for name, value in values.items()}
                    sink.fidelity(run.number, self.sequence.index, layer, steps, one)

    def _count(self, index: int, number: int, run: RunSpec, tally: Tally) -> None:
        scan = self.scans[index][1]
        tally.add_budget(run.number, scan, number)
        if index in self.plans:
            best, steps = self.plans[index], (self.shape.length - self.first) * scan.budget[number].numel()
            tally.add_planned(run.number, float(best.lost[number]), float(best.least[number]), steps)
        if index in self.twins:
            tally.add_changed(run.number, int((scan.leave[number] != self.twins[index].leave[number]).sum()))


def step_through(
    work: OpenLoop,
    sink: Sink,
    *,
    sequences: Sequence[TokenSequence] | None = None,
    progress: Callable[[float], None] | None = None,
) -> Tally:
    """Step all runs through a trace, which is read once; `sink` gets what they kept and how faithful that is.

    Parameters
    ----------
    work : OpenLoop
        Trace, runs and metrics.
    sink : Sink
        Takes residency and fidelity of each run, sequence and layer.
    sequences : sequence, optional
        Of the trace; all by default.
    progress : callable, optional
        Called with the share that is done.
    """
    tally = Tally()
    groups = []
    layers = work.trace.layers
    for sequence in work.trace.sequences if sequences is None else sequences:
        needs = work.footprints[sequence.index]
        starts = range(0, len(layers), needs.layers)
        groups += [(sequence, layers[start : start + needs.layers], needs.steps) for start in starts]
    for number, (sequence, own, steps) in enumerate(groups):
        group = LayerGroup(work, sequence, own, steps)
        for share in group.step_all():
            if progress is not None:
                progress((number + share) / len(groups))
        group.write(sink, tally)
    return tally
