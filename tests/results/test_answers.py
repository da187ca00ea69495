"""Means and intervals of right answers, and files of them that are damaged."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kvscope.core.answer_records import AnswerSpan, ExampleRef
from kvscope.results.answers import Answers
from kvscope.results.schema import SAID
from kvscope.results.statistics import interval
from kvscope.results.tables import fault_of_rows
from tests.results.make import info

EXAMPLES = [
    ExampleRef(number, ("7",), "exact", (AnswerSpan(3, 5),), task="a" if number < 6 else "b", length=10 + number // 3)
    for number in range(9)
]


def test_means_and_intervals_are_over_examples() -> None:
    answers, scores = Answers(EXAMPLES), np.random.default_rng(0).random(9)
    for number, score in enumerate(scores):
        answers.add_score(4, number, float(score))
    found = answers.of(4)["answer_score"]
    assert found.mean == pytest.approx(scores.mean()) and found.count == 9
    assert (found.low, found.high) == interval(scores)
    tasks = answers.by_task(4)
    assert [(task.task, task.length) for task in tasks] == [("a", 10), ("a", 11), ("b", 12)]
    for place, task in enumerate(tasks):
        assert task.metrics["answer_score"].mean == pytest.approx(scores[3 * place : 3 * place + 3].mean())
        assert task.metrics["answer_score"].low is None, "three examples are too few for an interval"
    assert answers.of(5) == {} and answers.by_task(5) == ()


def test_near_copies_are_drawn_as_one() -> None:
    copies, scores = [0, 0, 0, 1, 2, 3, 4, 4, 5], np.random.default_rng(0).random(9)
    answers = Answers(EXAMPLES, copies)
    for number, score in enumerate(scores):
        answers.add_score(4, number, float(score))
    found = answers.of(4)["answer_score"]
    assert (found.low, found.high) == interval(scores, clusters=copies) != interval(scores)
    assert found.mean == pytest.approx(scores.mean())


def test_losses_of_the_tokens_of_an_answer() -> None:
    answers, position = Answers(EXAMPLES), np.arange(2, 7)
    losses = {"nll_policy": np.array([9.0, 1.0, 2.0, 9.0, 9.0]), "top1_correct": np.array([0, 1, 1, 0, 0], bool)}
    answers.add_losses(0, 1, position, losses)
    answers.add_losses(0, 2, position, {**losses, "top1_correct": np.array([1, 1, 0, 1, 1], bool)})
    answers.add_losses(0, 3, position[2:], {name: of[2:] for name, of in losses.items()})  # not scored as a whole
    answers.add_losses(0, 11, position, losses)  # no answer is known
    assert answers.by_sequence(0) == {"answer_first": {1: 1.0, 2: 0.0}, "answer_loss": {1: 1.5, 2: 1.5}}
    assert answers.metrics.keys() == {"answer_first", "answer_loss"}


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        ([(0, 0, 3, 0.5, "x"), (0, 1, 3, 1.0, "y")], None),
        ([(0, 0, 3, 1.5, "x")], "a score that is not between 0 and 1"),
        ([(0, 0, 3, 0.5, "x"), (0, 0, 3, 0.5, "x")], "two answers to one prompt"),
        ([(0, 0, 0, 0.5, "")], None),
        ([(0, 0, -5, 0.5, "x")], "an answer of fewer than 0 tokens"),
        ([(0, 7, 3, 0.5, "x")], "a sequence that the replay has not"),
        ([(9, 0, 3, 0.5, "x")], "a run that the replay has not"),
    ],
)
def test_rows_of_answers_are_checked(rows: list[tuple[object, ...]], fault: str | None, tmp_path: Path) -> None:
    columns = [pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), SAID, strict=True)]
    pq.write_table(pa.Table.from_arrays(columns, schema=SAID), tmp_path / "answers.parquet")
    found = fault_of_rows(pq.read_table(tmp_path / "answers.parquet"), "answers", info([6, 6]))
    assert found is None if fault is None else fault in (found or "")
