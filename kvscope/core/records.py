"""What ``run.json`` and ``summary.json`` say of a replay, as typed records: their only reader and writer.

A replay is a folder. Its ``run.json`` (`ReplayRecord`) says what was replayed, and how; ``summary.json``
(`SummaryRecord`) has the figures of every run and is small enough to commit as a baseline.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from kvscope.core.errors import ResultError
from kvscope.core.json_records import Format, Number, Plain, Positive, Share, about, given, later
from kvscope.core.options import Loop, Positions, Prefill

SCHEMA_VERSION = 1
HISTORY = {
    1: "first version: open loop; added since, as nothing breaks: `decisions` and `tails` of every run, `left_out`",
}
REPLAY = Format("kvscope-replay", "replay", 1, SCHEMA_VERSION, ResultError, "Replay again.")
SUMMARY = Format("kvscope-summary", "summary", 1, SCHEMA_VERSION, ResultError, "Replay again.")
RUN_FILE, SUMMARY_FILE = "run.json", "summary.json"
Direction = Literal["higher", "lower", "none"]


@dataclass(frozen=True)
class SequenceRef:
    """A sequence of the trace, or a window of a text."""

    prompt: Positive = about("tokens of the prompt, `P`")
    length: Positive = about("tokens in all, `T`")

    def __post_init__(self) -> None:
        if self.prompt > self.length:
            raise ValueError(f"a prompt of {self.prompt} tokens in a sequence of {self.length}")


@dataclass(frozen=True)
class TextRef:
    """A text file that was read."""

    file: str = about("its path")
    sha256: str = about("SHA-256 of its text")


@dataclass(frozen=True, kw_only=True)
class TraceRef:
    """The trace that was replayed, as a summary names it."""

    name: str = about("name of its folder; of plain text, of the file")
    identity: str = about("SHA-256 by which its content is known again")
    model: str | None = about("name of the model, null where it is not known")
    sequences: tuple[SequenceRef, ...] = about("its sequences, in order")
    lossy: Mapping[str, Plain] | None = later("of a trace that stores a part of every row: how much is outside", None)
    approximate: tuple[str, ...] = later("what about it is approximate, in sentences", ())


@dataclass(frozen=True, kw_only=True)
class SourceRef(TraceRef):
    """The trace or text that was replayed, as the replay itself names it."""

    path: str | None = later("where it was; absent for plain text", None)
    kind: Literal["trace", "text"] = later("`text` for plain text", "trace")
    layers: tuple[Number, ...] = about("numbers of the layers that were replayed")
    heads: Positive = about("query heads of a layer, `H`")
    kv_heads: Positive = about("key/value heads of a layer, `G`")
    protocol: str = given("`generated`, `forced`, `import`, or `text`", "")
    window: Positive | None = later("of plain text: tokens of a window", None)
    texts: tuple[TextRef, ...] = later("of plain text: the files", ())

    @property
    def summarised(self) -> TraceRef:
        """The part of it that a summary keeps."""
        return TraceRef(**{each.name: getattr(self, each.name) for each in fields(TraceRef)})


@dataclass(frozen=True)
class MetricRecord:
    """What a metric declares of itself."""

    direction: Direction = about("which way is better")
    range: tuple[float | None, float | None] = given("smallest and largest value; null is no limit", (None, None))
    when_nothing_evicted: float | None = given("its value where nothing was evicted; null is none", None)
    unit: str = later("unit of its values", "")
    summary: str = later("what it measures, in one line", "")


@dataclass(frozen=True)
class Certificate:
    """How near the schedule of a clairvoyant policy is to the best one."""

    exact: bool = about("whether it is the best, up to rounding")
    gap: float = about("mass for each step and head by which it may be worse")


@dataclass(frozen=True)
class RunCounts:
    """What is known of a run only when it has ended; the fields are those of `RunRecord`."""

    allocated_keys: int
    uniform_keys: int
    decisions_changed: int | None = None
    certificate: Certificate | None = None


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One policy under one budget, and how it was run."""

    run: Number = about("its number")
    policy: str = about("name of the policy")
    label: str = about("policy with the parameters and choices that differ from the defaults")
    params: Mapping[str, Plain] = about("every parameter of the policy")
    budget: str | None = about("budget as it was given; null for a policy that holds to none")
    budget_keys: Positive | tuple[Positive, ...] = about("`B` in keys, of each sequence; one number where all agree")
    prefill: Prefill = about("`full` or `stream`")
    phase: str = given("when it evicts: `step`, `prefill`, `every:N` or `none`", "step")
    allocate: str = given("how the budget is allocated to layers and heads", "uniform")
    accumulate: str = given("precision of live rows and sums", "float32")
    reads: bool = given("whether it is a sparse reader: it holds every key and reads some", False)
    clairvoyant: bool = given("whether it is a bound, which knows rows to come", False)
    bounded: bool = given("whether it is held to its budget", True)
    published: bool = given("whether it reproduces a published code with its quirks", False)
    loop: Loop = given("`open` or `closed`", Loop.open)
    scope: str = given("what decides: each `kv_head`, or the `layer` as one", "kv_head")
    lossy: bool | None = later("whether it saw rows that were rebuilt approximately", None)
    positions: Positions | None = later("of a closed run: RoPE positions of the keys", None)
    open_run: Number | None = later("of a closed run: number of the open run of the same policy and budget", None)
    decisions: str | None = later("SHA-256 of its residency: equal exactly where every key came and went alike", None)
    allocated_keys: Number | None = later("keys that were handed out to all heads together", None)
    uniform_keys: Number | None = later("keys that an equal share for every head would come to", None)
    decisions_changed: Number | None = later("evictions at another step than with sums in float32", None)
    certificate: Certificate | None = later("of a schedule: how near it is to the best", None)

    def keys(self, sequence: int) -> int:
        """Return ``B`` for a sequence."""
        return self.budget_keys if isinstance(self.budget_keys, int) else self.budget_keys[sequence]

    @property
    def title(self) -> str:
        """What the run is called in a table: label, budget and loop."""
        return f"{self.label} {self.budget or 'full cache'} {self.loop}"


@dataclass(frozen=True)
class MetricSummary:
    """The mean of a metric over steps, then heads, layers and sequences."""

    mean: float | None = about("the mean; null where it has no value")
    low: float | None = given("lower end of the 95 % bootstrap interval over sequences", None)
    high: float | None = given("upper end", None)
    count: Number | None = given("values that it is the mean of", None)


@dataclass(frozen=True)
class StepPlace:
    """A step of a head."""

    value: float = about("value of the metric there")
    sequence: Number = about("number of the sequence")
    layer: Number = about("layer")
    head: Number = about("query head")
    step: Number = about("query position")


@dataclass(frozen=True)
class HeadPlace:
    """A head."""

    layer: Number = about("layer")
    head: Number = about("query head")


@dataclass(frozen=True)
class Tails:
    """What a mean hides of a metric."""

    share_below_half: Share = about("share of the steps at which a head is below one half")
    worst_step: float = about("least value of any step of a head, mean over heads, layers and sequences")
    worst_step_at: StepPlace = about("where the least of all is")
    worst_head: float = about("least mean of any head")
    worst_head_at: HeadPlace = about("which head that is")


@dataclass(frozen=True)
class BoundShares:
    """A run beside the best that any policy could do at its budget."""

    share_of_belady: float | None = about("its retained mass divided by that of `belady`; null where that was not run")
    belady_of_ideal: float | None = about("retained mass of `belady` divided by that of `ideal`")


@dataclass(frozen=True)
class LoopGap:
    """A closed run beside its open run."""

    held_overlap: Share = about("overlap of the keys that both hold, intersection over union, mean over layers")
    held_overlap_by_layer: Mapping[str, float] = about("the same of each layer")
    retained_mass: float | None = about("retained mass of the closed run minus that of the open one")


@dataclass(frozen=True, kw_only=True)
class RunSummary(RunRecord):
    """A run with its figures."""

    metrics: Mapping[str, MetricSummary] = about("figures of every metric, by name")
    bounds: BoundShares = given("the run beside the bounds", BoundShares(None, None))
    tails: Mapping[str, Tails] = given("tails of retained mass, by metric", {})
    gap: LoopGap | None = later("of a closed run: how it differs from its open run", None)

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

    trace: TraceRef = about("the trace")
    metrics: Mapping[str, MetricRecord] = about("every metric, as it declares itself")
    runs: tuple[RunSummary, ...] = about("every run, with its figures")

    def __post_init__(self) -> None:
        for run in self.runs:
            unknown = sorted(run.metrics.keys() - self.metrics.keys())
            if unknown:
                raise ValueError(f"run {run.run} has a metric {unknown[0]!r} that is not among `metrics`")


@dataclass(frozen=True)
class Scored:
    """The replay whose decisions were scored again."""

    replay: str = about("its name")
    created: str = about("when it was made")


@dataclass(frozen=True, kw_only=True)
class ReplayRecord:
    """The content of ``run.json``."""

    trace: SourceRef = about("the trace or text")
    prefill: Prefill = about("`full` or `stream`")
    loop: str = about("`open`, `closed`, or `open and closed`")
    metrics: Mapping[str, MetricRecord] = about("every metric, as it declares itself")
    runs: tuple[RunRecord, ...] = about("every run: one policy under one budget")
    versions: Mapping[str, str] = given("versions of what computed it", {})
    command: str | None = given("command line; null from Python", None)
    left_out: Mapping[str, str] = given("metrics that were skipped, and why", {})
    scored: Scored | None = later("of `kvscope score`: the replay that was scored", None)
    complete: bool = later("whether it was written to its end", False)
    writer: Mapping[str, Plain] | None = later("while it is written: the process that writes it", None)
    created: str = later("when it was finished, in UTC", "")
    sizes: Mapping[str, Number] = later("bytes of every file", {})
    checksums: Mapping[str, str] = later("SHA-256 of every file", {})
    seconds: float | None = later("how long it took", None)

    def run(self, number: int) -> RunRecord:
        """Return the run of a number; raises KeyError if there is none."""
        return {run.run: run for run in self.runs}[number]


def read_replay(path: Path) -> ReplayRecord:
    """Return the content of ``run.json`` of a whole replay.

    Raises
    ------
    ResultError
        Each with its own message: nothing there, not a replay, older, newer, incomplete, damaged.
    """
    file = path / RUN_FILE
    if not path.exists():
        unfinished = path.with_name(path.name + ".incomplete")
        if unfinished.exists():
            raise ResultError(f"replay {path} is incomplete: it stopped before its end", _again(unfinished))
        raise ResultError(f"no replay at {path}", "Make one: kvscope replay --policy h2o --policy tova")
    if not file.is_file():
        raise ResultError(f"{path} is not a kvscope replay: it has no {RUN_FILE}", "Name a folder under reports/.")
    data = REPLAY.header(file, example="Name a replay, as kvscope replay writes it.")
    if data.get("complete") is not True:
        raise ResultError(f"replay {path} is incomplete: it stopped before its end", _again(path))
    for name in ("created", "sizes", "checksums"):
        if name not in data:
            raise ResultError(f"{file} is damaged: it has no field `{name}`", "Replay again.")
    return REPLAY.decode(data, file, ReplayRecord)


def read_summary(file: Path) -> SummaryRecord:
    """Return the content of a ``summary.json``; raises ResultError as `read_replay`."""
    return SUMMARY.read(file, SummaryRecord, example="Name a summary, as kvscope replay writes it.")


def summary_of(run: RunRecord, **figures: object) -> RunSummary:
    """Return a run with its figures; one number of keys where all sequences have the same."""
    keys = run.budget_keys
    if isinstance(keys, tuple) and len(set(keys)) == 1:
        run = replace(run, budget_keys=keys[0])
    return RunSummary(**vars(run), **figures)  # type: ignore[arg-type]


def _again(path: Path) -> str:
    return f"Replay again; {path} can be removed."
