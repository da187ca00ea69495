"""Records and JSON objects: what an annotation allows comes back, anything else is refused by name."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest

from kvscope.core.decode import About, FieldError, decode, encode, entries, type_name
from kvscope.core.errors import UsageError


@dataclass(frozen=True)
class Inner:
    """A part."""

    size: Annotated[int, About("a size", at_least=1)]

    def __post_init__(self) -> None:
        if self.size == 13:
            raise UsageError("size=13 is refused", "Choose another.")


@dataclass(frozen=True)
class Beside:
    """Fields that stand beside those of the outer record."""

    kind: Annotated[Literal["a", "b"], About("a kind")] = "a"


@dataclass(frozen=True)
class Outer:
    """A whole."""

    beside: Annotated[Beside, About("beside", inline=True)]
    parts: Annotated[list[Inner | None], About("parts")]
    class_name: Annotated[str | None, About("a name", key="class", omit_none=True)] = None
    rates: Annotated[dict[str, float], About("rates")] = field(default_factory=dict)
    free: Annotated[object, About("any JSON")] = None


@pytest.mark.parametrize(
    "data",
    [
        {"kind": "b", "parts": [{"size": 3}, None], "class": "x", "rates": {"r": 0.5}, "free": [{"a": 1}]},
        {"kind": "a", "parts": [], "rates": {"r": 1}, "free": None},
    ],
)
def test_what_is_read_is_written(data: dict[str, object]) -> None:
    assert encode(decode(Outer, data)) == data
    assert list(encode(decode(Outer, data))) == list(data), "in the order of the fields"


def test_missing_fields_get_their_defaults_and_unknown_ones_are_ignored() -> None:
    assert decode(Outer, {"parts": [], "later": 1}) == Outer(Beside(), [])


@pytest.mark.parametrize(
    ("data", "field", "why"),
    [
        ({}, "parts", "is missing"),
        ([], "", "[] is no object"),
        ({"parts": {}}, "parts", "{} is no list of (Inner or null)"),
        ({"parts": [{"size": 0}]}, "parts[0].size", "0 is below 1"),
        ({"parts": [None, {"size": True}]}, "parts[1].size", "True is no int"),
        ({"parts": [{"size": 1.0}]}, "parts[0].size", "1.0 is no int"),
        ({"parts": [{"size": 13}]}, "parts[0]", "size=13 is refused"),
        ({"parts": [], "kind": "c"}, "kind", "'c' is none of 'a', 'b'"),
        ({"parts": [], "class": 1}, "class", "1 is no str"),
        ({"parts": [], "rates": {"r": float("nan")}}, "rates['r']", "nan is not finite"),
        ({"parts": [], "rates": {"r": 10**400}}, "rates['r']", f"{str(10**400)[:37]}... is not finite"),
        ({"parts": [], "rates": {"r": None}}, "rates['r']", "None is no float"),
    ],
)
def test_the_field_and_what_is_wrong_are_named(data: object, field: str, why: str) -> None:
    with pytest.raises(FieldError) as caught:
        decode(Outer, data)
    assert (caught.value.field, caught.value.why) == (field, why)


def test_types_are_named_as_in_json() -> None:
    named = {entry.key: type_name(entry.hint) for entry in entries(Outer)}
    assert named["parts"] == "list of (Inner or null)"
    assert named["class"] == "str or null"
    assert named["rates"] == "object of float"
    assert named["free"] == "any JSON"
