"""Ways in which the folder of a trace or a replay becomes damaged; every one is drawn from a random generator."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kvscope.core.seal import SEAL, sealed

# Values that a field of a JSON file may become.
VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 3, 19, 60, 2**31, 2**53, 2**64, 10**30, -(10**30), 0.5, -0.5, 1e300),
    *(float("nan"), float("inf"), "", "x", "full", "../x", "/etc/passwd", "a\0b", "NaN", "\ud800"),
    *([], {}, [[]], [None], [-1], {"a": 1}, {"../x": 1}, {"/etc/passwd": 1}),
)


@dataclass(frozen=True)
class Subject:
    """A folder that is damaged.

    Attributes
    ----------
    source : Path
        The intact folder.
    header : str
        Its JSON file with sizes and checksums.
    other : Path
        A folder of the same kind with the same file names and other content.
    """

    source: Path
    header: str
    other: Path

    def files(self) -> list[str]:
        """Return the relative paths of all files."""
        return sorted(str(file.relative_to(self.source)) for file in self.source.rglob("*") if file.is_file())

    def tables(self) -> list[str]:
        """Return the relative paths of the Parquet files."""
        return [name for name in self.files() if name.endswith(".parquet")]


Mutation = Callable[[random.Random, Subject, Path], str]  # damages the copy; returns what was done


def copied(subject: Subject, work: Path) -> None:
    """Make a copy of a folder; unchanged files are shared with it, so they must be replaced and never written."""
    for name in subject.files():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(subject.source / name, work / name)


def replaced(file: Path, content: bytes) -> None:
    """Give a file of a copy another content."""
    file.unlink()
    file.write_bytes(content)


def flip_bit(draw: random.Random, subject: Subject, work: Path) -> str:
    """Flip one bit of one file."""
    name = draw.choice(subject.files())
    content = bytearray((work / name).read_bytes())
    bit = draw.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    replaced(work / name, bytes(content))
    return f"bit {bit} of {name}"


def zero_bytes(draw: random.Random, subject: Subject, work: Path) -> str:
    """Overwrite 64 bytes of one file with zeros."""
    name = draw.choice(subject.files())
    content = bytearray((work / name).read_bytes())
    start = draw.randrange(max(1, len(content) - 64))
    content[start : start + 64] = bytes(len(content[start : start + 64]))
    replaced(work / name, bytes(content))
    return f"64 bytes of {name} from {start}"


def cut(draw: random.Random, subject: Subject, work: Path) -> str:
    """Cut the end of one file."""
    name = draw.choice(subject.files())
    content = (work / name).read_bytes()
    end = draw.randrange(len(content))
    replaced(work / name, content[:end])
    return f"{name} cut to {end}"


def remove(draw: random.Random, subject: Subject, work: Path) -> str:
    """Remove one file."""
    name = draw.choice(subject.files())
    (work / name).unlink()
    return f"{name} removed"


def _put_in_place(draw: random.Random, subject: Subject, work: Path, name: str, source: Path) -> str:
    """Replace one table by another file; half of the time the header says its size and checksum."""
    replaced(work / name, source.read_bytes())
    known = draw.random() < 0.5
    if known:
        record_files(subject, work, [name])
    return f"in the place of {name}{', recorded' * known}"


def copy_over(draw: random.Random, subject: Subject, work: Path) -> str:
    """Put one table in the place of another; half of the time the header says its size and checksum."""
    name, source = draw.sample(subject.tables(), 2)
    return f"{source} {_put_in_place(draw, subject, work, name, subject.source / source)}"


def mixed(draw: random.Random, subject: Subject, work: Path) -> str:
    """Put a table of another folder in place; half of the time the header says its size and checksum."""
    name = draw.choice(subject.tables())
    return f"that of another folder {_put_in_place(draw, subject, work, name, subject.other / name)}"


def link(draw: random.Random, subject: Subject, work: Path) -> str:
    """Replace one file by a link to a file outside, or to nothing, or to itself."""
    name = draw.choice(subject.tables())
    target = draw.choice([(subject.other / name).resolve(), Path("/nowhere"), work / name])
    (work / name).unlink()
    (work / name).symlink_to(target)
    return f"{name} is a link to {target}"


def json_field(draw: random.Random, subject: Subject, work: Path) -> str:
    """Change, remove or rename one value of a JSON file."""
    name = draw.choice([name for name in subject.files() if name.endswith(".json")])
    data = json.loads((work / name).read_text())
    path = draw.choice(paths(data))
    *parents, last = path
    place = data
    for part in parents:
        place = place[part]
    what = draw.choice(["value", "value", "value", "number", "remove", "rename"])
    if what == "remove" or (what == "rename" and not isinstance(place, dict)):
        del place[last]
    elif what == "rename":
        place[draw.choice(["../x", "/etc/passwd", f"{last}x", "attention/layer=007.parquet"])] = place.pop(last)
    elif what == "number" and type(place[last]) in (int, float):
        place[last] += draw.choice([-1, 1, -20, 20, 10**6, -(2**40)])
    else:
        place[last] = copy.deepcopy(draw.choice(VALUES))
    replaced(work / name, json.dumps(data).encode("ascii"))
    return f"{name}: {'.'.join(map(str, path))}: {what}"


def json_text(draw: random.Random, subject: Subject, work: Path) -> str:
    """Replace a JSON file by text that is none, or not one that is expected."""
    name = draw.choice([name for name in subject.files() if name.endswith(".json")])
    text = draw.choice(
        ["", "{", "[]", "7", "null", "[" * 100_000, '{"a":' * 50_000, "\ufeff{}", '"\\ud800"', "1" * 9999]
    )
    replaced(work / name, text.encode("utf-8", "surrogatepass"))
    return f"{name}: {text[:10]!r}"


def table(draw: random.Random, subject: Subject, work: Path) -> str:
    """Write one table with another content; where no such table can be right, with its checksum in the header."""
    name = draw.choice(subject.tables())
    found = pq.read_table(work / name, partitioning=None)
    change = draw.choice([*IMPOSSIBLE, *POSSIBLE])
    made = change(draw, found)
    (work / name).unlink()
    pq.write_table(made, work / name, row_group_size=max(1, made.num_rows))
    if change in IMPOSSIBLE:
        record_files(subject, work, [name])
    return f"{name}: {change.__name__}"


def drop_rows(draw: random.Random, found: pa.Table) -> pa.Table:
    """Return a table without up to five of its rows."""
    gone = draw.sample(range(found.num_rows), min(found.num_rows, draw.randint(1, 5)))
    return found.take(pa.array(np.setdiff1d(np.arange(found.num_rows), gone)))


def repeat_rows(draw: random.Random, found: pa.Table) -> pa.Table:
    """Return a table with one row in the place of another, or added."""
    index = np.arange(found.num_rows)
    if draw.random() < 0.5:
        at = draw.randrange(len(index))
        index[at] = (at + draw.randrange(1, len(index))) % len(index)
    else:
        index = np.append(index, draw.randrange(len(index)))
    return found.take(pa.array(index))


def swap_rows(draw: random.Random, found: pa.Table) -> pa.Table:
    """Return a table with the values of the last column of two rows exchanged."""
    index = np.arange(found.num_rows)
    one, other = draw.randrange(len(index)), draw.randrange(len(index))
    index[[one, other]] = index[[other, one]]
    return found.set_column(found.num_columns - 1, found.schema.field(-1), found.column(-1).take(pa.array(index)))


def drop_column(draw: random.Random, found: pa.Table) -> pa.Table:
    """Return a table without one of its columns."""
    return found.drop_columns([draw.choice(found.column_names)])


def cast_column(draw: random.Random, found: pa.Table) -> pa.Table:
    """Return a table with one column of another type."""
    at = draw.randrange(found.num_columns)
    kind = pa.list_(pa.float64()) if pa.types.is_list(found.schema.field(at).type) else pa.string()
    values = [
        None if value is None else value if isinstance(value, list) else str(value)
        for value in found.column(at).to_pylist()
    ]
    return found.set_column(at, found.column_names[at], pa.array(values, kind))


def not_a_number(draw: random.Random, found: pa.Table) -> pa.Table:
    """Return a table with a number that is infinite, NaN or, where there is no such number, negative."""
    return changed(draw, found, [float("inf"), float("nan")], [-5, -(2**31)])


def other_number(draw: random.Random, found: pa.Table) -> pa.Table:
    """Return a table with another number that might be right."""
    return changed(draw, found, [-0.25, 60000.0, 1.5, 0.0], [0, 7, 10**6])


def weight(draw: random.Random, found: pa.Table) -> pa.Table:
    """Return a table of attention with a weight that is negative or too large; of others, without a row."""
    if "weights" not in found.column_names:
        return drop_rows(draw, found)
    at, row = found.column_names.index("weights"), draw.randrange(found.num_rows)
    values = found.column(at).to_pylist()
    values[row][draw.randrange(len(values[row]))] = draw.choice([-0.25, 60000.0, 1.5, float("nan"), float("inf")])
    return found.set_column(at, found.schema.field(at), pa.array(values, found.schema.field(at).type))


def changed(draw: random.Random, found: pa.Table, floats: list[float], integers: list[int]) -> pa.Table:
    """Return a table with one number, of a row or in a list of a row, changed; texts and flags are left as they are."""
    numbers = [at for at, field in enumerate(found.schema) if kind_of(field) is not None]
    fits = [at for at in numbers if found.column(at).null_count == 0 and has_numbers(found.column(at))]
    at, row = draw.choice(fits), draw.randrange(found.num_rows)
    field, values = found.schema.field(at), found.column(at).to_pylist()
    new = draw.choice(floats if pa.types.is_floating(kind_of(field)) else integers)
    if isinstance(values[row], list):
        rows = [index for index, value in enumerate(values) if value]
        row = draw.choice(rows)
        values[row][draw.randrange(len(values[row]))] = new
    else:
        values[row] = new
    return found.set_column(at, field, pa.array(values, field.type))


def has_numbers(column: pa.ChunkedArray) -> bool:
    """Return whether a column has a number: a list column has none where every list is empty."""
    return not pa.types.is_list(column.type) or any(column.to_pylist())


def kind_of(field: pa.Field) -> pa.DataType | None:
    """Return the type of the numbers of a column; None for one without, or whose numbers may be missing."""
    kind = field.type.value_type if pa.types.is_list(field.type) else field.type
    if field.name in ("logprob", "entropy", "value_l1", "value_l2", "key_l2", "log_sum_exp", "sums"):
        return None  # may be NaN, or are not read
    return kind if pa.types.is_floating(kind) or pa.types.is_integer(kind) else None


def list_length(draw: random.Random, found: pa.Table) -> pa.Table:
    """Return a table with a list of one row longer or shorter; without lists, a table without its last row."""
    lists = [at for at, field in enumerate(found.schema) if pa.types.is_list(field.type)]
    if not lists:
        return found.slice(0, found.num_rows - 1)
    at, row = draw.choice(lists), draw.randrange(found.num_rows)
    values = found.column(at).to_pylist()
    values[row] = draw.choice(
        [values[row][:3], values[row] + [values[row][0] if values[row] else 0] * draw.randint(1, 300), []]
    )
    return found.set_column(at, found.schema.field(at), pa.array(values, found.schema.field(at).type))


def record_files(subject: Subject, work: Path, names: list[str]) -> None:
    """Write sizes and checksums of files into the header, with the checksum of the header if it has one."""
    data = json.loads((work / subject.header).read_text())
    for name in names:
        content = (work / name).read_bytes()
        data["sizes"][name], data["checksums"][name] = len(content), hashlib.sha256(content).hexdigest()
    replaced(work / subject.header, json.dumps(sealed(data) if SEAL in data else data).encode("ascii"))


def paths(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value in plain data, without that of the whole."""
    parts = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [found for key, item in parts for found in ((*path, key), *paths(item, (*path, key)))]


IMPOSSIBLE = (drop_rows, repeat_rows, drop_column, cast_column, not_a_number, weight, list_length)
POSSIBLE = (swap_rows, other_number)  # tables that another trace may have: only a checksum tells
MUTATIONS: tuple[Mutation, ...] = (
    flip_bit, zero_bytes, cut, remove, copy_over, mixed, link, json_field, json_text, table,
)  # fmt: skip
WEIGHTS = (25, 10, 8, 3, 8, 5, 3, 20, 2, 16)
