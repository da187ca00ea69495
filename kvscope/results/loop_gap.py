"""Difference between open and closed loop: overlap of the keys held, and difference of retained mass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from kvscope.core.options import Prefill
from kvscope.core.records import ReplayRecord
from kvscope.core.residency import ResidencyIntervals
from kvscope.core.summary_records import LoopGap, RunSummary

BLOCK = 2**24  # entries of a block of held sets


class LoopGapCounter:
    """Compares what closed runs held with what the open runs they belong to held, as both are written.

    Parameters
    ----------
    record : ReplayRecord
        A closed run names its open one as `open_run`.
    """

    def __init__(self, record: ReplayRecord) -> None:
        self._open = {run.run: run.open_run for run in record.runs if run.open_run is not None}
        self._compared = set(self._open.values())
        self._sequences, self._full = record.trace.sequences, record.prefill is Prefill.full
        self._waiting: dict[tuple[int, int, int], ResidencyIntervals] = {}
        self._overlap: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))  # run -> layer

    def add(self, run: int, sequence: int, layer: int, intervals: ResidencyIntervals) -> None:
        """Add the intervals of a run; those of an open run are kept until those of its closed run are added."""
        if run in self._compared:
            self._waiting[run, sequence, layer] = intervals
        elif run in self._open:
            other = self._waiting.pop((self._open[run], sequence, layer), None)
            if other is not None:
                self._overlap[run][layer].append(self._shared(sequence, intervals, other))

    def of(self, run: int, runs: Mapping[int, RunSummary]) -> LoopGap | None:
        """Return the gap of a closed run, or None where there is no open one; `runs` are all, by their numbers."""
        if run not in self._overlap:
            return None
        layers = {layer: float(np.mean(values)) for layer, values in sorted(self._overlap[run].items())}
        open_, closed = (runs[number].mean("retained_mass") for number in (self._open[run], run))
        return LoopGap(
            held_overlap=float(np.mean(list(layers.values()))),
            held_overlap_by_layer={str(layer): value for layer, value in layers.items()},
            retained_mass=None if open_ is None or closed is None else closed - open_,
        )

    def _shared(self, sequence: int, one: ResidencyIntervals, other: ResidencyIntervals) -> float:
        """Return ``|A & B| / |A | B|`` of the held sets, mean over heads and steps that may have evictions."""
        first = self._sequences[sequence].prompt - 1 if self._full else 0
        size = max(1, BLOCK // (one.heads * one.length))
        total, count = 0.0, 0
        for start in range(first, one.length, size):
            stop = min(start + size, one.length)
            a, b = (intervals.held(start, stop) for intervals in (one, other))
            total += float(((a & b).sum(-1) / np.maximum((a | b).sum(-1), 1)).sum())
            count += one.heads * (stop - start)
        return total / count
