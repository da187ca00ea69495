"""What ``summary.json`` says of a replay, as typed records: its only reader and writer.

It has the figures of every run (`SummaryRecord`) and is small enough to commit as a baseline.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from kvscope.core.errors import ResultError
from kvscope.core.json_records import Finite, Format, Number, Share, about
from kvscope.core.records import SCHEMA_VERSION, MetricRecord, RunRecord, TraceRef

SUMMARY = Format("kvscope-summary", "summary", SCHEMA_VERSION, ResultError, "Replay again.")
SUMMARY_FILE = "summary.json"


@dataclass(frozen=True)
class MetricSummary:
    """The mean of a metric over steps, then heads, layers and sequences."""

    mean: Annotated[Finite | None, about("the mean; null if it has no value")]
    low: Annotated[Finite | None, about("lower end of the 95 % bootstrap interval over sequences")] = None
    high: Annotated[Finite | None, about("upper end")] = None
    count: Annotated[Number | None, about("number of values in the mean")] = None

    def __post_init__(self) -> None:
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"an interval from {self.low} to {self.high}")


@dataclass(frozen=True)
class StepPlace:
    """A step of a head."""

    value: Annotated[Finite, about("value of the metric at this place")]
    sequence: Annotated[Number, about("number of the sequence")]
    layer: Annotated[Number, about("layer")]
    head: Annotated[Number, about("query head")]
    step: Annotated[Number, about("query position")]


@dataclass(frozen=True)
class HeadPlace:
    """A head."""

    layer: Annotated[Number, about("layer")]
    head: Annotated[Number, about("query head")]


@dataclass(frozen=True)
class Tails:
    """What a mean hides of a metric."""

    share_below_half: Annotated[Share, about("share of the steps at which a head is below one half")]
    worst_step: Annotated[
        Finite, about("smallest value of any step of a head, as the mean over heads, layers and sequences")
    ]
    worst_step_at: Annotated[StepPlace, about("place of the smallest value")]
    worst_head: Annotated[Finite, about("smallest mean of any head")]
    worst_head_at: Annotated[HeadPlace, about("which head that is")]


@dataclass(frozen=True)
class BoundShares:
    """A run beside the best that any policy could do at its budget."""

    share_of_belady: Annotated[
        float | None, about("its retained mass divided by that of `belady`; null if `belady` was not run")
    ]
    belady_of_ideal: Annotated[Finite | None, about("retained mass of `belady` divided by that of `ideal`")]


@dataclass(frozen=True)
class LoopGap:
    """A closed run beside its open run."""

    held_overlap: Annotated[
        Share, about("overlap of the keys that both hold, intersection over union, mean over layers")
    ]
    held_overlap_by_layer: Annotated[Mapping[str, Share], about("the same for each layer")]
    retained_mass: Annotated[Finite | None, about("retained mass of the closed run minus that of the open one")]


@dataclass(frozen=True)
class TaskSummary:
    """Figures of the examples of one task and length."""

    task: Annotated[str | None, about("the task; null if the dataset names none")]
    length: Annotated[Number | None, about("length for which its examples were made; null if unknown")]
    metrics: Annotated[Mapping[str, MetricSummary], about("figures of its answers, by name; intervals over examples")]


@dataclass(frozen=True, kw_only=True)
class RunSummary(RunRecord):
    """A run with its figures."""

    metrics: Annotated[Mapping[str, MetricSummary], about("figures of every metric, by name")]
    bounds: Annotated[BoundShares, about("the run compared with the bounds")] = BoundShares(None, None)
    tails: Annotated[Mapping[str, Tails], about("tails of retained mass, by metric")] = field(default_factory=dict)
    gap: Annotated[LoopGap | None, about("for a closed run: how it differs from its open run", omit=True)] = None
    tasks: Annotated[
        tuple[TaskSummary, ...], about("for a closed run: figures of right answers, by task and length", omit=True)
    ] = ()

    def mean(self, metric: str) -> float | None:
        """Return the mean of a metric; None where it was not computed or has no value."""
        found = self.metrics.get(metric)
        return None if found is None else found.mean

    def count(self, metric: str) -> int:
        """Return how many values a mean is of; 0 where it was not computed."""
        found = self.metrics.get(metric)
        return 0 if found is None else found.count or 0


@dataclass(frozen=True)
class SummaryRecord:
    """The content of ``summary.json``."""

    trace: Annotated[TraceRef, about("the trace")]
    metrics: Annotated[Mapping[str, MetricRecord], about("the declaration of every metric")]
    runs: Annotated[tuple[RunSummary, ...], about("every run, with its figures")]

    def __post_init__(self) -> None:
        for run in self.runs:
            unknown = sorted(run.metrics.keys() - self.metrics.keys())
            if unknown:
                raise ValueError(f"run {run.run} has a metric {unknown[0]!r} that is not among `metrics`")


def read_summary(file: Path) -> SummaryRecord:
    """Return the content of a ``summary.json``; raises ResultError as `read_replay`."""
    return SUMMARY.read(file, SummaryRecord, example="Name a summary, as kvscope replay writes it.")


def summary_of(run: RunRecord, **figures: object) -> RunSummary:
    """Return a run with its figures; one number of keys where all sequences have the same."""
    keys = run.budget_keys
    if isinstance(keys, tuple) and len(set(keys)) == 1:
        run = replace(run, budget_keys=keys[0])
    return RunSummary(**vars(run), **figures)  # type: ignore[arg-type]
