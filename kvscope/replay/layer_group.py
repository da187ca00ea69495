"""A group of layers of one sequence, over which all runs are stepped, scored and written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from kvscope.bounds.schedules import Schedules, schedules
from kvscope.core.progress import Progress, part_of
from kvscope.engine.layers import RecordedLayers, cache_groups, owners_first
from kvscope.engine.parts import MEMORY_ERRORS, RunParts
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.row_loading import HostBlock
from kvscope.engine.rows import Block, Shape
from kvscope.engine.runs import LayerResult, RunSpec, Sink, Tally, by_plan
from kvscope.engine.scoring import BlockScorer, MetricSeries
from kvscope.engine.shared_caches import ReadCaches
from kvscope.engine.signals import ROWS
from kvscope.engine.simulation import CacheSimulation
from kvscope.metrics import Metric
from kvscope.replay.open_loop import OpenLoop
from kvscope.replay.reading import BlockReader, GroupSpec
from kvscope.trace.reader import TokenSequence, Trace


@dataclass(frozen=True)
class PlanRuns:
    """The runs of one plan over a group of layers.

    Attributes
    ----------
    runs : list of RunSpec
        One for each budget of the simulation, in the same order.
    simulation : CacheSimulation
        The caches of the runs.
    series : MetricSeries
        The metrics of the runs.
    baseline : CacheSimulation or None
        The same runs accumulated in float32, if the plan accumulates in another precision.
    schedule : Schedules or None
        The schedules that a clairvoyant policy follows.
    """

    runs: list[RunSpec]
    simulation: CacheSimulation
    series: MetricSeries
    baseline: CacheSimulation | None
    schedule: Schedules | None

    def count(self, number: int, steps: int, tally: Tally) -> None:
        """Add the counts of run `number` of the simulation, with `steps` scored steps, to the tally."""
        run, simulation = self.runs[number].number, self.simulation
        tally.add_budget(run, simulation, number)
        if self.schedule is not None:
            heads = simulation.state.budget[number].numel()
            lost, least = float(self.schedule.lost[number]), float(self.schedule.least[number])
            tally.add_planned(run, lost, least, steps * heads)
        if self.baseline is not None:
            changed = simulation.state.leave[number] != self.baseline.state.leave[number]
            tally.add_changed(run, int(changed.sum()))


@dataclass(frozen=True)
class RunResult:
    """The result of one run over a group of layers: the number of the run, its layers and its counts."""

    run: int
    layers: list[LayerResult]
    counts: Tally


class LayerGroup:
    """All runs over one group of layers of one sequence, stepped together through blocks of rows."""

    def __init__(self, work: OpenLoop, sequence: TokenSequence, layers: list[int]) -> None:
        self.sequence, self.layers, self._work = sequence, layers, work
        runs, metrics, prefill = work.runs, work.metrics, work.prefill
        self._prefill, self._device = prefill, work.device
        self.source = RecordedLayers(work.trace, sequence, layers, work.device)
        self.shape = self.source.shape
        self._shared = self.source.caches is not self.shape  # some layers read the cache of another
        self.first = sequence.prompt if prefill == "full" else 0
        self.plan_runs = [self._plan_runs(of_plan[0].plan, of_plan, metrics) for of_plan in by_plan(runs)]
        values = self.source.signal("values") if any("values" in metric.needs for metric in metrics) else None
        own = work.trace.heads_of(layers[0])
        self._scorer = BlockScorer(
            [each.series for each in self.plan_runs], values, 2 * (own.head_dim + own.value_size)
        )

    @property
    def simulations(self) -> list[CacheSimulation]:
        """All simulations, the baselines last."""
        baselines = [each.baseline for each in self.plan_runs if each.baseline is not None]
        return [*(each.simulation for each in self.plan_runs), *baselines]

    def blocks(self, read: Iterator[HostBlock]) -> Iterator[Block]:
        """Yield the rows of the sequence in blocks of steps, on the device, from those that were read."""
        for block in read:
            rows = self.source.place(block)
            missing = None if self.source.missing is None else self.source.missing[..., block.start : block.stop]
            yield Block(rows, block.start, missing)

    def observed(self, block: Block) -> Iterator[tuple[CacheSimulation, Block]]:
        """Yield every simulation with what it observes of a block: if it evicts, rows of layers that own a cache."""
        owned, count = block, len(self.source.caches.layers)
        if self._shared:
            missing = None if block.missing is None else block.missing[:count]
            owned = Block(block.rows[:count], block.start, missing)
        for simulation in self.simulations:
            yield simulation, block if simulation.shape is self.shape else owned

    def score(self, block: Block) -> None:
        """Score a block that every simulation has stepped through, then free the memory that only scoring needs."""
        self._scorer.add(block.rows, block.start, block.missing)
        for each in self.plan_runs:
            each.simulation.release(block.start + block.rows.shape[-2])

    def check(self) -> None:
        """Raise ReplayError if a run is invalid; called after the last block."""
        for each in self.plan_runs:
            each.simulation.check()

    def results(self) -> Iterator[RunResult]:
        """Yield the result of every run, those of one plan together; nothing of it is left on the device."""
        steps = np.arange(self.first, self.shape.length)
        for each in self.plan_runs:
            values = each.series.on_cpu()
            alone = each.simulation.shape is self.shape
            for number, run in enumerate(each.runs):
                counts = Tally()
                each.count(number, len(steps), counts)
                yield RunResult(
                    run.number,
                    [
                        LayerResult(
                            layer,
                            each.simulation.residency(number, position if alone else self.source.cache_of[position]),
                            steps,
                            {name: value[number, position] for name, value in values.items()},
                        )
                        for position, layer in enumerate(self.layers)
                    ],
                    counts,
                )

    def _plan_runs(self, plan: EvictionPlan, runs: list[RunSpec], metrics: Sequence[Metric]) -> PlanRuns:
        keys, shape = [run.keys(self.sequence, self._prefill) for run in runs], self._deciding(plan)
        schedule = None
        if "schedule" in plan.needs:
            schedule = schedules(self.source.layer_rows, shape, keys, self._prefill, plan.decides)
        baseline = None
        if plan.accumulate is not None:
            baseline = self._simulation(replace(plan, accumulate=None), keys, schedule)
        simulation = self._simulation(plan, keys, schedule)
        shared = shape is not self.shape
        history = ReadCaches(simulation, self.source.cache_of, self.shape) if shared else simulation
        return PlanRuns(runs, simulation, MetricSeries(history, metrics, self.first), baseline, schedule)

    def _deciding(self, plan: EvictionPlan) -> Shape:
        """Return the layers that decide: those that own a cache; of a sparse reader, which evicts nothing, all."""
        return self.shape if plan.policy.traits.reads else self.source.caches

    def _simulation(self, plan: EvictionPlan, keys: list[int], schedule: Schedules | None) -> CacheSimulation:
        shape, missing = self._deciding(plan), self.source.missing
        signals = {name: self.source.signal(name)[: len(shape.layers)] for name in sorted(plan.needs - ROWS)}
        if schedule is not None:
            signals["schedule"] = schedule.leaves.to(self._device)
        return CacheSimulation(
            plan,
            keys,
            shape,
            self._prefill,
            signals,
            missing_mass=None if missing is None else missing[: len(shape.layers)],
            allocator=self._work.survey.allocator(plan, keys, self.sequence, shape.layers),
            device=self._device,
        )


@torch.inference_mode()
def step_through(
    work: OpenLoop,
    sink: Sink,
    *,
    sequences: Sequence[TokenSequence] | None = None,
    progress: Progress | None = None,
) -> Tally:
    """Step all runs through a trace, and return their counts.

    The trace is read once, or more often where memory does not suffice for all runs at once.

    Parameters
    ----------
    work : OpenLoop
        Trace, runs and metrics.
    sink : Sink
        Receives residency and fidelity of each run, sequence and layer.
    sequences : sequence, optional
        Sequences of the trace; all by default.
    progress : callable, optional
        Called with the completed share, from 0 to 1.
    """
    tally, parts = Tally(), RunParts()
    groups = group_specs(work, work.trace.sequences if sequences is None else sequences)
    runs = [run for of_plan in by_plan(work.runs) for run in of_plan]
    with BlockReader(work.trace, groups, work.device) as reader:
        for number, group in enumerate(groups):
            share = part_of(progress, number, number + 1, len(groups))
            waiting = list(runs)
            while waiting:
                part = replace(work, runs=parts.next_part(waiting))
                for result in _stepped(part, group, reader.blocks(number), parts, share):
                    del waiting[0]
                    tally.add(result.counts)
                    for layer in result.layers:
                        layer.write(sink, result.run, group.sequence.index)
    return tally


def group_specs(work: OpenLoop, sequences: Sequence[TokenSequence]) -> list[GroupSpec]:
    """Return the groups of layers of some sequences, in the order in which they are stepped through."""
    groups = []
    for sequence in sequences:
        needs = work.footprints[sequence.index]
        for caches in cache_groups(work.trace):
            groups += [
                GroupSpec(sequence, layers, needs.steps) for layers in _together(work.trace, caches, needs.layers)
            ]
    return groups


def _together(trace: Trace, caches: Sequence[Sequence[int]], most: int) -> list[list[int]]:
    """Return groups of at most so many layers; those that read one cache are together, those that own one first."""
    groups: list[list[Sequence[int]]] = []
    count = most
    for readers in caches:
        if not groups or count + len(readers) > most:
            groups.append([])
            count = 0
        groups[-1].append(readers)
        count += len(readers)
    return [owners_first(trace, group) for group in groups]


def _stepped(
    work: OpenLoop,
    spec: GroupSpec,
    read: Iterator[HostBlock],
    parts: RunParts,
    progress: Progress | None,
) -> Iterator[RunResult]:
    """Yield the results of runs over a group of layers; where memory is exceeded, of some or none, and tell `parts`."""
    try:
        group = LayerGroup(work, spec.sequence, spec.layers)
        for block in group.blocks(read):
            for simulation, observed in group.observed(block):
                simulation.block(observed)
            group.score(block)
            if progress is not None:
                progress((block.start + block.rows.shape[-2]) / spec.sequence.length)
        group.check()
        yield from group.results()
    except MEMORY_ERRORS as error:
        parts.divide(work.runs, error)
