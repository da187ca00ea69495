"""What the cells of an experiment and its summary say, as typed records: the only reader and writer of both.

A cell is one replay: policies and budgets over the trace of one model and one set of prompts. A `CellRecord` lies
beside the folder of its replay and has a figure of every sequence, so that cells can be pooled without their replays.
`ExperimentRecord` has what is pooled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from kvscope.core.errors import ResultError
from kvscope.core.json_records import Checksum, Finite, Format, NotNegative, Number, Plain, Positive, about
from kvscope.core.options import Prefill
from kvscope.core.records import MetricRecord
from kvscope.core.summary_records import MetricSummary

SCHEMA_VERSION = 1
HISTORY = {1: "first version"}
CELL = Format("kvscope-cell", "cell of an experiment", SCHEMA_VERSION, ResultError, "Remove it, and run again.")
EXPERIMENT = Format(
    "kvscope-experiment", "summary of an experiment", SCHEMA_VERSION, ResultError, "Remove it, and run it again."
)
LOSSES = ("nll_full", "nll_policy", "kl", "top1_equal")  # sums over the scored tokens of a sequence
NO_TRACE = "its trace could not be recorded"  # why a replay failed whose trace has a failure of its own
Step = Literal["replay", "closed-loop", "generate"]


@dataclass(frozen=True)
class CellSequence:
    """A sequence of the trace that was replayed."""

    task: Annotated[str | None, about("its task; null if unknown")]
    length: Annotated[Number | None, about("length for which it was made; null if unknown")]
    cluster: Annotated[Number, about("near-copies of one trace have the same number")]


@dataclass(frozen=True, kw_only=True)
class CellRun:
    """One policy under one budget."""

    key: Annotated[Checksum, about("SHA-256 of everything that the run depends on")]
    policy: Annotated[str, about("policy with the parameters that differ from the defaults")]
    name: Annotated[str, about("name of the policy")]
    params: Annotated[Mapping[str, Plain], about("every parameter of the policy")]
    budget: Annotated[str | None, about("budget; null for a policy without one")]
    clairvoyant: Annotated[bool, about("whether it is a bound, which uses later rows too")]
    reads: Annotated[bool, about("whether it is a sparse reader")]
    open_run: Annotated[
        Number, about("its number in the replay; for a run that only the closed loop has, the number of its closed run")
    ]
    closed_run: Annotated[Number | None, about("number of its closed run; null if there is none")]
    values: Annotated[Mapping[str, tuple[Finite | None, ...]], about("for each metric, the mean of every sequence")]
    losses: Annotated[
        Mapping[str, tuple[NotNegative, ...]],
        about("of a closed run: sums over the scored tokens of each sequence, and `tokens`, their number"),
    ]

    def sums(self, sequence: int) -> list[float] | None:
        """Return the losses of a sequence in the order of `LOSSES`, and the number of its tokens; None without any."""
        if not self.losses or not self.losses["tokens"][sequence]:
            return None
        return [self.losses[name][sequence] for name in (*LOSSES, "tokens")]


@dataclass(frozen=True, kw_only=True)
class CellRecord:
    """A replay of an experiment, with the figures of every sequence."""

    replay: Annotated[str, about("name of the folder of the replay")]
    trace: Annotated[str, about("name of the folder of the trace")]
    model: Annotated[str, about("model, as the experiment names it")]
    prefill: Annotated[Prefill, about("`full` or `stream`")]
    steps: Annotated[tuple[Step, ...], about("what was done for every run")]
    sequences: Annotated[tuple[CellSequence, ...], about("the sequences of the trace")]
    metrics: Annotated[Mapping[str, MetricRecord], about("the declaration of every metric")]
    runs: Annotated[tuple[CellRun, ...], about("every policy under every budget")]
    tokens: Annotated[Positive, about("tokens of all sequences")]
    seconds: Annotated[NotNegative, about("duration of the replay")]

    def __post_init__(self) -> None:
        count = len(self.sequences)
        for run in self.runs:
            for name, values in (*run.values.items(), *run.losses.items()):
                if len(values) != count:
                    raise ValueError(f"{name} has {len(values)} values for {count} sequences")
            if run.losses and set(run.losses) != {*LOSSES, "tokens"}:
                raise ValueError("`losses` lacks a sum, or has one that is not known")


@dataclass(frozen=True, kw_only=True)
class PooledRun:
    """One policy under one budget: its figures over all sequences that a row of the summary is of."""

    model: Annotated[str, about("model")]
    prefill: Annotated[Prefill, about("`full` or `stream`")]
    task: Annotated[str | None, about("task; null for all of them together")]
    length: Annotated[Number | None, about("length of its examples; null for all of them together")]
    policy: Annotated[str, about("policy with the parameters that differ from the defaults")]
    budget: Annotated[str | None, about("budget; null for a policy without one")]
    clairvoyant: Annotated[bool, about("whether it is a bound, which uses later rows too")]
    reads: Annotated[bool, about("whether it is a sparse reader")]
    sequences: Annotated[Positive, about("number of sequences")]
    clusters: Annotated[Positive, about("number of sequences, with near-copies counted as one")]
    metrics: Annotated[Mapping[str, MetricSummary], about("figures, by name; intervals over clusters")]

    def mean(self, metric: str) -> float | None:
        """Return the mean of a metric; None where it has no value."""
        found = self.metrics.get(metric)
        return None if found is None else found.mean


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The best policy by one metric at one budget."""

    model: Annotated[str, about("model")]
    prefill: Annotated[Prefill, about("`full` or `stream`")]
    budget: Annotated[str, about("budget")]
    metric: Annotated[str, about("metric by which policies are ranked")]
    best: Annotated[tuple[str, ...], about("policies with the best mean; several if they are equal")]
    value: Annotated[Finite, about("that mean")]
    second: Annotated[str | None, about("the next policy; null if there is none")] = None
    difference: Annotated[Finite | None, about("mean of the best minus mean of the next")] = None
    low: Annotated[Finite | None, about("lower end of the 95 % interval of the difference over clusters")] = None
    high: Annotated[Finite | None, about("upper end")] = None
    p: Annotated[NotNegative | None, about("p-value of the sign test over clusters that the two are equal")] = None


@dataclass(frozen=True)
class Failure:
    """A part of an experiment that has no result."""

    cell: Annotated[str, about("what failed: model, prompts, policy, budget")]
    what: Annotated[str, about("what is wrong")]
    todo: Annotated[str, about("what to do")]


@dataclass(frozen=True, kw_only=True)
class ExperimentRecord:
    """The content of ``reports/NAME.json``."""

    name: Annotated[str, about("name of the experiment")]
    spec: Annotated[Mapping[str, Plain], about("the experiment, with defaults and with every policy of its grids")]
    versions: Annotated[Mapping[str, str], about("version of kvscope")]
    metrics: Annotated[Mapping[str, MetricRecord], about("the declaration of every metric")]
    runs: Annotated[tuple[PooledRun, ...], about("figures for each task and length, then for all together")]
    verdicts: Annotated[tuple[Verdict, ...], about("the best policy at each budget by each of the main metrics")]
    replays: Annotated[tuple[str, ...], about("folders of the replays, in `reports/cells`")]
    failed: Annotated[tuple[Failure, ...], about("cells without a result, and why")] = ()
    skipped: Annotated[Mapping[str, str], about("policies of `all` that cannot run, and why")] = field(
        default_factory=dict
    )
