"""Document the trace format: ``trace.json``, and every file and column."""

from __future__ import annotations

from kvscope.core.json_records import described
from kvscope.core.seal import SEAL
from kvscope.trace import layer_records, prompt_parts, record
from kvscope.trace.columns import FILES
from kvscope.trace.schema import HEADER, HISTORY, SCHEMA_VERSION
from kvscope.trace.storage_error import describe_bounds

NAMES = {"class_name": "class"}  # attribute -> name in the file, where that is a Python keyword
# Objects inside `trace.json`, in the order in which they appear.
PARTS = (
    record.ModelRecord,
    layer_records.AttentionKernel,
    layer_records.LayerHeads,
    layer_records.LayerAttention,
    record.PromptRecord,
    record.SamplingRecord,
    record.SequenceRecord,
    prompt_parts.SpanRecord,
    prompt_parts.ImageRecord,
    record.StorageError,
)


def describe() -> str:
    """Return the documentation of every file and column, as Markdown."""
    lines = [
        "# The trace format",
        "",
        f"Version {SCHEMA_VERSION}. A trace is a folder with `{HEADER}` and these Parquet files.",
        "",
    ]
    lines += [f"## `{HEADER}`", "", *_table(record.TraceRecord)]
    lines += [f"| `{SEAL}` | str | SHA-256 of all the other fields, as JSON with sorted names and no spaces |", ""]
    lines += ["The metadata of every Parquet file says under `kvscope` of which trace, kind and layer the file is.", ""]
    for part in PARTS:
        what = (part.__doc__ or "").partition("\n")[0].replace("``", "`")
        lines += [f"`{part.__name__}`: {what}", "", *_table(part), ""]
    for name, (row, schema) in FILES.items():
        lines += [f"## `{name}`", "", f"One row is {row}.", "", "| column | type | what it is |", "|---|---|---|"]
        for column in schema:
            kind = str(column.type).replace("item: ", "").replace(" not null", "")
            lines.append(f"| `{column.name}` | `{kind}` | {column.metadata[b'about'].decode()} |")
        lines.append("")
    lines += describe_bounds()
    lines += ["## History", "", *(f"- {version}: {what}" for version, what in HISTORY.items()), ""]
    return "\n".join(lines)


def _table(kind: type) -> list[str]:
    """Return the fields of a record as a Markdown table."""
    return ["| field | type | what it is |", "|---|---|---|", *_rows(kind)]


def _rows(kind: type) -> list[str]:
    rows: list[str] = []
    for name, type_, about in described(kind):
        if name == "header":
            rows += _rows(record.TraceHeader)
        else:
            rows.append(f"| `{NAMES.get(name, name)}` | {type_} | {about} |")
    return rows
