"""The files of a replay: columns, types, units, and what changed from version to version."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa

from kvscope.core.errors import ResultError

KIND = "kvscope-replay"
SUMMARY_KIND = "kvscope-summary"
RUN = "run.json"
SUMMARY = "summary.json"
LOSSES = "tokens.parquet"  # of a replay with closed runs
RECORDED = ("residency.parquet", "fidelity.parquet", SUMMARY, LOSSES)  # with size and checksum in run.json
MEMBERS = "|".join(map(re.escape, (RUN, *RECORDED)))  # what such a folder holds, and nothing else
_HEADER = ("trace", "metrics", "runs", "created", "sizes", "checksums")
SCHEMA_VERSION = 1
HISTORY = {
    1: "first version: open loop; added since, as nothing breaks: `decisions` and `tails` of every run, `left_out`",
}


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
            "first step at which it is gone: held exactly when enter <= t < leave; null is never",
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


def read_header(path: Path) -> dict[str, Any]:
    """Return the content of ``run.json`` of a whole replay of this version.

    Raises
    ------
    ResultError
        Each with its own message: nothing there, not a replay, older, newer, incomplete, damaged.
    """
    file = path / RUN
    if not path.exists():
        unfinished = path.with_name(path.name + ".incomplete")
        if unfinished.exists():
            raise ResultError(f"replay {path} is incomplete: it stopped before its end", _again(unfinished))
        raise ResultError(f"no replay at {path}", "Make one: kvscope replay --policy a2sf")
    if not file.is_file():
        raise ResultError(f"{path} is not a kvscope replay: it has no {RUN}", "Name a folder under reports/.")
    data = load_json(file, KIND, "replay")
    if not data.get("complete"):
        raise ResultError(f"replay {path} is incomplete: it stopped before its end", _again(path))
    lacking = [name for name in _HEADER if name not in data]
    if lacking:
        raise ResultError(f"replay {path} is damaged: {RUN} has no {lacking[0]}", "Replay again.")
    return data


def load_json(file: Path, kind: str, what: str) -> dict[str, Any]:
    """Return a JSON file of a known kind and of this version; each fault has its own ResultError."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"), parse_constant=_no_number)
    except OSError as error:
        raise ResultError(f"cannot read {file}: {error.strerror}", f"Name a {what} that exists.") from error
    except ValueError as error:
        raise ResultError(f"{file} is damaged: it is no JSON ({error})", "Replay again.") from error
    if not isinstance(data, dict) or data.get("kind") != kind:
        raise ResultError(f"{file} is not a kvscope {what}", f"Name a {what}, as kvscope replay writes it.")
    version = data.get("schema")
    if not isinstance(version, int) or version < SCHEMA_VERSION:
        raise ResultError(f"{file} has the older format {version}", "Replay again with this kvscope.")
    if version > SCHEMA_VERSION:
        raise ResultError(
            f"{file} has format {version}, newer than this kvscope reads ({SCHEMA_VERSION})", "Update kvscope."
        )
    return data


def _no_number(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON number")


def _again(path: Path) -> str:
    return f"Replay again; {path} can be removed."


def describe() -> str:
    """Return the documentation of every file and column, as Markdown."""
    files = {
        "residency.parquet": ("one stay of one key", RESIDENCY),
        "fidelity.parquet": ("one step of one query head", fidelity_schema(["METRIC"])),
        LOSSES: ("one scored token of a closed-loop run; only where there is one", TOKENS),
    }
    lines = [
        "# The replay format",
        "",
        f"Version {SCHEMA_VERSION}. A replay is a folder with `{RUN}` (what was replayed, and how), `{SUMMARY}` (the",
        "summary, small enough to commit as a baseline) and these Parquet files. In both, `decisions` of a run is the",
        "SHA-256 of its residency: the same for two runs exactly where every key came and went at the same steps.",
        "The summary also has the `tails` of retained mass: the share of steps below a half, the worst step of a head,",
        "the worst head. `left_out` says which metrics the trace has no signal for.",
        "",
    ]
    for name, (row, schema) in files.items():
        lines += [f"## `{name}`", "", f"One row is {row}.", "", "| column | type | what it is |", "|---|---|---|"]
        lines += [f"| `{c.name}` | `{c.type}` | {c.metadata[b'about'].decode()} |" for c in schema]
        lines.append("")
    lines += ["## History", "", *(f"- {version}: {what}" for version, what in HISTORY.items()), ""]
    return "\n".join(lines)
