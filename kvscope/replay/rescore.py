"""Metrics of a replay computed again, from its residency intervals and its trace: nothing is decided a second time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvscope.core.errors import UsageError
from kvscope.core.options import Loop, OutputOptions
from kvscope.core.records import ReplayRecord, RunRecord, Scored
from kvscope.core.residency import ResidencyIntervals
from kvscope.engine.device import torch_device
from kvscope.engine.layers import RecordedLayers
from kvscope.engine.provenance import versions
from kvscope.engine.rows import Shape
from kvscope.engine.scoring import BlockScorer, MetricSeries
from kvscope.engine.signals import measurable
from kvscope.metrics import Metric
from kvscope.results.residency import read_residency
from kvscope.results.store import Replay
from kvscope.results.writer import ReplayWriter
from kvscope.trace.reader import Trace

BLOCK_BYTES = 64 * 2**20  # of the rows of a layer that are in memory at once


class Recorded:
    """What one run left visible and held in one layer, as its residency intervals say.

    Parameters
    ----------
    intervals : ResidencyIntervals
        Of the layer.
    shape : Shape
        Of that one layer.
    budget : int
        ``B``.
    reads : bool
        Whether they are those of a sparse reader: what it read, while it held whatever the layer can see.
    device : torch.device
        Where the masks go.
    """

    def __init__(
        self, intervals: ResidencyIntervals, shape: Shape, budget: int, reads: bool, device: torch.device
    ) -> None:
        self.shape, self.budgets = shape, [budget]
        self._intervals, self._reads, self._device = intervals, reads, device

    def visible(self, start: int, stop: int) -> Tensor:
        """Return ``V_t`` for steps `start` to `stop` - 1, bool ``[1, 1, G, stop - start, stop]``."""
        return self._on_device(self._intervals.visible(start, stop), stop)

    def held(self, start: int, stop: int) -> Tensor:
        """Return ``R_t`` for steps `start` to `stop` - 1, bool ``[1, 1, G, stop - start, stop]``."""
        if not self._reads:
            return self._on_device(self._intervals.held(start, stop), stop)
        step, key = torch.arange(start, stop)[:, None], torch.arange(stop)
        reach, length = self.shape.reach()[0], self.shape.length
        leave = torch.where(key + reach < length, key + reach - 1, length)  # when a sliding window forgets it
        mask = ((key <= step) & (step < leave)).to(self._device)
        return mask.expand(1, 1, self.shape.kv_heads, -1, -1)

    def _on_device(self, mask: NDArray[np.bool_], keys: int) -> Tensor:
        return torch.from_numpy(mask[None, None, ..., :keys]).to(self._device)


@dataclass(frozen=True)
class ScoreJob:
    """Metrics of a replay to compute again, with nothing left to check.

    Attributes
    ----------
    replay : Replay
        Whose decisions are scored.
    trace : Trace
        That it was made from.
    runs : list of RunRecord
        Its open runs.
    skipped_runs : int
        How many runs of a closed loop are left out: what they paid attention to is not recorded.
    metrics : list of Metric
        What to compute.
    skipped_metrics : dict of str to str
        Name of each metric that the trace has no signal for, and why.
    device : torch.device
        Where to compute.
    """

    replay: Replay
    trace: Trace
    runs: list[RunRecord]
    skipped_runs: int
    metrics: list[Metric]
    skipped_metrics: Mapping[str, str]
    device: torch.device

    def execute(self, output: OutputOptions, progress_callback: Callable[[float], None] | None = None) -> Replay:
        """Return a new replay with the same decisions; raises OutputExists or ResultError as `ReplayWriter` does."""
        started, old = time.monotonic(), self.replay
        record = ReplayRecord(
            trace=old.info.trace,
            prefill=old.info.prefill,
            loop=Loop.open,
            metrics={item.name: item.declaration() for item in self.metrics},
            runs=tuple(self.runs),
            versions=versions(),
            command=output.command,
            left_out=self.skipped_metrics,
            scored=Scored(old.name, old.info.created),
        )
        parts = [(sequence, layer) for sequence in range(len(self.trace.sequences)) for layer in self.trace.layers]
        with ReplayWriter(output.path, record, force=output.force) as writer:
            for number, (sequence, layer) in enumerate(parts):
                self._score(sequence, layer, writer)
                if progress_callback is not None:
                    progress_callback((number + 1) / len(parts))
            return writer.finish(seconds=round(time.monotonic() - started, 3))

    def _score(self, sequence: int, layer: int, writer: ReplayWriter) -> None:
        """Score and write one layer of one sequence, whose rows are read once."""
        of = self.trace.sequences[sequence]
        source = RecordedLayers(self.trace, of, [layer], self.device)
        first = of.prompt if self.replay.info.prefill == "full" else 0
        residency = read_residency(self.replay, sequence, layer)
        every_series = []
        for run in self.runs:
            kept = Recorded(residency[run.run], source.shape, run.keys(sequence), run.reads, self.device)
            every_series.append(MetricSeries(kept, self.metrics, first))
        values = source.signal("values") if any("values" in metric.needs for metric in self.metrics) else None
        scorer = BlockScorer(every_series, values)
        size = max(1, BLOCK_BYTES // (4 * self.trace.heads * of.length))
        for start in range(0, of.length, size):
            stop = min(start + size, of.length)
            missing = None if source.missing is None else source.missing[..., start:stop]
            scorer.add(source.rows(start, stop), start, missing)
        steps = np.arange(first, of.length)
        for run, series in zip(self.runs, every_series, strict=True):
            number = run.run
            writer.residency(number, sequence, layer, residency[number])
            values_of = {name: value[0, 0].cpu().numpy() for name, value in series.values().items()}
            writer.fidelity(number, sequence, layer, steps, values_of)


def compile_score(replay: Replay, trace: Trace, metrics: Sequence[str] | None = None, device: str = "cpu") -> ScoreJob:
    """Return the job that computes metrics of a replay again.

    Raises
    ------
    UsageError
        For an unknown metric, or a replay without open runs.
    TraceError
        If the trace lacks what a metric that is named needs.
    ResultError
        If the trace is another than that of the replay.
    """
    replay.require_trace(trace.identity, trace.path)
    chosen, skipped = measurable(trace, metrics)
    runs = [run for run in replay.info.runs if run.loop is Loop.open]
    if not runs:
        raise UsageError(f"{replay.path} has no open run", "The metrics of a closed loop come with it: replay again.")
    return ScoreJob(replay, trace, runs, len(replay.info.runs) - len(runs), chosen, skipped, torch_device(device))


def rescore(
    replay: Replay,
    trace: Trace,
    metrics: Sequence[str] | None = None,
    *,
    output: Path,
    device: str = "cpu",
    progress: Callable[[float], None] | None = None,
    command: str | None = None,
    force: bool = False,
) -> Replay:
    """Return a new replay with the same decisions and other metrics: those that the replay itself would have written.

    Runs of a closed loop are left out: what they paid attention to is not recorded.

    Parameters
    ----------
    replay : Replay
        Whose decisions to score.
    trace : Trace
        That it was made from.
    metrics : sequence of str, optional
        Names; by default all that the trace has the signals for.
    output, command, force
        As in `OutputOptions`.
    device : str
        Where to compute: ``cpu``, ``cuda``.
    progress : callable, optional
        Called with the share that is done.

    Raises
    ------
    UsageError, TraceError, ResultError
        As `compile_score`.
    OutputExists, ResultError
        If the output exists, or cannot be written.
    """
    job = compile_score(replay, trace, metrics, device)
    return job.execute(OutputOptions(Path(output), force, command), progress)
