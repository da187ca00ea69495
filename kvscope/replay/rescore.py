"""Rescoring: the metrics of a replay, computed from its residency intervals and its trace without running policies."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvscope.core.errors import UsageError
from kvscope.core.options import Loop, OutputOptions
from kvscope.core.records import ReplayRecord, RunRecord, Scored
from kvscope.core.residency import ResidencyIntervals
from kvscope.engine.layers import RecordedLayers
from kvscope.engine.parts import RunParts
from kvscope.engine.provenance import versions
from kvscope.engine.rows import Shape
from kvscope.engine.runs import LayerResult
from kvscope.engine.scoring import BlockScorer, MetricSeries
from kvscope.engine.signals import measurable
from kvscope.kernels.device import torch_device
from kvscope.metrics import Metric
from kvscope.results.residency import read_residency
from kvscope.results.store import Replay
from kvscope.results.writer import ReplayWriter
from kvscope.trace.reader import Trace

BLOCK_BYTES = 64 * 2**20  # limit for a block of a layer's rows


class RecordedHistory:
    """The keys that one run had visible and held in one layer, from its residency intervals.

    Parameters
    ----------
    intervals : ResidencyIntervals
        Intervals of the layer.
    shape : Shape
        Sizes of the layer.
    budget : int
        ``B``.
    reads : bool
        Whether the run is a sparse reader. Then the intervals are those of the keys it read, and it held every key that
        the layer can attend to.
    device : torch.device
        Device of the masks.
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
        step, key = torch.arange(start, stop), torch.arange(stop)
        following = (step + 1).clamp(max=self.shape.length - 1)
        oldest = following + 1 - self.shape.seen(following)[0]  # of the keys that the next query can attend to
        mask = ((key <= step[:, None]) & (key >= oldest[:, None])).to(self._device)
        return mask.expand(1, 1, self.shape.kv_heads, -1, -1)

    def _on_device(self, mask: NDArray[np.bool_], keys: int) -> Tensor:
        return torch.from_numpy(mask[None, None, ..., :keys]).to(self._device)


@dataclass(frozen=True)
class ScoreJob:
    """A rescoring whose input has been checked.

    Attributes
    ----------
    replay : Replay
        The replay whose decisions are scored.
    trace : Trace
        The trace of the replay.
    runs : list of RunRecord
        The open runs of the replay.
    skipped_runs : int
        Number of closed runs; they are skipped because their attention is not recorded.
    metrics : list of Metric
        The metrics to compute.
    skipped_metrics : dict of str to str
        For the name of each metric whose signal the trace lacks: the reason.
    device : torch.device
        The device to compute on.
    """

    replay: Replay
    trace: Trace
    runs: list[RunRecord]
    skipped_runs: int
    metrics: list[Metric]
    skipped_metrics: Mapping[str, str]
    device: torch.device

    @torch.inference_mode()
    def execute(self, output: OutputOptions, progress_callback: Callable[[float], None] | None = None) -> Replay:
        """Execute the job and return a new replay with the same decisions; raises as `ReplayWriter`."""
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
            device=str(self.device),
            scored=Scored(old.name, old.info.created),
        )
        parts = [(sequence, layer) for sequence in range(len(self.trace.sequences)) for layer in self.trace.layers]
        with ReplayWriter(output.path, record, force=output.force) as writer:
            fitting = RunParts()
            for number, (sequence, layer) in enumerate(parts):
                for run, result in fitting.results(self.runs, partial(self._score, sequence, layer)):
                    result.write(writer, run, sequence)
                if progress_callback is not None:
                    progress_callback((number + 1) / len(parts))
            return writer.finish(seconds=round(time.monotonic() - started, 3))

    def _score(self, sequence: int, layer: int, runs: list[RunRecord]) -> Iterator[tuple[int, LayerResult]]:
        """Yield the number and the result of some runs in one layer of one sequence; its rows are read once."""
        tokens = self.trace.sequences[sequence]
        source = RecordedLayers(self.trace, tokens, [layer], self.device)
        first = tokens.prompt if self.replay.info.prefill == "full" else 0
        residency = read_residency(self.replay, sequence, layer)
        every_series = []
        for run in runs:
            history = RecordedHistory(residency[run.run], source.shape, run.keys(sequence), run.reads, self.device)
            every_series.append(MetricSeries(history, self.metrics, first))
        values = source.signal("values") if any("values" in metric.needs for metric in self.metrics) else None
        scorer = BlockScorer(every_series, values)
        size = max(1, BLOCK_BYTES // (4 * self.trace.heads * tokens.length))
        for start in range(0, tokens.length, size):
            stop = min(start + size, tokens.length)
            missing = None if source.missing is None else source.missing[..., start:stop]
            scorer.add(source.rows(start, stop), start, missing)
        steps = np.arange(first, tokens.length)
        for run, series in zip(runs, every_series, strict=True):
            values_by_metric = {name: value[0, 0] for name, value in series.on_cpu().items()}
            yield run.run, LayerResult(layer, residency[run.run], steps, values_by_metric)


def compile_score(replay: Replay, trace: Trace, metrics: Sequence[str] | None = None, device: str = "cpu") -> ScoreJob:
    """Check a rescoring and return it as a job.

    Raises
    ------
    UsageError
        For an unknown metric, or a replay without open runs.
    TraceError
        If the trace lacks a signal that a named metric needs.
    ResultError
        If the replay was made from another trace.
    """
    replay.require_trace(trace.identity, trace.path)
    chosen, skipped = measurable(trace, metrics)
    runs = [run for run in replay.info.runs if run.loop is Loop.open and run.cache is None]
    if not runs:
        quantised = any(run.cache is not None for run in replay.info.runs)
        what = "runs with quantised caches, whose" if quantised else "closed runs only, and the"
        raise UsageError(
            f"{replay.path} has {what} attention {'' if quantised else 'of those '}is not recorded",
            "Replay the trace again to compute other metrics.",
        )
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
    """Return a new replay with the same decisions and other metrics.

    The metrics equal those that a replay with these metrics would compute. Closed runs are skipped, because their
    attention is not recorded.

    Parameters
    ----------
    replay : Replay
        The replay whose decisions are scored.
    trace : Trace
        The trace of the replay.
    metrics : sequence of str, optional
        Names; by default all metrics whose signals the trace has.
    output, command, force
        As in `OutputOptions`.
    device : str
        The device to compute on: ``cpu``, ``cuda``.
    progress : callable, optional
        Called with the completed share, from 0 to 1.

    Raises
    ------
    UsageError, TraceError, ResultError
        As `compile_score`.
    OutputExists, ResultError
        If the output exists, or cannot be written.
    """
    job = compile_score(replay, trace, metrics, device)
    return job.execute(OutputOptions(Path(output), force, command), progress)
