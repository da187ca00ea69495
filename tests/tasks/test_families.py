"""Task families: what is asked is answered in the prompt, at any length, and the same seed gives the same examples."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvscope.core.errors import UsageError
from kvscope.tasks import SCORES, TASKS, Example, make_examples, parse_task
from kvscope.tasks.haystack import Haystack
from kvscope.tasks.make import Lengths, words

SPECS = [
    *("copying", "facts", "key-value", "needle", "needle-multikey", "needle-multivalue", "needle-multiquery"),
    *("needle:wording=notes", "needle-multikey:wording=notes", "needles-alone:wording=notes", "needles-alone"),
    *("variable-tracking", "variable-tracking:chains=2,hops=2", "common-words:common=3,often=6", "frequent-words"),
]


def made(spec: str, length: int, number: int = 3, seed: int = 0) -> list[Example]:
    return list(make_examples(parse_task(spec), Lengths(length, words, "words"), number, seed=seed))


def named(example: Example, name: str) -> list[str]:
    return [example.prompt[span.start : span.stop] for span in example.spans if span.name == name]


def test_every_family_is_tried() -> None:
    assert {spec.partition(":")[0] for spec in SPECS} == set(TASKS.names())


@pytest.mark.parametrize("spec", SPECS)
def test_examples_are_of_the_length_and_repeatable(spec: str) -> None:
    examples = made(spec, 300)
    assert examples == made(spec, 300)
    assert [one.prompt for one in examples] != [one.prompt for one in made(spec, 300, seed=1)]
    assert len({one.id for one in examples}) == len({one.prompt for one in examples}) == 3
    for example in examples:
        assert parse_task(example.task).label == example.task == parse_task(spec).label
        assert words(example.prompt) <= 300
        assert words(example.prompt) > 200 or "notes" in spec  # a sentence of the haystack may not fit
        assert example.answers and example.metric in SCORES
        assert SCORES[example.metric](" ".join(example.answers), example.answers) == 1
        assert SCORES[example.metric]("nothing of the kind", example.answers) == 0


@pytest.mark.parametrize("spec", SPECS)
@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.integers(150, 600))
def test_spans_are_in_order_and_whole(spec: str, seed: int, length: int) -> None:
    for example in made(spec, length, 1, seed):
        assert all(0 <= span.start < span.stop <= len(example.prompt) for span in example.spans)
        assert all(a.stop <= b.start for a, b in zip(example.spans, example.spans[1:], strict=False))
        for span in example.spans:
            text = example.prompt[span.start : span.stop]
            assert text == text.strip()
        assert named(example, "question"), "every example asks something"
        assert example.prompt.endswith(named(example, "question")[-1])


@pytest.mark.parametrize("spec", [spec for spec in SPECS if "words" not in spec])
@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6))
def test_the_needles_hold_the_answers(spec: str, seed: int) -> None:
    (example,) = made(spec, 200, 1, seed)
    needles, others = " ".join(named(example, "needle")), " ".join(named(example, "distractor"))
    for answer in example.answers:
        assert re.search(rf"\b{re.escape(answer)}\b", needles)
        assert not re.search(rf"\b{re.escape(answer)}\b", others)


@pytest.mark.parametrize(("spec", "count"), [("common-words:common=3,often=6", 3), ("frequent-words", 3)])
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(60, 2000))
def test_the_most_frequent_words_are_the_answer(spec: str, count: int, seed: int, length: int) -> None:
    (example,) = made(spec, length, 1, seed)
    listed = example.prompt.split("\n\n")[1].split()
    ranked = Counter(listed).most_common()
    assert {word for word, _ in ranked[:count]} == set(example.answers)
    assert ranked[count - 1][1] > ranked[count][1], "a tie would have no right answer"


@pytest.mark.parametrize("chains", [1, 3])
@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6))
def test_variables_lead_to_the_value(chains: int, seed: int) -> None:
    (example,) = made(f"variable-tracking:chains={chains},hops=3", 300, 1, seed)
    values: dict[str, str] = {}
    for name, told in re.findall(r"Set (\w+) = (\w+)\.", example.prompt):
        values[name] = values.get(told, told)
    asked = re.search(r"have the value (\d+)\?", example.prompt)
    assert asked is not None
    assert sorted(name for name, value in values.items() if value == asked[1]) == sorted(example.answers)


def test_depths_are_spread_over_the_examples() -> None:
    examples = made("needle", 400, 5)
    assert sorted(one.depth for one in examples if one.depth is not None) == [0, 0.25, 0.5, 0.75, 1]
    for example in examples:
        assert example.depth is not None
        (needle,) = [span for span in example.spans if span.name == "needle"]
        assert needle.start / len(example.prompt) == pytest.approx(example.depth, abs=0.25)


def test_a_longer_example_has_the_same_facts() -> None:
    short, long = (made("needle-multikey", length) for length in (150, 600))
    assert [one.answers for one in short] == [one.answers for one in long]
    assert [one.depth for one in short] == [one.depth for one in long]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("needl", "no task is called 'needl'"),
        ("needle:digit=3", "has no parameter 'digit'"),
        ("needle:digits=x", "digits='x' is not int"),
        ("needle:digits=40", "digits is 40"),
        ("needle:digits", "is not a setting"),
        ("needle:digits=3,digits=4", "set twice"),
        ("needle:wording=ruler", "wording is 'ruler'"),
        ("needle-multivalue:wording=notes", "ask for one number"),
        ("common-words:often=2,seldom=2", "seldom is 2"),
    ],
)
def test_what_is_no_task(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse_task(spec)
    assert caught.value.todo


def test_a_length_that_nothing_fits_is_refused() -> None:
    with pytest.raises(UsageError, match=r"the shortest prompt has \d+ words, but 10 are requested"):
        made("needle", 10)


def test_a_haystack_of_the_users_own() -> None:
    text = " ".join(f"Sentence {number} is here." for number in range(12))
    haystack = Haystack(text)
    assert haystack.take(11, 3) == ["Sentence 11 is here.", "Sentence 0 is here.", "Sentence 1 is here."]
    (example,) = make_examples(parse_task("needle"), Lengths(100, words, "words"), 1, haystack=haystack)
    assert "Sentence 3 is here." in example.prompt
    with pytest.raises(UsageError, match="has 1 sentences"):
        Haystack("Only one.")
    assert Haystack('"Why?" he said. "Go!" Then all left. ' * 9).sentences[:3] == ['"Why?"', "he said.", '"Go!"']
