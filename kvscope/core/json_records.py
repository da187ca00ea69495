"""JSON files as typed records: read into frozen dataclasses, checked field by field, and written back.

A field that was added to a format later has a default and is left out of the file while it has it, so that a file that
is read and written again stays as it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, TypeVar, get_type_hints

import msgspec

from kvscope.core.errors import KvscopeError
from kvscope.core.json import Json, JsonDict

T = TypeVar("T")
MOST = 2**53  # largest whole number that every JSON reader keeps exactly
Number = Annotated[int, msgspec.Meta(ge=0, le=MOST)]  # a count, a position, the number of something
Positive = Annotated[int, msgspec.Meta(ge=1, le=MOST)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Plain = object  # JSON of any form: parameters of a policy, the configuration of a model


def about(text: str) -> T:  # type: ignore[type-var]
    """Return a required field with one line about it, for the documentation of the format."""
    return field(metadata={"about": text})  # type: ignore[no-any-return]


def given(text: str, default: T) -> T:
    """Return a field that may be absent from a file, and then has `default`; it is always written."""
    return _with_default(text, default, omit=False)


def later(text: str, default: T) -> T:
    """Return a field that may be absent from a file; it is written only where it differs from `default`."""
    return _with_default(text, default, omit=True)


def _with_default(text: str, default: T, *, omit: bool) -> T:
    about_it = {"about": text, "omit": omit}
    if isinstance(default, dict):
        empty: T = field(default_factory=dict, metadata=about_it)  # type: ignore[assignment]
        return empty
    made: T = field(default=default, metadata=about_it)
    return made


@dataclass(frozen=True)
class Format:
    """A kind of JSON file.

    Attributes
    ----------
    kind : str
        Value of ``kind`` in the file.
    noun : str
        What a person calls it: ``replay``, ``summary``.
    oldest, newest : int
        Values of ``schema`` that are read; `newest` is written.
    error : type
        Raised for a file that is not of this format.
    again : str
        What to do about a damaged file.
    """

    kind: str
    noun: str
    oldest: int
    newest: int
    error: type[KvscopeError]
    again: str

    def read(self, file: Path, of: type[T], *, example: str) -> T:
        """Return the record in a file.

        Raises
        ------
        KvscopeError
            `error`, each with its own message: cannot be read, damaged, of another kind, older, newer, or with a field
            that is missing, of another type or out of its range.
        """
        return self.decode(self.header(file, example=example), file, of)

    def header(self, file: Path, *, example: str) -> Mapping[str, object]:
        """Return the content of a file of this kind and of a version that is read; raises as `read`."""
        try:
            content = file.read_bytes()
        except OSError as error:
            raise self.error(f"cannot read {file}: {error.strerror}", f"Name a {self.noun} that exists.") from error
        try:
            data = msgspec.json.decode(content)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise self.error(f"{file} is damaged: it is no JSON ({error})", self.again) from error
        if not isinstance(data, dict) or data.get("kind") != self.kind:
            raise self.error(f"{file} is not a kvscope {self.noun}", example)
        version = data.get("schema")
        if not isinstance(version, int) or isinstance(version, bool) or version < self.oldest:
            raise self.error(f"{file} has the older format {version}", f"{self.again[:-1]} with this kvscope.")
        if version > self.newest:
            raise self.error(
                f"{file} has format {version}, newer than this kvscope reads ({self.newest})", "Update kvscope."
            )
        return data

    def decode(self, data: Mapping[str, object], file: Path, of: type[T]) -> T:
        """Return the record in the content of a file; raises `error` that names the field."""
        try:
            return msgspec.convert(data, type=of)
        except (msgspec.ValidationError, RecursionError) as error:
            raise self.error(f"{file} is damaged: {_located(error)}", self.again) from error

    def plain(self, record: object) -> JsonDict:
        """Return a record as the content of its file."""
        return {"kind": self.kind, "schema": self.newest, **plain(record)}

    def text(self, record: object, *, ordered: bool = False) -> str:
        """Return the JSON text of a record; `ordered` sorts the keys of every object."""
        return json.dumps(self.plain(record), indent=1, allow_nan=False, sort_keys=ordered) + "\n"


def plain(record: object) -> JsonDict:
    """Return a record as JSON data: fields in order, without those that have the default of a later field."""
    assert is_dataclass(record) and not isinstance(record, type)
    found = {each.name: getattr(record, each.name) for each in fields(record)}
    kept = [
        each.name for each in fields(record) if not (each.metadata.get("omit") and found[each.name] == each.default)
    ]
    return {name: _plain(found[name]) for name in kept}


def described(of: type) -> Iterator[tuple[str, str, str]]:
    """Yield name, type and meaning of every field of a record, for the documentation of the format."""
    hints = get_type_hints(of)
    for each in fields(of):
        optional = "" if each.default is MISSING and each.default_factory is MISSING else ", may be absent"
        yield each.name, _type_name(hints[each.name]) + optional, _about(each)


def _default(each: Field[object]) -> object:
    return each.default if each.default_factory is MISSING else each.default_factory()


def _about(each: Field[object]) -> str:
    return str(each.metadata["about"])


def _plain(value: object) -> Json:
    if is_dataclass(value) and not isinstance(value, type):
        return plain(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    assert value is None or isinstance(value, bool | int | float | str), f"{type(value).__name__} is no JSON"
    return value


def _located(error: Exception) -> str:
    """Return what is wrong and with which field: ``runs[0].budget: expected `str`, got `int```."""
    what, _, where = str(error).partition(" - at `$.")
    what = what[:1].lower() + what[1:]
    return f"{where.rstrip('`')}: {what}" if where else what


def _type_name(hint: object) -> str:
    name = getattr(hint, "__name__", str(hint)) if isinstance(hint, type) else str(hint)
    return name.replace("kvscope.core.records.", "").replace("NoneType", "None")
