"""What ``run.json`` says of a replay, as typed records: its only reader and writer.

A replay is a folder. Its ``run.json`` (`ReplayRecord`) says what was replayed, and how; the figures of every run are in
`kvscope.core.summary_records`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from kvscope.core.answer_records import ANSWERS, ExampleRef
from kvscope.core.budget import NO_BUDGET
from kvscope.core.cache_scheme import CacheText
from kvscope.core.errors import REPLAY_COMMAND, ResultError
from kvscope.core.json_records import Checksum, Finite, Format, NotNegative, Number, Plain, Positive, about
from kvscope.core.merge_scheme import MergeText
from kvscope.core.options import Loop, Positions, Prefill
from kvscope.core.output import incomplete, require_not_set_aside

SCHEMA_VERSION = 2
HISTORY = {
    1: "first version: open loop; added since, as nothing breaks: `decisions` and `tails` of every run, `left_out`, "
    "`near_copies` of the trace",
    2: "layers that read the cache of another: `shared_cache`; `held_keys` is null there, so that every cache counts "
    "once. Latent caches: `latent_entries` and `latent_bytes` of every run. Right answers: `examples` of the trace, "
    "`tasks` of every run, and answers.parquet of what each policy says; added since: `cache`, `merge` of a run",
}
REPLAY = Format("kvscope-replay", "replay", SCHEMA_VERSION, ResultError, "Replay again.")
RUN_FILE = "run.json"
Direction = Literal["higher", "lower", "none"]
Scope = Literal["kv_head", "layer"]
Precision = Annotated[str, Meta(pattern="^(float32|float16|bfloat16)$")]
ALWAYS = frozenset(("residency.parquet", "fidelity.parquet", "summary.json"))  # files of every replay
LOSSES = "tokens.parquet"  # file of a replay with closed runs
Phase = Annotated[str, Meta(pattern=r"^(step|prefill|none|every:\d+)$")]
NearCopies = Annotated[
    tuple[Number, ...],
    about("cluster of near-copies to which each sequence belongs; empty if there are none", omit=True),
]


@dataclass(frozen=True)
class SequenceRef:
    """A sequence of the trace, or a window of a text."""

    prompt: Annotated[Positive, about("tokens of the prompt, `P`")]
    length: Annotated[Positive, about("tokens in total, `T`")]

    def __post_init__(self) -> None:
        if self.prompt > self.length:
            raise ValueError(f"a prompt of {self.prompt} tokens in a sequence of {self.length}")


@dataclass(frozen=True)
class TextRef:
    """A text file that was read."""

    file: Annotated[str, about("its path")]
    sha256: Annotated[str, about("SHA-256 of its text")]
    dropped: Annotated[
        Number, about("number of last tokens that are not scored, because they are too few for a window", omit=True)
    ] = 0


@dataclass(frozen=True, kw_only=True)
class TraceRef:
    """The trace that was replayed, as a summary names it."""

    name: Annotated[str, about("name of its folder; for plain text, name of the file")]
    identity: Annotated[str, about("SHA-256 that identifies its content")]
    model: Annotated[str | None, about("name of the model; null if unknown")]
    sequences: Annotated[tuple[SequenceRef, ...], about("its sequences, in order")]
    lossy: Annotated[
        Mapping[str, Plain] | None,
        about("for a trace that stores a part of every row: the mass that is not stored", omit=True),
    ] = None
    approximate: Annotated[tuple[str, ...], about("its approximations, in sentences", omit=True)] = ()
    near_copies: NearCopies = ()


@dataclass(frozen=True)
class HeadCounts:
    """Heads of a layer that was replayed."""

    heads: Annotated[Positive, about("query heads, `H`")]
    kv_heads: Annotated[Positive, about("key/value heads, `G`")]


@dataclass(frozen=True, kw_only=True)
class SourceRef:
    """The trace or text that was replayed, as the replay itself names it."""

    name: Annotated[str, about("name of its folder; for plain text, name of the file")]
    path: Annotated[str | None, about("where it was; absent for plain text", omit=True)] = None
    kind: Annotated[Literal["trace", "text"], about("`text` for plain text", omit=True)] = "trace"
    identity: Annotated[str, about("SHA-256 that identifies its content")]
    model: Annotated[str | None, about("name of the model; null if unknown")]
    sequences: Annotated[tuple[SequenceRef, ...], about("its sequences, in order")]
    layers: Annotated[tuple[Number, ...], about("numbers of the layers that were replayed")]
    heads: Annotated[Positive, about("query heads of a layer, `H`; the largest number if layers differ")]
    kv_heads: Annotated[Positive, about("key/value heads of a layer, `G`; the largest number if layers differ")]
    protocol: Annotated[str, about("`generated`, `forced`, `import`, or `text`")] = ""
    window: Annotated[Positive | None, about("for plain text: tokens in a window", omit=True)] = None
    texts: Annotated[tuple[TextRef, ...], about("for plain text: the files", omit=True)] = ()
    lossy: Annotated[
        Mapping[str, Plain] | None,
        about("for a trace that stores a part of every row: the mass that is not stored", omit=True),
    ] = None
    latent_size: Annotated[
        Positive | None, about("for a latent cache: size of the vector that the heads of a layer share", omit=True)
    ] = None
    approximate: Annotated[tuple[str, ...], about("its approximations, in sentences", omit=True)] = ()
    near_copies: NearCopies = ()
    layer_heads: Annotated[
        tuple[HeadCounts, ...], about("heads of each of these layers, if layers differ; otherwise empty", omit=True)
    ] = ()
    shared_cache: Annotated[
        Mapping[str, Number], about("for each layer that reads the cache of another layer: that layer", omit=True)
    ] = field(default_factory=dict)
    examples: Annotated[tuple[ExampleRef, ...], about("sequences whose right answers are known", omit=True)] = ()

    def __post_init__(self) -> None:
        if any(example.sequence >= len(self.sequences) for example in self.examples):
            raise ValueError("`examples` has a sequence that the trace does not have")
        if self.near_copies and len(self.near_copies) != len(self.sequences):
            raise ValueError(f"clusters of {len(self.near_copies)} sequences of {len(self.sequences)}")
        if self.layer_heads and len(self.layer_heads) != len(self.layers):
            raise ValueError(f"the heads of {len(self.layer_heads)} layers of {len(self.layers)}")
        readers = {int(layer) for layer in self.shared_cache}
        if not readers <= set(self.layers) or readers & set(self.shared_cache.values()):
            raise ValueError("`shared_cache` names a layer that was not replayed, or one that itself reads another")
        for own in self.layer_heads or (HeadCounts(self.heads, self.kv_heads),):
            if own.heads % own.kv_heads or own.heads > self.heads or own.kv_heads > self.kv_heads:
                raise ValueError(f"{own.kv_heads} key/value heads of {own.heads} heads in a layer")

    def heads_of(self, layer: int) -> HeadCounts:
        """Return the heads of a layer that was replayed."""
        if self.layer_heads:
            return self.layer_heads[self.layers.index(layer)]
        return HeadCounts(self.heads, self.kv_heads)

    @property
    def summarised(self) -> TraceRef:
        """The part of it that a summary keeps."""
        return TraceRef(**{each.name: getattr(self, each.name) for each in fields(TraceRef)})


@dataclass(frozen=True)
class MetricRecord:
    """What a metric declares of itself."""

    direction: Annotated[Direction, about("which way is better")]
    range: Annotated[tuple[Finite | None, Finite | None], about("smallest and largest value; null means unlimited")] = (
        None,
        None,
    )
    when_nothing_evicted: Annotated[Finite | None, about("its value if nothing was evicted; null if there is none")] = (
        None
    )
    unit: Annotated[str, about("unit of its values", omit=True)] = ""
    summary: Annotated[str, about("what it measures, in one line", omit=True)] = ""


@dataclass(frozen=True)
class Certificate:
    """How near the schedule of a clairvoyant policy is to the best one."""

    exact: Annotated[bool, about("whether it is the best, up to rounding")]
    gap: Annotated[NotNegative, about("mass for each step and head by which it may fall short")]


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

    run: Annotated[Number, about("its number")]
    policy: Annotated[str, about("name of the policy")]
    label: Annotated[str, about("policy with the parameters and choices that differ from the defaults")]
    params: Annotated[Mapping[str, Plain], about("every parameter of the policy")]
    budget: Annotated[str | None, about("budget as given; null for a policy without one")]
    budget_keys: Annotated[
        Positive | tuple[Positive, ...], about("`B` in keys for each sequence; one number if all are equal")
    ]
    prefill: Annotated[Prefill, about("`full` or `stream`")]
    phase: Annotated[Phase, about("when it evicts: `step`, `prefill`, `every:N` or `none`")] = "step"
    allocate: Annotated[str, about("how the budget is divided among layers and heads")] = "uniform"
    accumulate: Annotated[Precision, about("precision of live rows and sums")] = "float32"
    reads: Annotated[bool, about("whether it is a sparse reader: it holds every key and reads some")] = False
    clairvoyant: Annotated[bool, about("whether it is a bound, which uses later rows too")] = False
    bounded: Annotated[bool, about("whether it is held to its budget")] = True
    published: Annotated[bool, about("whether it reproduces a published code with its quirks")] = False
    loop: Annotated[Loop, about("`open` or `closed`")] = Loop.open
    scope: Annotated[Scope, about("what selects keys: each `kv_head`, or the `layer` as a whole")] = "kv_head"
    lossy: Annotated[bool | None, about("whether it saw rows that were rebuilt approximately", omit=True)] = None
    positions: Annotated[Positions | None, about("for a closed run: RoPE positions of the keys", omit=True)] = None
    open_run: Annotated[
        Number | None, about("for a closed run: number of the open run with the same policy and budget", omit=True)
    ] = None
    decisions: Annotated[
        str | None,
        about("SHA-256 of its residency: equal for two runs that held the same keys at all steps", omit=True),
    ] = None
    allocated_keys: Annotated[Number | None, about("keys allocated to all heads together", omit=True)] = None
    uniform_keys: Annotated[Number | None, about("keys allocated if every head had an equal share", omit=True)] = None
    decisions_changed: Annotated[
        Number | None, about("number of evictions at a different step than with sums in float32", omit=True)
    ] = None
    certificate: Annotated[Certificate | None, about("for a schedule: how close it is to the best", omit=True)] = None
    cache: Annotated[CacheText | None, about("how its cache is quantised; absent if it is not", omit=True)] = None
    merge: Annotated[MergeText | None, about("how evicted keys are merged into retained ones", omit=True)] = None

    def keys(self, sequence: int) -> int:
        """Return ``B`` for a sequence."""
        return self.budget_keys if isinstance(self.budget_keys, int) else self.budget_keys[sequence]

    @property
    def title(self) -> str:
        """What the run is called in a table: label, budget and loop."""
        return f"{self.label} {self.budget or NO_BUDGET} {self.loop}"


@dataclass(frozen=True)
class Scored:
    """The replay whose decisions were scored again."""

    replay: Annotated[str, about("its name")]
    created: Annotated[str, about("when it was made")]


@dataclass(frozen=True, kw_only=True)
class ReplayRecord:
    """The content of ``run.json``."""

    trace: Annotated[SourceRef, about("the trace or text")]
    prefill: Annotated[Prefill, about("`full` or `stream`")]
    loop: Annotated[str, about("`open`, `closed`, or `open and closed`")]
    metrics: Annotated[Mapping[str, MetricRecord], about("the declaration of every metric")]
    runs: Annotated[tuple[RunRecord, ...], about("every run: one policy under one budget")]
    versions: Annotated[Mapping[str, str], about("versions of the software that computed it")] = field(
        default_factory=dict
    )
    command: Annotated[str | None, about("command line; null from Python")] = None
    left_out: Annotated[Mapping[str, str], about("metrics that were skipped, and why")] = field(default_factory=dict)
    scored: Annotated[Scored | None, about("for `kvscope score`: the scored replay", omit=True)] = None
    device: Annotated[str | None, about("device that computed it", omit=True)] = None
    complete: Annotated[bool, about("whether it was written to its end", omit=True)] = False
    writer: Annotated[
        Mapping[str, Plain] | None, about("while it is written: the process that writes it", omit=True)
    ] = None
    created: Annotated[str, about("end of its creation, in UTC", omit=True)] = ""
    sizes: Annotated[Mapping[str, Number], about("bytes of every file", omit=True)] = field(default_factory=dict)
    checksums: Annotated[Mapping[str, Checksum], about("SHA-256 of every file", omit=True)] = field(
        default_factory=dict
    )
    seconds: Annotated[NotNegative | None, about("duration", omit=True)] = None

    def __post_init__(self) -> None:
        numbers = [run.run for run in self.runs]
        if len(set(numbers)) < len(numbers):
            raise ValueError("`runs` has two runs of one number")
        for run in self.runs:
            if not isinstance(run.budget_keys, int) and len(run.budget_keys) != len(self.trace.sequences):
                raise ValueError(f"run {run.run} has not one number of keys for each sequence")

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
        require_not_set_aside(path, "replay", ResultError)
        unfinished = incomplete(path)
        if unfinished.exists():
            raise ResultError(f"replay {path} is incomplete: it stopped before its end", _again(unfinished))
        raise ResultError(f"no replay at {path}", f"Make one: {REPLAY_COMMAND}")
    if not file.is_file():
        raise ResultError(f"{path} is not a kvscope replay: it has no {RUN_FILE}", "Name a folder under reports/.")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ResultError(f"cannot read {file}: {error.strerror}", "Name a replay that exists.") from error
    return replay_of(content, path)


def replay_of(content: bytes, path: Path | str) -> ReplayRecord:
    """Return the record from the bytes of ``run.json`` of the replay at `path`; errors as `read_replay`."""
    file = f"{path}/{RUN_FILE}"
    data = REPLAY.header_of(content, file, example="Name a replay, as kvscope replay writes it.")
    if data.get("complete") is not True:
        raise ResultError(f"replay {path} is incomplete: it stopped before its end", _again(path))
    for name in ("created", "sizes", "checksums"):
        if name not in data:
            raise ResultError(f"{file} is damaged: it has no field `{name}`", "Replay again.")
    record = REPLAY.decode(data, file, ReplayRecord)
    if record.sizes.keys() != record.checksums.keys() or record.sizes.keys() - {LOSSES, ANSWERS} != ALWAYS:
        raise ResultError(f"{file} is damaged: it does not list the files that a replay has", "Replay again.")
    return record


def _again(path: Path | str) -> str:
    return f"Replay again; {path} can be removed."
