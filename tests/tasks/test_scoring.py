"""Scores of answers, with values computed by hand from their definitions."""

from __future__ import annotations

import pytest

from kvscope.core.errors import UsageError
from kvscope.tasks import score


@pytest.mark.parametrize(
    ("metric", "said", "answers", "expected"),
    [
        ("exact", " 264.\n\nQuestion", ["264"], 1),
        ("exact", "2641", ["264"], 0),
        ("exact", "The  Cat sat", ["dog", "the cat"], 1),
        ("exact", "", ["a"], 0),
        ("all", "12 and 34", ["12", "34"], 1),
        ("all", "12 and 34", ["12", "56", "34", "78"], 0.5),
        ("any", "It is 34.", ["12", "34"], 1),
        ("any", "It is 35.", ["12", "34"], 0),
        ("f1", "The cat sat.", ["a cat"], 2 / 3),  # cat, sat against cat: 2 * 1 / (2 + 1)
        ("f1", "cat cat", ["cat dog"], 0.5),  # one in common of two and two
        ("f1", "", ["x"], 0),
        ("f1", "the", ["a"], 1),  # nothing is left of either
        ("rouge-l", "the cat sat", ["the cat sat down"], 2 * 1 * 0.75 / 1.75),
        ("rouge-l", "b a", ["a b", "x"], 0.5),  # the longest common subsequence is one word
    ],
)
def test_scores(metric: str, said: str, answers: list[str], expected: float) -> None:
    assert score(metric, said, answers) == pytest.approx(expected)


def test_what_cannot_be_scored() -> None:
    with pytest.raises(UsageError, match="no score is called 'exakt'"):
        score("exakt", "a", ["a"])
    with pytest.raises(UsageError, match="has no answers"):
        score("exact", "a", [])
