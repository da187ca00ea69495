"""What every row of the tables of a replay must be; a table that has others is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from kvscope.core.records import ReplayRecord, SourceRef
from kvscope.core.seal import seal_of
from kvscope.core.summary_records import SummaryRecord
from kvscope.results.answers import SCORE
from kvscope.results.outcome import OUTCOMES
from kvscope.results.schema import RESIDENCY, SAID, TOKENS, fidelity_schema

ABOUT = b"kvscope"  # key in the metadata of a Parquet file
Array = NDArray[Any]
TOKEN_OF = ("run", "sequence")
NUMBER_BYTES = 8  # most bytes of a number in a column
TEXT_BYTES = 2**22  # most bytes of a text
SLACK = 2**16  # bytes of a column beside its numbers: levels, and headers of pages


def schema_of(name: str, info: ReplayRecord) -> pa.Schema:
    """Return the columns of a table: ``residency``, ``fidelity``, ``tokens`` or ``answers``."""
    schemas = {"residency": RESIDENCY, "tokens": TOKENS, "answers": SAID}
    return schemas[name] if name in schemas else fidelity_schema(list(info.metrics))


def about_of(name: str, info: ReplayRecord) -> dict[bytes, bytes]:
    """Return the metadata by which a table is known: its name, the trace, and a digest of the runs."""
    runs = [[run.run, run.label, run.budget, run.loop] for run in info.runs]
    about = {"table": name, "trace": info.trace.identity, "runs": seal_of({"runs": runs})}
    return {ABOUT: json.dumps(about).encode()}


def fault_of_file(file: pq.ParquetFile, name: str, info: ReplayRecord, summary: SummaryRecord) -> str | None:
    """Return what is wrong with the columns and sizes that a file states, or None; no row is read.

    Parameters
    ----------
    file : ParquetFile
        The open file.
    name : str
        Name of the table.
    info, summary : ReplayRecord, SummaryRecord
        What the replay says of itself.
    """
    expected, found = schema_of(name, info), file.schema_arrow
    if [(field.name, field.type) for field in found] != [(field.name, field.type) for field in expected]:
        return "it has other columns"
    values: dict[str, int] = dict.fromkeys(expected.names, 0)
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        for index, column in enumerate(expected.names):
            chunk = group.column(index)
            said = (chunk.num_values, chunk.total_compressed_size, chunk.total_uncompressed_size, group.num_rows)
            most = TEXT_BYTES if pa.types.is_string(expected.field(column).type) else NUMBER_BYTES
            if min(said) < 0 or max(said[:3]) > most * group.num_rows + SLACK:
                return f"it says that column {column} has {max(said)} bytes"
            nulls = chunk.statistics.null_count if chunk.statistics is not None else 0
            values[column] += chunk.num_values - (nulls or 0)
    about = (found.metadata or {}).get(ABOUT)  # none in replays of kvscope 0.1.0
    if about is not None and {ABOUT: about} != about_of(name, info):
        return "by its metadata it is another table, or of another replay"
    if name == "tokens":
        values = dict.fromkeys(OUTCOMES, file.metadata.num_rows)
    return _fault_of_counts(values, summary) if name != "residency" else None


def fault_of_rows(table: pa.Table, name: str, info: ReplayRecord) -> str | None:
    """Return what is wrong with rows of a table, or None; columns that were not read are not checked."""
    trace = info.trace
    columns = {column: table[column] for column in table.column_names}
    if any(columns[column].null_count for column in columns if not schema_of(name, info).field(column).nullable):
        return "it has rows without a number"
    known = {"run": [run.run for run in info.runs], "layer": list(trace.layers)}
    if SCORE in columns and not _are_scores(columns):
        return "it has a score that is not between 0 and 1, or two answers to one prompt"
    if "tokens" in columns and (columns["tokens"].to_numpy() < 0).any():
        return "it has an answer of fewer than 0 tokens"
    ends = {"head": trace.heads, "kv_head": trace.kv_heads, "sequence": len(trace.sequences)}
    numbers = {name: columns[name].to_numpy() for name in (*known, *ends) if name in columns}
    for column, values in numbers.items():
        if not (np.isin(values, known[column]).all() if column in known else _within(values, ends[column])):
            return f"it has rows of a {column} that the replay has not"
    if trace.layer_heads and "layer" in numbers:
        layer = np.searchsorted(trace.layers, numbers["layer"])
        for column, counts in (("head", [own.heads for own in trace.layer_heads]), ("kv_head", _kv_heads(trace))):
            if column in numbers and not _within(numbers[column], np.array(counts)[layer]):
                return f"it has rows of a {column} that its layer has not"
    if "sequence" in numbers:
        lengths = np.array([item.length for item in trace.sequences])[numbers["sequence"]]
        for column in ("step", "position", "key"):
            if column in columns and not _within(columns[column].to_numpy(), lengths):
                return f"it has a {column} outside of its sequence"
        if {"key", "enter", "leave"} <= columns.keys() and not _are_intervals(columns, lengths):
            return "an interval begins before its key, or ends before it begins"
    if not _ascend(columns):
        return "its rows are not in order, or there twice"
    for column, chunks in columns.items():
        if pa.types.is_floating(chunks.type) and not np.isfinite(chunks.drop_null().to_numpy()).all():
            return f"a value of {column} is not finite"
    return None


def _kv_heads(trace: SourceRef) -> list[int]:
    return [own.kv_heads for own in trace.layer_heads]


def _fault_of_counts(values: Mapping[str, int], summary: SummaryRecord) -> str | None:
    """Return which metric has not as many values as the means of the summary are of."""
    for metric in values:
        stated = [run.metrics[metric].count for run in summary.runs if metric in run.metrics]
        known = [count for count in stated if count is not None]
        if known and len(known) == len(stated) and sum(known) != values[metric]:
            return f"it has {values[metric]} values of {metric} instead of {sum(known)}"
    return None


def _ascend(columns: Mapping[str, pa.ChunkedArray]) -> bool:
    """Return whether the rows of a layer, or the tokens of a sequence, are together and ascend by head and step."""
    outer, inner = (("run", "sequence", "layer"), ("head", "step")) if "step" in columns else (TOKEN_OF, ("position",))
    if not {*outer, *inner} <= columns.keys() or not len(columns["run"]):
        return True
    places = np.stack([columns[name].to_numpy() for name in outer])
    starts = np.flatnonzero(np.append(True, (np.diff(places) != 0).any(0)))
    if len(np.unique(places[:, starts], axis=1).T) < len(starts):
        return False  # a part of what came before follows another
    ascends = np.diff(columns[inner[-1]].to_numpy()) > 0
    if len(inner) > 1:
        heads = np.diff(columns[inner[0]].to_numpy())
        ascends = (heads > 0) | ((heads == 0) & ascends)
    ascends[starts[1:] - 1] = True
    return bool(ascends.all())


def _are_intervals(columns: Mapping[str, pa.ChunkedArray], lengths: Array) -> bool:
    key, enter = (columns[name].to_numpy() for name in ("key", "enter"))
    leave = columns["leave"].fill_null(np.iinfo(np.int32).max).to_numpy()
    never = leave == np.iinfo(np.int32).max
    return bool(((enter >= key) & (enter <= lengths) & (leave >= enter) & (never | (leave <= lengths))).all())


def _are_scores(columns: Mapping[str, pa.ChunkedArray]) -> bool:
    """Return whether scores are between 0 and 1, and no run has two answers to one prompt."""
    scores = columns[SCORE].to_numpy()
    places = np.stack([columns[name].to_numpy() for name in TOKEN_OF]) if {*TOKEN_OF} <= columns.keys() else None
    once = places is None or len(np.unique(places.T, axis=0)) == len(scores)
    return once and bool(((scores >= 0) & (scores <= 1)).all())


def _within(values: Array, end: int | Array) -> bool:
    return bool(((values >= 0) & (values < end)).all())
