"""The objects that files of prompts hold: JSON, JSON lines, rows of Parquet; and the files of a folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from kvscope.core.errors import UsageError
from kvscope.core.json import Json, JsonDict
from kvscope.core.text_files import BOM

PARQUET = ".parquet"
EXAMPLE = 'Write objects such as {"prompt": "..."} or {"messages": [...]}, or name the field of the text with --field.'


def visible_files(given: Path | str) -> list[Path | str]:
    """Return the files of a folder in the order of their names, without hidden ones; of a file, itself.

    Raises
    ------
    UsageError
        If a folder has no files, cannot be read, or has a folder in it.
    """
    if not Path(given).is_dir():
        return [given]
    try:
        found = sorted(path for path in Path(given).iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UsageError(f"cannot read {given}: {error.strerror}", "Name a folder that you may read.") from error
    folder = next((path for path in found if path.is_dir()), None)
    if folder is not None or not found:
        what = f"has a folder in it: {folder.name}" if folder else "has no files"
        raise UsageError(f"{given} {what}", "Name a folder of text files, or the files themselves.")
    return [*found]


def rows_of(file: Path | str) -> list[tuple[str, Json]]:
    """Return the rows of a Parquet file as objects, each with its place; a null is a field that is not there.

    Columns of bytes, dates and other types that JSON does not have are omitted.

    Raises
    ------
    UsageError
        If it cannot be read, or has no rows.
    """
    try:
        with pa.OSFile(os.fsencode(file)) as source:
            rows = pq.read_table(source).to_pylist()
    except (OSError, pa.ArrowException) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else "it is not a Parquet file"
        raise UsageError(f"cannot read {file}: {why}", "Name a Parquet file that exists.") from error
    if not rows:
        raise UsageError(f"{file} is empty", "Write one prompt per row.")
    return [
        (f"{file}, row {number}", {name: value for name, value in row.items() if value is not None and _is_json(value)})
        for number, row in enumerate(rows, 1)
    ]


def _is_json(value: object) -> bool:
    if isinstance(value, list):
        return all(_is_json(each) for each in value)
    if isinstance(value, dict):
        return all(_is_json(each) for each in value.values())
    return value is None or isinstance(value, str | int | float)


def is_objects(content: str) -> bool:
    """Return whether a text is JSON objects, one per line, or a list of them."""
    if not content.lstrip().startswith(("{", "[")):
        return False
    try:
        entries = entries_of("", content, lines=False)
    except UsageError:
        return False
    return bool(entries) and all(isinstance(entry, dict) for _, entry in entries)


def entries_of(name: str, content: str, *, lines: bool) -> list[tuple[str, Json]]:
    """Return the values of JSON or JSON lines, each with its place: file and line, or file and number."""
    if not lines:
        try:
            whole = _loads(content) if content.strip() else []
        except RecursionError:
            raise UsageError(f"{name} is nested too deeply", EXAMPLE) from None
        except ValueError as error:
            if "Extra data" not in str(error):
                raise UsageError(f"{name} is not JSON: {error}", EXAMPLE) from None
            return entries_of(name, content, lines=True)  # an object per line, although the name ends in .json
        if not isinstance(whole, list):
            return [(name, whole)]
        return [(f"{name}, object {number}", entry) for number, entry in enumerate(whole, 1)]
    # Other line ends, as U+2028, may be in a JSON text, so only new lines separate objects.
    numbered = ((number, line.strip().strip(BOM)) for number, line in enumerate(content.split("\n"), 1))
    return [(f"{name}, line {number}", _parsed(f"{name}, line {number}", line)) for number, line in numbered if line]


def _parsed(place: str, line: str) -> Json:
    try:
        return _loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{place}: no prompt: this is not JSON ({error})", EXAMPLE) from None


def _loads(text: str) -> Json:
    """Return the value of a JSON text; raises ValueError also where an object has a field twice."""

    def once(pairs: list[tuple[str, Json]]) -> JsonDict:
        entry = dict(pairs)
        if len(entry) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"it has the field {next(n for n in names if names.count(n) > 1)} twice")
        return entry

    value: Json = json.loads(text, object_pairs_hook=once)
    return value
