"""Dataclasses to JSON objects and back: types, ranges and missing fields are checked by the annotations.

A field is annotated ``Annotated[type, About("one line", ...)]``. From that come the check of what a file holds, the
JSON that is written, and the table of its documentation. Supported types: bool, int, float, str, ``object`` (any JSON),
Literal, ``list[X]``, ``dict[str, X]``, ``X | None`` and other such dataclasses. Fields that a file has and the class
lacks are ignored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from kvscope.core.errors import KvscopeError
from kvscope.core.json import Json, JsonDict

D = TypeVar("D")


@dataclass(frozen=True)
class About:
    """What a field of a file is, for its documentation, and which values it may have.

    Attributes
    ----------
    text : str
        One line of documentation.
    key : str or None
        Its name in the file, where that is not the name of the attribute.
    at_least : float or None
        Smallest value of a number, also inside a list.
    may_be_nan : bool
        Whether numbers may be NaN or infinite.
    omit_none : bool
        Whether None is not written at all.
    inline : bool
        Whether the fields of this dataclass stand beside the others instead of in an object of their own.
    """

    text: str
    key: str | None = None
    at_least: float | None = None
    may_be_nan: bool = False
    omit_none: bool = False
    inline: bool = False


@dataclass(frozen=True)
class Entry:
    """A field of a dataclass: its attribute, its name in the file, its type, and what it is."""

    attribute: str
    key: str
    hint: object
    about: About
    required: bool


class FieldError(ValueError):
    """A field that is missing or has another value than it may have.

    Parameters
    ----------
    field : str
        Its path in the file: ``sequences[0].length``; empty for the whole.
    why : str
        What is wrong.
    """

    def __init__(self, field: str, why: str) -> None:
        super().__init__(f"{field}: {why}" if field else why)
        self.field, self.why = field, why


def entries(kind: type) -> tuple[Entry, ...]:
    """Return the fields of a dataclass in the order in which they are written."""
    return _entries(kind)


@cache
def _entries(kind: Hashable) -> tuple[Entry, ...]:
    assert isinstance(kind, type) and is_dataclass(kind)
    hints = get_type_hints(kind, include_extras=True)
    found = []
    for item in fields(kind):
        hint, about = hints[item.name], About("")
        if get_origin(hint) is Annotated:
            hint, *notes = get_args(hint)
            about = next((note for note in notes if isinstance(note, About)), about)
        required = item.default is MISSING and item.default_factory is MISSING
        found.append(Entry(item.name, about.key or item.name, hint, about, required))
    return tuple(found)


def decode(kind: type[D], data: object, where: str = "") -> D:
    """Return the record that a JSON object holds.

    Parameters
    ----------
    kind : type
        Dataclass of the record.
    data : object
        What ``json.loads`` gave.
    where : str
        Path of the object in its file, for the error.

    Raises
    ------
    FieldError
        If a field is missing, or its value has another type or is out of range.
    """
    if not isinstance(data, dict):
        raise FieldError(where, f"{_shown(data)} is no object")
    given: dict[str, object] = {}
    for entry in entries(kind):
        place = f"{where}.{entry.key}" if where else entry.key
        if entry.about.inline:
            given[entry.attribute] = decode(cast("type[object]", entry.hint), data, where)
        elif entry.key in data:
            given[entry.attribute] = _value(entry.hint, data[entry.key], place, entry.about)
        elif entry.required:
            raise FieldError(place, "is missing")
    try:
        return kind(**given)
    except KvscopeError as error:  # the record's own check
        raise FieldError(where, error.what) from error


def encode(record: object) -> JsonDict:
    """Return a record as a JSON object: the inverse of `decode`."""
    data: JsonDict = {}
    for entry in entries(type(record)):
        value = getattr(record, entry.attribute)
        if entry.about.inline:
            data |= encode(value)
        elif value is not None or not entry.about.omit_none:
            data[entry.key] = _plain(value)
    return data


def type_name(hint: object) -> str:
    """Return a type as documentation shows it: ``list of int or null``."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join("null" if part is NoneType else type_name(part) for part in arguments)
    if origin is Literal:
        return " or ".join(json.dumps(part) for part in arguments)
    if origin is list:
        inner = type_name(arguments[0])
        return f"list of ({inner})" if " or " in inner else f"list of {inner}"
    if origin is dict:
        return f"object of {type_name(arguments[1])}"
    if hint is object:
        return "any JSON"
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _plain(value: object) -> Json:
    if is_dataclass(value):
        return encode(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return cast("Json", value)


def _value(hint: object, value: object, where: str, about: About) -> object:
    """Return a value of a file as the type `hint`; raise FieldError if it is none."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None and NoneType in arguments:
            return None
        return _value(next(part for part in arguments if part is not NoneType), value, where, about)
    if origin is Literal:
        if not any(value == part and type(value) is type(part) for part in arguments):
            raise FieldError(where, f"{_shown(value)} is none of {', '.join(map(repr, arguments))}")
        return value
    if origin is list and isinstance(value, list):
        return [_value(arguments[0], item, f"{where}[{index}]", about) for index, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {key: _value(arguments[1], item, f"{where}[{key!r}]", about) for key, item in value.items()}
    if hint is object:
        return value
    if isinstance(hint, type) and is_dataclass(hint):
        return decode(hint, value, where)
    if hint in (bool, str) and isinstance(value, cast("type[object]", hint)):
        return value
    if hint in (int, float) and isinstance(value, (int, float)) and not isinstance(value, bool):
        return _number(hint, value, where, about)
    raise FieldError(where, f"{_shown(value)} is no {type_name(hint)}")


def _number(hint: object, value: int | float, where: str, about: About) -> int | float:
    if hint is int and not isinstance(value, int):
        raise FieldError(where, f"{_shown(value)} is no int")
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        finite = False
    if hint is float and not finite and not about.may_be_nan:
        raise FieldError(where, f"{_shown(value)} is not finite")
    if about.at_least is not None and value < about.at_least:
        raise FieldError(where, f"{_shown(value)} is below {about.at_least:g}")
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
