"""Typed records and JSON: what is read is written, and whatever is wrong is refused by the name of its field."""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvscope.core.errors import ResultError
from kvscope.core.json_records import (
    FieldError,
    Finite,
    Format,
    Number,
    Positive,
    about,
    decode,
    described,
    parse,
    plain,
    type_name,
)
from kvscope.core.records import REPLAY, ReplayRecord, read_replay
from kvscope.core.seal import seal_of
from kvscope.core.summary_records import SUMMARY, SummaryRecord, read_summary

ROOT = Path(__file__).parents[2]
RUN, SUMMARY_FILE = ROOT / "reports/example/run.json", ROOT / "reports/example/summary.json"
FIRST = ROOT / "tests/data/replay_v1"  # of the first version of the format


@dataclass(frozen=True)
class Part:
    """A part."""

    size: Annotated[Positive, about("a size")]


@dataclass(frozen=True)
class Whole:
    """A whole."""

    parts: Annotated[list[Part], about("its parts")]
    kind: Annotated[Literal["a", "b"], about("which kind")] = "a"
    rate: Annotated[Finite | None, about("a rate", omit=True)] = None
    counts: Annotated[dict[str, Number], about("counts", omit=True)] = field(default_factory=dict)


@pytest.mark.parametrize(
    "data",
    [
        {"parts": [{"size": 1}], "kind": "b", "rate": 0.5, "counts": {"x": 0}},
        {"parts": [], "kind": "a"},
    ],
)
def test_what_is_read_is_written(data: dict) -> None:
    assert plain(decode(data, Whole)) == data
    assert list(plain(decode(data, Whole))) == list(data), "in the order of the fields"


def test_unknown_fields_are_ignored_and_absent_ones_have_their_defaults() -> None:
    assert decode({"parts": [], "new": 1}, Whole) == Whole([])


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "expected `object`, got `array`"),
        ({}, "is missing the field `parts`"),
        ({"parts": [{"size": 0}]}, "parts[0].size: expected `int` >= 1"),
        ({"parts": [{"size": True}]}, "parts[0].size: expected `int`, got `bool`"),
        ({"parts": [{}]}, "parts[0]: is missing the field `size`"),
        ({"parts": [], "kind": "c"}, "kind: invalid enum value 'c'"),
        ({"parts": [], "rate": math.nan}, "rate: expected `float` >= "),
        ({"parts": [], "rate": -math.inf}, "rate: expected `float` >= "),
        ({"parts": [], "counts": {"x": 10**20}}, "counts[...]: expected `int` <= "),
    ],
)
def test_the_field_is_named(data: object, said: str) -> None:
    with pytest.raises(FieldError) as caught:
        decode(data, Whole)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize("text", [b"", b"{", b"[" * 10**6, b'{"a": NaN}', b"\xff", b"1e999"])
def test_what_is_no_json_is_a_value_error(text: bytes) -> None:
    with pytest.raises(ValueError):
        parse(text)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ({"kind": "other", "schema": 1}, "is not a kvscope thing"),
        ([], "is not a kvscope thing"),
        ({"kind": "k", "schema": 0}, "older format 0"),
        ({"kind": "k", "schema": True}, "older format True"),
        ({"kind": "k", "schema": "1"}, "older format 1"),
        ({"kind": "k", "schema": 3}, "has format 3, newer"),
        ({"kind": "k", "schema": 2}, "kind: invalid enum value"),
    ],
)
def test_every_fault_of_a_file_has_its_message(content: object, what: str, tmp_path: Path) -> None:
    form = Format("k", "thing", 2, ResultError, "Make it again.")
    file = tmp_path / "thing.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ResultError, match=what) as caught:
        form.read(file, Whole, example="Name a thing.")
    assert caught.value.todo and str(file) in caught.value.what
    with pytest.raises(ResultError, match="cannot read"):
        form.read(tmp_path / "none.json", Whole, example="Name a thing.")


def test_types_are_said_as_a_person_reads_them() -> None:
    assert list(described(Whole)) == [
        ("parts", "list of Part", "its parts"),
        ("kind", "`a` or `b`", "which kind"),
        ("rate", "float or null", "a rate"),
        ("counts", "object of int", "counts"),
    ]
    assert type_name(tuple[float, str]) == "list of (float, str)"
    assert type_name(object) == "any"


def ordered(value: object) -> object:
    """Return JSON data with its objects as lists, so that the order of their fields counts."""
    if isinstance(value, dict):
        return [(name, ordered(item)) for name, item in value.items()]
    return [ordered(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data["runs"].append(data["runs"][0]), "two runs of one number"),
        (lambda data: data["runs"][0].update(budget_keys=[1, 2]), "one number of keys for each sequence"),
        (lambda data: data["runs"][0].update(phase="sometimes"), r"runs\[0\].phase"),
        (lambda data: data["runs"][0].update(scope="token"), r"runs\[0\].scope"),
        (lambda data: data["runs"][0].update(accumulate="float8"), r"runs\[0\].accumulate"),
        (lambda data: data.update(seconds=-1), "seconds"),
        (lambda data: data["trace"]["sequences"][0].update(prompt=10**6), "a prompt of 1000000 tokens"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(change: Callable[[dict], object], said: str) -> None:
    data = json.loads(RUN.read_text())
    change(data)
    with pytest.raises(ResultError, match=said):
        REPLAY.decode(data, RUN, ReplayRecord)


def test_committed_files_come_back_as_they_are() -> None:
    for file, form, record in (
        (RUN, REPLAY, read_replay(RUN.parent)),
        (SUMMARY_FILE, SUMMARY, read_summary(SUMMARY_FILE)),
    ):
        written, kept = json.loads(form.text(record, ordered=form is SUMMARY)), json.loads(file.read_text())
        kept.pop("sha256"), written.pop("sha256")  # of the text, where 1 and 1.0 differ
        assert written == kept
        assert ordered(written) == ordered(kept)
    assert read_summary(ROOT / "tests/data/baseline.json").runs


def test_files_of_the_first_version_come_back_in_the_present_one() -> None:
    for file, form, record in (
        (FIRST / "run.json", REPLAY, read_replay(FIRST)),
        (FIRST / "summary.json", SUMMARY, read_summary(FIRST / "summary.json")),
    ):
        written, kept = json.loads(form.text(record, ordered=form is SUMMARY)), json.loads(file.read_text())
        assert written.pop("sha256") == seal_of(written)
        assert (kept.pop("schema"), written.pop("schema")) == (1, 2)
        assert written == kept
        assert ordered(written) == ordered(kept)


@pytest.mark.parametrize(
    ("file", "form", "of"),
    [(RUN, REPLAY, ReplayRecord), (SUMMARY_FILE, SUMMARY, SummaryRecord)],
    ids=["run", "summary"],
)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_damaged_record_is_equal_or_refused(file: Path, form: Format, of: type, data: st.DataObject) -> None:
    """Whatever one value of the file becomes, reading gives the same content again or a ResultError, nothing else."""
    content = json.loads(file.read_text())
    content["runs"] = content["runs"][:3]
    place, key = content, data.draw(st.sampled_from(sorted(content)))
    while isinstance(place[key], dict | list) and place[key] and data.draw(st.booleans()):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
    before = copy.deepcopy(place[key])
    odd = [None, True, -1, 0, 1.5, 10**30, "", "x", [], {}, [before], {"x": before}]
    place[key] = data.draw(st.sampled_from(odd))
    if data.draw(st.booleans()) and isinstance(place, dict):
        del place[key]
    try:
        record = form.decode(content, file, of)
    except ResultError as error:
        message = error.what
    else:
        message = str(file)
        assert form.decode(form.plain(record), file, of) == record
    assert str(file) in message
