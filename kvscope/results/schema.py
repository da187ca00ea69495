"""The files of a replay: columns, types, units, and what changed from version to version."""

from __future__ import annotations

import re

import pyarrow as pa

from kvscope.core.answer_records import ANSWERS, AnswerSpan, ExampleRef
from kvscope.core.json_records import described
from kvscope.core.records import (
    HISTORY,
    LOSSES,
    RUN_FILE,
    SCHEMA_VERSION,
    Certificate,
    HeadCounts,
    MetricRecord,
    ReplayRecord,
    RunRecord,
    Scored,
    SequenceRef,
    SourceRef,
    TextRef,
    TraceRef,
)
from kvscope.core.summary_records import (
    SUMMARY_FILE,
    BoundShares,
    HeadPlace,
    LoopGap,
    MetricSummary,
    RunSummary,
    StepPlace,
    SummaryRecord,
    Tails,
    TaskSummary,
)

RECORDED = (
    "residency.parquet",
    "fidelity.parquet",
    SUMMARY_FILE,
    LOSSES,
    ANSWERS,
)  # with size and checksum in run.json
MEMBERS = "|".join(map(re.escape, (RUN_FILE, *RECORDED)))  # what such a folder holds, and nothing else
# Every record of the two JSON files, in the order in which they are described.
RECORDS: tuple[type, ...] = (
    ReplayRecord,
    SourceRef,
    HeadCounts,
    SequenceRef,
    TextRef,
    ExampleRef,
    AnswerSpan,
    RunRecord,
    Certificate,
    MetricRecord,
    Scored,
    SummaryRecord,
    TraceRef,
    RunSummary,
    MetricSummary,
    BoundShares,
    Tails,
    StepPlace,
    HeadPlace,
    LoopGap,
    TaskSummary,
)


def _column(name: str, kind: pa.DataType, about: str, nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"about": about})


RESIDENCY = pa.schema(
    [
        _column("run", pa.int32(), "number of the run: one policy under one budget"),
        _column("sequence", pa.int32(), "number of the sequence"),
        _column("layer", pa.int32(), "layer of the model"),
        _column("kv_head", pa.int32(), "key/value head"),
        _column("key", pa.int32(), "position of the key"),
        _column("enter", pa.int32(), "first step at which the key is held"),
        _column(
            "leave",
            pa.int32(),
            "first step at which it is not held any more: held exactly when enter <= t < leave; null is never",
            True,
        ),
    ]
)
TOKENS = pa.schema(
    [
        _column("run", pa.int32(), "number of the run"),
        _column("sequence", pa.int32(), "number of the sequence"),
        _column("position", pa.int32(), "position of the token, which the one before it predicts"),
        _column("nll_full", pa.float32(), "negative log-likelihood with the full cache, in nats"),
        _column("nll_policy", pa.float32(), "negative log-likelihood under the policy, in nats"),
        _column("kl", pa.float32(), "KL(full ‖ policy) of the two next-token distributions, in nats"),
        _column("top1_equal", pa.bool_(), "whether both have the same first choice"),
        _column("top1_correct", pa.bool_(), "whether the first choice under the policy is the token itself"),
    ]
)
SAID = pa.schema(
    [
        _column("run", pa.int32(), "number of the run"),
        _column("sequence", pa.int32(), "number of the sequence"),
        _column("tokens", pa.int32(), "tokens that were generated, without one that ends the text"),
        _column("answer_score", pa.float32(), "how right the text is, by the metric of its example, 0 to 1"),
        _column("text", pa.string(), "what the model generated after the prompt under the policy"),
    ]
)
_FIDELITY = [
    _column("run", pa.int32(), "number of the run"),
    _column("sequence", pa.int32(), "number of the sequence"),
    _column("layer", pa.int32(), "layer of the model"),
    _column("head", pa.int32(), "query head"),
    _column("step", pa.int32(), "position of the query"),
]


def fidelity_schema(metrics: list[str]) -> pa.Schema:
    """Return the schema of ``fidelity.parquet``: one nullable float32 column for each metric."""
    columns = [_column(name, pa.float32(), "metric; null where it has no value at this step", True) for name in metrics]
    return pa.schema(_FIDELITY + columns)


def describe() -> str:
    """Return the documentation of every file and column, as Markdown."""
    files = {
        "residency.parquet": ("one residency interval of one key", RESIDENCY),
        "fidelity.parquet": ("one step of one query head", fidelity_schema(["METRIC"])),
        LOSSES: ("one scored token of a closed-loop run; only where there is one", TOKENS),
        ANSWERS: ("what one closed-loop run says after one prompt; only with `--generate`", SAID),
    }
    lines = [
        "# The replay format",
        "",
        f"Version {SCHEMA_VERSION}. A replay is a folder with `{RUN_FILE}` (what was replayed, and how),",
        f"`{SUMMARY_FILE}` (the figures of every run, small enough to commit as a baseline) and Parquet files.",
        "",
    ]
    for name, (row, schema) in files.items():
        lines += [f"## `{name}`", "", f"One row is {row}.", "", "| column | type | what it is |", "|---|---|---|"]
        lines += [f"| `{c.name}` | `{c.type}` | {c.metadata[b'about'].decode()} |" for c in schema]
        lines.append("")
    for record in RECORDS:
        name = {ReplayRecord: f"`{RUN_FILE}`", SummaryRecord: f"`{SUMMARY_FILE}`"}.get(record, f"`{record.__name__}`")
        lines += [f"## {name}", "", str(record.__doc__), "", "| field | type | what it is |", "|---|---|---|"]
        lines += [f"| `{field}` | {kind} | {about} |" for field, kind, about in described(record)]
        lines.append("")
    lines += ["## History", "", *(f"- {version}: {what}" for version, what in HISTORY.items()), ""]
    return "\n".join(lines)
