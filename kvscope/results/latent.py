"""What a latent cache must hold: one vector for all heads of a layer, as long as any head holds its key."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from kvscope.core.options import Prefill
from kvscope.core.records import MetricRecord, RunRecord, SourceRef
from kvscope.core.residency import ResidencyIntervals
from kvscope.core.summary_records import MetricSummary
from kvscope.results.statistics import interval

NUMBER = 2  # bytes of a cached number: weights are published in 16 bit

LATENT: dict[str, MetricRecord] = {
    "latent_entries": MetricRecord(
        "none",
        (0, None),
        None,
        "entries",
        "Latent vectors that a layer holds: the union of the keys that its heads hold, mean over steps and layers.",
    ),
    "latent_bytes": MetricRecord(
        "none",
        (0, None),
        None,
        "bytes",
        "Bytes of the latent vectors that all layers hold, in 16 bit, mean over steps.",
    ),
}


class LatentCounter:
    """Counts the latent vectors that runs hold at the scored steps, from the residency of each layer.

    Nothing is counted where the cache is not latent, and of runs that hold every key and read some.

    Parameters
    ----------
    trace : SourceRef
        Says how long a latent vector is, and which layers read the cache of another, which is counted once.
    runs : sequence of RunRecord
        The runs of the replay.
    """

    def __init__(self, trace: SourceRef, runs: Sequence[RunRecord]) -> None:
        self._trace = trace
        counted = runs if trace.latent_size is not None else ()
        self._after_prompt = {run.run: run.prefill is Prefill.full for run in counted if not run.reads}
        self._owners = [layer for layer in trace.layers if str(layer) not in trace.shared_cache]
        self._sums: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))  # run -> sequence

    def add(self, run: int, sequence: int, layer: int, intervals: ResidencyIntervals) -> None:
        """Take the residency of one layer."""
        if run not in self._after_prompt or layer not in self._owners:
            return
        first = self._first(run, sequence)
        stays = np.maximum(intervals.leave.astype(np.int64) - np.maximum(intervals.key, first), 0)  # scored steps
        longest = np.zeros(intervals.length, np.int64)  # of each key, in the head that holds it longest
        np.maximum.at(longest, intervals.key, stays)
        self._sums[run][sequence] += float(longest.sum())

    def by_sequence(self, run: int) -> dict[int, dict[str, float]]:
        """Return the metrics of `LATENT` for each sequence of a run that has scored steps."""
        found = {}
        for sequence, total in sorted(self._sums.get(run, {}).items()):
            steps = self._trace.sequences[sequence].length - self._first(run, sequence)
            if steps > 0:
                held = total / steps  # vectors of all layers
                size = (self._trace.latent_size or 0) * NUMBER
                found[sequence] = {"latent_entries": held / len(self._owners), "latent_bytes": held * size}
        return found

    def of(self, run: int) -> dict[str, MetricSummary]:
        """Return these metrics of a run with their 95 % bootstrap interval over sequences; empty if it has none."""
        each, copies = self.by_sequence(run), self._trace.near_copies
        clusters = [copies[sequence] for sequence in each] if copies else ()
        found = {}
        for name in LATENT if each else ():
            values = np.array([of_sequence[name] for of_sequence in each.values()])
            found[name] = MetricSummary(float(values.mean()), *interval(values, clusters=clusters), len(values))
        return found

    def _first(self, run: int, sequence: int) -> int:
        return self._trace.sequences[sequence].prompt if self._after_prompt[run] else 0
