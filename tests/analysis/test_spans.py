"""Spans against plain loops, and what a command line may call a span."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvscope.analysis.spans import Span, held_tokens, parse_spans, spans_of
from kvscope.core.errors import UsageError
from tests.analysis.test_regret import intervals_of, stays_of
from tests.reference import spans as twin
from tests.results.make import make

TEXTS = ["Note", ":", " Dor", "ian", " has", " 4", "82", ".", "\n", "It", " was", " late", ".", " Dor", "ian", " has"]


def parsed(*given: str) -> list[Span]:
    return parse_spans(given, len(TEXTS), lambda: TEXTS)


@given(seed=st.integers(0, 10_000), heads=st.integers(1, 3), length=st.integers(1, 12), back=st.booleans())
@settings(max_examples=60, deadline=None)
def test_held_tokens_equal_the_plain_loop(seed, heads, length, back) -> None:
    stays = stays_of(seed, heads, length, back)
    start = seed % length
    stop = start + 1 + (seed // 7) % (length - start)
    counts = held_tokens(intervals_of(stays, heads, length), Span("x", start, stop))
    for t, expected in enumerate(twin.held(stays, heads, length, start, stop)):
        if expected is not None:
            assert counts[:, t].mean() / (stop - start) == pytest.approx(expected[0])
            assert (counts[:, t] == stop - start).mean() == pytest.approx(expected[1])


def test_spans_of_a_replay(tmp_path: Path) -> None:
    """In this replay key `k` leaves after one step where ``k % 3 == run % 3``, in every head and layer."""
    replay = make(tmp_path / "r", [9, 6])
    found = spans_of(replay, [Span("a", 1, 4), Span("b", 5, 6)], [1, 5])
    assert (found["sequence"], [run["run"] for run in found["runs"]]) == (0, [0, 1])
    first, second = found["runs"][0]["spans"]
    assert (first["name"], first["start"], first["stop"], first["tokens"]) == ("a", 1, 4, 3)
    assert [layer["layer"] for layer in first["layers"]] == ["all", 0, 1]
    for layer in first["layers"]:
        assert layer["at"] == [
            {"step": 1, "held": None, "whole": None},
            {"step": 5, "held": pytest.approx(2 / 3), "whole": 0.0},
        ]
        assert layer["half_gone"] is None
    assert second["layers"][0]["at"][1] == {"step": 5, "held": 1.0, "whole": 1.0}
    gone = found["runs"][1]["spans"][0]["layers"][0]
    assert gone["at"][1]["held"] == pytest.approx(2 / 3)
    assert spans_of(replay, [Span("c", 3, 4)], [5], [0])["runs"][0]["spans"][0]["layers"][0]["half_gone"] == 4
    exactly = spans_of(replay, [Span("d", 2, 4)], [5], [0])["runs"][0]["spans"][0]["layers"][0]
    assert (exactly["at"][0]["held"], exactly["half_gone"]) == (0.5, 4)
    assert len(spans_of(replay, [Span("c", 3, 4)], [5], [1], 1)["runs"]) == 1


def test_ranges_and_texts() -> None:
    assert parsed("q=2:5", " all = 0:16") == [Span("q", 2, 5), Span("all", 0, 16)]
    assert parsed("fact=text:Dorian has 482") == [Span("fact", 2, 7)]
    assert parsed("within=text:rian ha") == [Span("within", 2, 5), Span("within-2", 13, 16)]
    assert parsed("end=text:.\nIt") == [Span("end", 7, 10)]


def test_a_text_that_stands_twice_is_two_spans() -> None:
    assert parsed("who=text: Dorian") == [Span("who", 2, 4), Span("who-2", 13, 15)]


@pytest.mark.parametrize(
    ("given", "what", "todo"),
    [
        (("2:5",), "no name", "NAME=120:140"),
        (("=2:5",), "no name", "NAME=120:140"),
        (("q=five",), "neither a range nor a text", "NAME=text:WORDS"),
        (("q=5:2",), "not a range within 16 tokens", "START:STOP"),
        (("q=5:5",), "not a range within 16 tokens", "START:STOP"),
        (("q=0:17",), "not a range within 16 tokens", "START:STOP"),
        (("q=text:",), "no text", "text:WORDS"),
        (("q=text:Doriana",), "is not in the sequence", "spaces"),
        (("q=0:2", "q=3:4"), "twice", "different name"),
        (("q=text: Dorian", "q-2=0:1"), "twice", "different name"),
    ],
)
def test_what_is_no_span(given: tuple[str, ...], what: str, todo: str) -> None:
    with pytest.raises(UsageError) as caught:
        parsed(*given)
    assert what in caught.value.what and todo in caught.value.todo


def test_texts_are_read_only_where_they_are_needed() -> None:
    def never() -> list[str]:
        raise AssertionError("nobody asked for texts")

    assert parse_spans(["q=0:3"], 5, never) == [Span("q", 0, 3)]


def test_steps_and_sequences_that_are_not_there(tmp_path: Path) -> None:
    replay = make(tmp_path / "r", [9])
    with pytest.raises(UsageError, match="no step 9"):
        spans_of(replay, [Span("a", 0, 2)], [9])
    with pytest.raises(UsageError, match="no sequence 1"):
        spans_of(replay, [Span("a", 0, 2)], [3], sequence=1)


def test_the_counts_are_whole_numbers() -> None:
    counts = held_tokens(intervals_of([(0, 0, 0, 2), (0, 1, 1, None), (0, 0, 4, None)], 1, 6), Span("x", 0, 2))
    assert counts.dtype == np.int64 and counts.tolist() == [[1, 2, 1, 1, 2, 2]]
