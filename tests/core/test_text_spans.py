"""Characters of a text as tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvscope.core.text_spans import token_range


@given(st.lists(st.text("ab", max_size=3), min_size=1), st.data())
def test_the_tokens_contain_the_characters_and_no_others(texts: list[str], data: st.DataObject) -> None:
    whole = "".join(texts)
    if not whole:
        return
    start = data.draw(st.integers(0, len(whole) - 1))
    stop = data.draw(st.integers(start + 1, len(whole)))
    first, last = token_range(start, stop, texts)
    assert whole[start:stop] in "".join(texts[first:last])
    before, after = "".join(texts[:first]), "".join(texts[last:])
    assert len(before) <= start and len(whole) - len(after) >= stop
    assert texts[last - 1], "the last token has some of the text"
    inner = [text for text in texts[first:last] if text]
    assert len(before) + len(inner[0]) > start, "the first token with text has some of it"


def test_parts_of_a_character_belong_to_it() -> None:
    assert token_range(1, 2, ["a", "", "", "界", "b"]) == (1, 4)


@pytest.mark.parametrize(("start", "stop", "expected"), [(0, 1, (0, 1)), (0, 3, (0, 2)), (2, 3, (1, 2))])
def test_words(start: int, stop: int, expected: tuple[int, int]) -> None:
    assert token_range(start, stop, ["ab", "c"]) == expected
