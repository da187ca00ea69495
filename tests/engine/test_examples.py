"""Where right answers are in the text after a prompt."""

import pytest

from kvscope.core.answer_records import AnswerSpan
from kvscope.engine.examples import answer_spans

TEXTS = ["Who has", " 31", "7?", " 3", "17", " and", " ", "Fr", "ed", "."]
PROMPT = 3


@pytest.mark.parametrize(
    ("answers", "every", "expected"),
    [
        (["317"], False, [(3, 5)]),
        (["fred"], False, [(7, 9)]),
        (["fred", "317"], False, [(3, 5)]),
        (["fred", "317"], True, [(3, 5), (7, 9)]),
        (["fred", "942"], True, []),
        (["fred", "942"], False, [(7, 9)]),
        (["31"], False, []),  # goes on: 317
        (["Who"], False, []),  # in the prompt alone
        (["."], False, [(9, 10)]),
    ],
)
def test_where_answers_are(answers: list[str], every: bool, expected: list[tuple[int, int]]) -> None:
    found = answer_spans(TEXTS, PROMPT, answers, every=every)
    assert found == tuple(AnswerSpan(*span) for span in expected)
