"""Export of a replay as tables that need no join: every row names its policy and budget."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
import pyarrow.parquet as pq

from kvscope.core.errors import ResultError, UsageError
from kvscope.core.json_records import plain
from kvscope.core.options import ExportFormat, ExportLevel, choice
from kvscope.core.output import OutputFolder
from kvscope.core.printable import encodable
from kvscope.core.records import LOSSES, SCHEMA_VERSION
from kvscope.results.export_answers import EXAMPLES, TASKS, answer_tables
from kvscope.results.schema import fidelity_schema
from kvscope.results.store import Replay
from kvscope.results.stream import batches, means
from kvscope.results.summary import LEVELS, Level

LEVEL_OF = {ExportLevel(level): level for level in LEVELS}
KIND = "kvscope-export"
HEADER = "export.json"
TABLES = ("runs", "fidelity", "residency", "tokens", EXAMPLES, TASKS)
FILES = (ExportFormat.csv, ExportFormat.parquet, ExportFormat.arrow)
MEMBERS = rf"export\.json|({'|'.join(TABLES)})\.({'|'.join(FILES)})"  # all that it may hold
ROWS = 2**17  # written at a time: small row groups make every reader slow

# Columns of the run that every table has.
JOINED = pa.schema(
    [
        pa.field("policy", pa.string(), metadata={"about": "name of the policy"}),
        pa.field("label", pa.string(), metadata={"about": "policy with its parameters and choices"}),
        pa.field("budget", pa.string(), metadata={"about": "budget as it was given; null for a policy without one"}),
        pa.field("budget_keys", pa.float64(), metadata={"about": "B, in keys; the mean where a row has no sequence"}),
        pa.field("prefill", pa.string(), metadata={"about": "full or stream"}),
        pa.field("phase", pa.string(), metadata={"about": "when the policy evicts"}),
        pa.field("loop", pa.string(), metadata={"about": "open or closed"}),
    ]
)
VALUE = (
    pa.field("metric", pa.string(), metadata={"about": "name of the metric"}),
    pa.field("value", pa.float64(), metadata={"about": "its value"}),
)
PARTS = {"mean": pa.float64(), "low": pa.float64(), "high": pa.float64(), "count": pa.int64()}  # of a metric


def export(
    replay: Replay,
    output: Path,
    *,
    form: str = ExportFormat.parquet,
    per: str = ExportLevel.step,
    long: bool = False,
    force: bool = False,
) -> Path:
    """Write a replay as tables that need no join, and return their folder; large tables are written in pieces.

    ``runs`` has a row for each policy and budget with the means of the summary. ``fidelity`` has the metrics,
    ``residency`` the residency intervals, ``tokens`` the losses of a closed loop; of answers see `answer_tables`.

    Parameters
    ----------
    replay : Replay
        The replay to export.
    output : Path
        Folder to write.
    form : {"parquet", "csv", "arrow"}
        Format of the files; ``arrow`` is the IPC file format, also called Feather.
    per : {"step", "head", "layer", "sequence", "run"}
        What a row of ``fidelity`` is: one step of one head, or a mean over steps, then heads, then layers, and so on.
    long : bool
        Whether ``fidelity`` has a row for each metric (``metric``, ``value``) rather than a column; rows without a
        value are omitted.
    force : bool
        Whether to replace an earlier export.

    Raises
    ------
    UsageError
        If `form` or `per` is unknown.
    OutputExists
        If the output exists and `force` is False.
    ResultError
        If the output holds something else, or cannot be written; if the replay cannot be read.
    """
    kind, level = _of_files(form), choice(ExportLevel, per, "per")
    folder = OutputFolder(Path(output), "export", HEADER, MEMBERS, ResultError, force)
    about = {
        "replay": str(replay.path),
        "trace": plain(replay.summary.trace),
        "format": kind,
        "per": level,
        "long": long,
    }
    try:
        begun = folder.begin()
        with folder.abandoned_on_error():
            with folder.locked():
                _header(folder.work, about, complete=False, writer=begun)
            described = _write_tables(folder.work, kind, replay, _tables(replay, level, long))
            with folder.locked():
                _header(folder.work, about, complete=True, tables=described)
            folder.finish()
    except OSError as error:
        raise folder.unwritable(error) from error
    return folder.path


def _of_files(form: str) -> ExportFormat:
    """Return a format of files of tables; raises UsageError for one of a single table."""
    kind = choice(ExportFormat, form, "format")
    if kind not in FILES:
        raise UsageError(f"{kind} is one table, not files of tables", "Use kvscope.results.paper_table.")
    return kind


def _write_tables(
    folder: Path, form: ExportFormat, replay: Replay, tables: Mapping[str, Iterator[pa.Table]]
) -> dict[str, object]:
    """Write every table, and return its number of rows and the meaning of its columns."""
    described: dict[str, object] = {}
    for name, pieces in tables.items():
        rows, schema = _write(folder / f"{name}.{form}", form, pieces)
        described[name] = {"rows": rows, "columns": {field.name: _meaning(field, replay) for field in schema}}
    return described


def _tables(replay: Replay, level: ExportLevel, long: bool) -> dict[str, Iterator[pa.Table]]:
    """Return every table of a replay, in pieces."""
    fidelity = batches(replay, "fidelity") if level is ExportLevel.step else _means(replay, LEVEL_OF[level])
    joined = _Joined(replay)
    tables = {"fidelity": joined.tables(fidelity), "residency": joined.tables(batches(replay, "residency"))}
    if long:
        tables["fidelity"] = _long(tables["fidelity"], list(replay.info.metrics))
    if LOSSES in replay.info.sizes:
        tables["tokens"] = joined.tables(batches(replay, "tokens"))
    for name, pieces in answer_tables(replay).items():
        tables[name] = joined.tables(pieces)
    return {"runs": iter([runs_table(replay)]), **tables}


class _Joined:
    """Puts the columns of `JOINED` beside the number of the run."""

    def __init__(self, replay: Replay) -> None:
        runs = sorted(replay.info.runs, key=lambda run: run.run)
        self._numbers = np.array([run.run for run in runs])  # [R]
        sequences = range(len(replay.info.trace.sequences))
        self._keys = np.array([[run.keys(one) for one in sequences] for run in runs], np.float64)  # [R, sequences]
        self._words = {
            field.name: pa.array([_flat(getattr(run, field.name)) for run in runs], field.type)
            for field in JOINED
            if field.name != "budget_keys"
        }

    def tables(self, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """Yield each table with the columns joined in."""
        for table in tables:
            at = np.searchsorted(self._numbers, table["run"].to_numpy())
            sequences = "sequence" in table.column_names
            keys = self._keys[at, table["sequence"].to_numpy()] if sequences else self._keys.mean(1)[at]
            columns = {name: words.take(pa.array(at)) for name, words in self._words.items()}
            columns["budget_keys"] = pa.array(keys)
            own = [field for field in table.schema if field.name != "run"]
            schema = pa.schema([table.schema.field("run"), *JOINED, *own])
            values = [columns[name] if name in columns else table[name] for name in schema.names]
            yield pa.Table.from_arrays(values, schema=schema)


def runs_table(replay: Replay) -> pa.Table:
    """Return one row for each run: how it was made, then mean, interval and count of every metric."""
    runs = replay.summary.runs
    said = [plain(run) for run in runs]
    columns: dict[str, pa.Array] = {}
    for name in dict.fromkeys(name for run in said for name in run if name not in ("metrics", "tasks")):
        columns[name] = pa.array([_flat(run.get(name)) for run in said])
    columns["budget_keys"] = pa.array([float(np.mean(run.budget_keys)) for run in replay.info.runs])
    for name in replay.summary.metrics:
        for part, kind in PARTS.items():
            values = [getattr(run.metrics.get(name), part, None) for run in runs]
            columns[name if part == "mean" else f"{name}_{part}"] = pa.array(values, kind)
    fields = [
        JOINED.field(name) if name in JOINED.names else pa.field(name, column.type) for name, column in columns.items()
    ]
    return pa.table(list(columns.values()), schema=pa.schema(fields))


def _flat(value: object) -> object:
    """Return a value that fits a cell: nested things as JSON, texts as UTF-8 can represent them."""
    if isinstance(value, str):
        return encodable(value)
    return json.dumps(value) if isinstance(value, dict | list) else value


def _means(replay: Replay, per: Level) -> Iterator[pa.Table]:
    """Yield the means of one level, a run at a time."""
    found = means(replay)
    places = LEVELS[1 : LEVELS.index(per) + 1]
    recorded = fidelity_schema(found.metrics)
    columns = [recorded.field(name) for name in ("run", *places)]
    schema = pa.schema([*columns, *(pa.field(name, pa.float64()) for name in found.metrics)])
    for run in (run.run for run in replay.info.runs):
        of_run = {name: found.of(run, name, per) for name in found.metrics}
        rows = sorted(set().union(*of_run.values()))
        columns = [[run] * len(rows), *([row[index] for row in rows] for index in range(len(places)))]
        columns += [[values.get(row) for row in rows] for values in of_run.values()]
        yield pa.table(columns, schema=schema)


def _long(tables: Iterable[pa.Table], metrics: Sequence[str]) -> Iterator[pa.Table]:
    """Yield each table with a row for each metric that has a value."""
    for table in tables:
        kept = [name for name in table.column_names if name not in metrics]
        for name in metrics:
            there = table.filter(pc.is_valid(table[name]))
            named = pa.array([name]).take(pa.array(np.zeros(there.num_rows, np.int64)))
            columns = [*(there[column] for column in kept), named, there[name].cast(pa.float64())]
            fields = [*(table.schema.field(column) for column in kept), *VALUE]
            yield pa.Table.from_arrays(columns, schema=pa.schema(fields))


def _write(file: Path, form: ExportFormat, tables: Iterator[pa.Table]) -> tuple[int, pa.Schema]:
    """Write a table, gathered into larger pieces; returns its rows and columns."""
    if form == "csv":
        tables = map(_inert, tables)
    first = next(tables)
    rows, held, waiting = 0, [first], first.num_rows
    with _open(file, form, first.schema) as writer:
        for table in tables:
            if waiting >= ROWS:
                writer.write_table(pa.concat_tables(held))
                rows, held, waiting = rows + waiting, [], 0
            held.append(table)
            waiting += table.num_rows
        writer.write_table(pa.concat_tables(held))
    return rows + waiting, first.schema


def _inert(table: pa.Table) -> pa.Table:
    """Return a table whose texts no spreadsheet takes for a formula: those that begin like one get an apostrophe."""
    for place, field in enumerate(table.schema):
        if pa.types.is_string(field.type):
            text = pc.replace_substring_regex(table[place], r"^([=+\-@\t\r\n＝＋－＠])", r"'\1")
            table = table.set_column(place, field, text)
    return table


@contextmanager
def _open(file: Path, form: ExportFormat, schema: pa.Schema) -> Iterator[Any]:
    with pa.OSFile(os.fsencode(file), "wb") as sink, _writer(sink, form, schema) as writer:  # a str has to be UTF-8
        yield writer


def _writer(sink: pa.OSFile, form: ExportFormat, schema: pa.Schema) -> Any:
    if form == "csv":
        return csv.CSVWriter(sink, schema)
    if form == "arrow":
        return pa.ipc.new_file(sink, schema, options=pa.ipc.IpcWriteOptions(compression="zstd"))
    return pq.ParquetWriter(sink, schema, compression="zstd")


def _meaning(field: pa.Field, replay: Replay) -> str:
    declared = replay.summary.metrics.get(field.name)
    if declared is not None:
        return declared.summary
    return str((field.metadata or {}).get(b"about", b"").decode())


def _header(folder: Path, about: Mapping[str, Any], **more: Any) -> None:
    text = json.dumps({"kind": KIND, "schema": SCHEMA_VERSION, **about, **more}, indent=1, allow_nan=False)
    (folder / HEADER).write_text(text + "\n", encoding="utf-8")
