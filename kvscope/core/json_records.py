"""JSON files as typed records: read into frozen dataclasses, checked field by field, and written back.

A field is annotated ``Annotated[type, about("one line")]``: the type and its range are checked when a file is read, the
line is its documentation. A field that was added to a format later has a default; one that is written only where it
differs from its default is marked with ``omit=True``, so that a file that is read and written again stays as it was.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from kvscope.core.errors import KvscopeError
from kvscope.core.json import Json, JsonDict
from kvscope.core.seal import is_changed, sealed

T = TypeVar("T")
MOST = 2**53  # largest whole number that every JSON reader keeps exactly
LARGEST = 1.7976931348623157e308  # a range that NaN and infinity are outside of
Number = Annotated[int, Meta(ge=0, le=MOST)]  # a count, a position, the number of something
Positive = Annotated[int, Meta(ge=1, le=MOST)]
Finite = Annotated[float, Meta(ge=-LARGEST, le=LARGEST)]
NotNegative = Annotated[float, Meta(ge=0, le=LARGEST)]
Checksum = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]  # SHA-256 in hexadecimal
Share = Annotated[float, Meta(ge=0, le=1)]
Plain = object  # any JSON: parameters of a policy, the configuration of a model


def about(text: str, *, omit: bool = False) -> Meta:
    """Return what a field is, for the documentation of its format.

    Parameters
    ----------
    text : str
        One line.
    omit : bool
        Whether the field is written only where it differs from its default.
    """
    return Meta(description=text, extra={"omit": omit})


class FieldError(ValueError):
    """A field that is missing, has another type, is out of its range, or contradicts another one.

    Parameters
    ----------
    place : str
        Where the field is: ``sequences[0].prompt``; empty for the whole.
    why : str
        What is wrong with it.
    """

    def __init__(self, place: str, why: str) -> None:
        super().__init__(f"{place}: {why}" if place else why)


@dataclass(frozen=True)
class Format:
    """A kind of JSON file.

    Attributes
    ----------
    kind : str
        Value of ``kind`` in the file.
    noun : str
        What a person calls it: ``replay``, ``summary``.
    newest : int
        Value of ``schema`` that is written; from 1 to this all are read.
    error : type
        Raised for a file that is not of this format.
    again : str
        What to do about a damaged file.
    """

    kind: str
    noun: str
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

    def header(self, file: Path, *, example: str) -> JsonDict:
        """Return the content of a file of this kind and of a version that is read; raises as `read`."""
        try:
            content = file.read_bytes()
        except OSError as error:
            raise self.error(f"cannot read {file}: {error.strerror}", f"Name a {self.noun} that exists.") from error
        return self.header_of(content, file, example=example)

    def header_of(self, content: bytes, file: Path | str, *, example: str) -> JsonDict:
        """Return what `header` returns, of the content of a file that is called `file` in messages."""
        try:
            data = parse(content)
        except ValueError as error:
            raise self.error(f"{file} is damaged: it is not JSON ({error})", self.again) from error
        if not isinstance(data, dict) or data.get("kind") != self.kind:
            raise self.error(f"{file} is not a kvscope {self.noun}", example)
        version = data.get("schema")
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise self.error(f"{file} has the older format {version}", f"{self.again[:-1]} with this kvscope.")
        if version > self.newest:
            raise self.error(
                f"{file} has format {version}, newer than this kvscope reads ({self.newest})", "Update kvscope."
            )
        return data

    def decode(self, data: Mapping[str, object], file: Path | str, of: type[T]) -> T:
        """Return the record in the content of a file; raises `error` that names the field, or says it was changed."""
        try:
            record = decode(data, of)
        except FieldError as error:
            raise self.error(f"{file} is damaged: {error}", self.again) from error
        if is_changed(data):
            raise self.error(f"{file} is damaged: its checksum differs from its content", self.again)
        return record

    def plain(self, record: object) -> JsonDict:
        """Return a record as the content of its file."""
        return {"kind": self.kind, "schema": self.newest, **plain(record)}

    def text(self, record: object, *, ordered: bool = False) -> str:
        """Return the JSON text of a record, with its checksum; `ordered` sorts the keys of every object."""
        return json.dumps(sealed(self.plain(record)), indent=1, allow_nan=False, sort_keys=ordered) + "\n"


def parse(content: bytes) -> object:
    """Return the value of a JSON text; raises ValueError if it is none, NaN and too deeply nested text included."""
    try:
        return msgspec.json.decode(content)
    except RecursionError as error:
        raise ValueError(str(error)) from error
    except msgspec.DecodeError as error:
        if rb"\ud" not in content:
            raise ValueError(str(error)) from error
    try:  # half a surrogate pair, which msgspec refuses, stands for a byte of a file name that is not UTF-8
        return json.loads(content, parse_constant=_no_number)
    except RecursionError as error:
        raise ValueError(str(error)) from error


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not a number in JSON")


def decode(data: object, of: type[T]) -> T:
    """Return the record in JSON data; raises FieldError, which names the field, where it is not one."""
    try:
        return msgspec.convert(data, type=of)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$")
        what = re.sub(r"^Object missing required field", "is missing the field", what)
        raise FieldError(where.rstrip("`").lstrip("."), what[:1].lower() + what[1:]) from error
    except RecursionError as error:
        raise FieldError("", "it is nested too deeply") from error
    except UnicodeError as error:
        raise FieldError("", "it has half of a character, a lone surrogate") from error


def plain(record: object) -> JsonDict:
    """Return a record as JSON data, its fields in order."""
    assert is_dataclass(record) and not isinstance(record, type)
    found: JsonDict = {}
    for each, meta in _fields(type(record)):
        value = getattr(record, each.name)
        if not (_extra(meta)["omit"] and value == _default(each)):
            found[each.name] = _plain(value)
    return found


def described(of: type) -> Iterator[tuple[str, str, str]]:
    """Yield name, type and meaning of every field of a record, for the documentation of its format."""
    hints = get_type_hints(of, include_extras=True)
    for each, meta in _fields(of):
        yield each.name, type_name(hints[each.name]), meta.description or ""


def type_name(hint: object) -> str:
    """Return a type as a person reads it: ``list of int``, ``str or null``, ``RunRecord``."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return type_name(arguments[0])
    if hint is type(None):
        return "null"
    if hint is object:
        return "any"
    if origin in (list, tuple):
        inner = [type_name(each) for each in arguments if each is not ...]
        return f"list of {inner[0]}" if len(set(inner)) == 1 else f"list of ({', '.join(inner)})"
    if origin in (dict, Mapping):
        return f"object of {type_name(arguments[-1])}"
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if arguments:
        return " or ".join(dict.fromkeys(type_name(each) for each in arguments))
    return getattr(hint, "__name__", str(hint))


@cache  # to evaluate the annotations takes longer than to write a record
def _fields(of: type) -> tuple[tuple[Field[object], Meta], ...]:
    hints = get_type_hints(of, include_extras=True)
    return tuple((each, _meta(hints[each.name])) for each in fields(of))


def _meta(hint: object) -> Meta:
    (meta,) = (note for note in get_args(hint)[1:] if isinstance(note, Meta) and note.description)
    return meta


def _extra(meta: Meta) -> dict[str, bool]:
    return meta.extra or {"omit": False}


def _default(each: Field[object]) -> object:
    return each.default if each.default_factory is MISSING else each.default_factory()


def _plain(value: object) -> Json:
    if is_dataclass(value) and not isinstance(value, type):
        return plain(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    assert value is None or isinstance(value, bool | int | float | str), f"{type(value).__name__} is not JSON"
    return value
