"""The panel of right answers: accuracy, its map of depth and length, and the needles that heads had evicted."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvscope.core.answer_records import AnswerSpan, ExampleRef
from kvscope.core.json_records import plain
from kvscope.report.needles import evicted_needles, needle_tokens
from kvscope.report.panels.answers import DEPTHS, _evicted, _over_depth, answers
from kvscope.report.source import ReportInput
from kvscope.results.store import Replay
from kvscope.trace.prompt_parts import SpanRecord
from kvscope.trace.reader import Trace
from tests.report.make import make_replay, make_trace

SPANS = [SpanRecord("needle", 1, 3), SpanRecord("question", 4, 5), SpanRecord("needle", 2, 4)]
EXAMPLES = [
    ExampleRef(number, ("821",), "exact", (AnswerSpan(6, 7),), None, "a" if number < 3 else "b", 8, number / 5)
    for number in range(6)
]
MASS: dict[str, dict[str | None, float | None]] = {
    "full": {None: None},
    "window": {"2": 0.5, "3": 0.75},
    "first-keys": {"3": 0.9},
}


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    folder = tmp_path_factory.mktemp("asked")
    texts = ["a", "b", "c", "d", "e", "f", "821", "."]
    return make_trace(folder / "trace", texts=texts, prompt=6, sequences=6, spans=SPANS)


@pytest.fixture(scope="module")
def answered(asked: Trace, tmp_path_factory: pytest.TempPathFactory) -> Replay:
    return make_replay(tmp_path_factory.mktemp("asked") / "r", asked, mass=MASS, loop="closed", examples=EXAMPLES)


def test_evicted_needles_are_those_that_no_residency_interval_holds(asked: Trace, answered: Replay) -> None:
    assert needle_tokens(asked) == {number: [1, 2, 3] for number in range(6)}
    found = evicted_needles(answered, asked, [0, 1, 2])
    assert sorted(found) == [0, 1, 2]
    seen = set()
    for run, shares in found.items():
        assert shares.shape == (6, 2, 2)
        for sequence in range(6):
            for layer in range(2):
                held = answered.resident(run, sequence, layer)[:, asked.sequences[sequence].prompt - 1, [1, 2, 3]]
                assert shares[sequence, layer].tolist() == pytest.approx((1 - held.mean(1)).tolist())
                seen.add(round(float(shares[sequence, layer, 0]), 3))
    assert len(seen) == 3, "nothing, a part, and all of the needle is evicted"


def test_what_the_panel_gets(asked: Trace, answered: Replay) -> None:
    data: Any = answers(ReportInput((answered,), {asked.identity: asked}))
    assert data["metrics"] == ["answer_score", "answer_first", "answer_loss"]
    assert [task["name"] for task in data["tasks"]] == ["a · 8", "b · 8"]
    assert [line["runs"] for line in data["lines"]] == [["0.1", "0.2"], ["0.3"]] and data["flat"] == ["0.0"]
    assert data["values"]["0.1"]["answer_score"] == [[0, 0, 0, 6], [0, None, None, 3], [0, None, None, 3]]
    assert data["values"]["0.2"]["answer_score"][0] == [1, 1, 1, 6]
    assert data["values"]["0.1"]["answer_loss"][1][0] == pytest.approx(1.5)
    assert data["depth"]["0.2"]["means"] == [[1]] * 6 and data["depth"]["0.2"]["counts"] == [[1]] * 6
    wrong = data["heads"]["0.1"]
    assert (wrong["wrong_examples"], wrong["right_examples"]) == (6, 0)
    assert wrong["right"] == [[None, None], [None, None]] and wrong["layers"] == [0, 1]
    assert data["notes"] == []


def test_without_its_trace_nothing_is_said_of_heads(answered: Replay) -> None:
    data: Any = answers(ReportInput((answered,)))
    assert not data["heads"] and any("No map of heads" in note for note in data["notes"])


def test_a_replay_without_answers_has_no_panel(source: ReportInput) -> None:
    assert "answers" not in source.offers


def test_many_depths_share_rows() -> None:
    examples = [ExampleRef(at, ("x",), "any", length=100 + at % 2, depth=at / 40) for at in range(41)]
    scores = {at: float(at % 3 == 0) for at in range(41)}
    found: Any = _over_depth(examples, scores)
    assert len(found["depths"]) == DEPTHS and found["lengths"] == ["100", "101"]
    assert sum(map(sum, found["counts"])) == 41
    mine = [scores[at] for at in range(41) if 0.3 <= at / 40 < 0.4 and at % 2 == 0]
    assert found["means"][3][0] == pytest.approx(np.mean(mine), abs=1e-4) and found["counts"][3][0] == len(mine)
    assert _over_depth([ExampleRef(0, ("x",), "any")], {0: 1.0}) is None


def test_wrong_and_right_answers_are_apart() -> None:
    evicted = np.array([[[1.0, np.nan]], [[0.5, np.nan]], [[0.0, np.nan]], [[np.nan, np.nan]]])
    found: Any = _evicted(evicted, {0: 0.0, 1: 0.25, 2: 1.0, 3: 0.0})
    assert found["wrong"] == [[0.75, None]] and found["wrong_examples"] == 2
    assert found["right"] == [[0.0, None]] and found["right_examples"] == 1
    assert _evicted(evicted, {3: 1.0}) is None


def test_examples_are_read_back(answered: Replay, tmp_path: Path) -> None:
    assert [plain(one) for one in answered.info.trace.examples] == [plain(one) for one in EXAMPLES]
