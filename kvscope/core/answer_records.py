"""What a replay says of right answers: which there are, how they are scored, and figures of each task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from kvscope.core.json_records import NotNegative, Number, Positive, about

ANSWERS = "answers.parquet"  # file of a replay that generated answers
USUAL = "any"  # where a dataset has answers and does not say how they are scored


@dataclass(frozen=True)
class AnswerSpan:
    """Where a right answer is in the text after a prompt."""

    start: Annotated[Number, about("position of its first token")]
    stop: Annotated[Positive, about("position after its last token")]

    def __post_init__(self) -> None:
        if self.stop <= self.start:
            raise ValueError(f"an answer from token {self.start} to {self.stop}")


@dataclass(frozen=True)
class ExampleRef:
    """A sequence whose right answers are known."""

    sequence: Annotated[Number, about("number of the sequence")]
    answers: Annotated[tuple[str, ...], about("right answers")]
    metric: Annotated[str, about("how an answer is scored: `exact`, `all`, `any`, `f1`, `rouge-l`")]
    spans: Annotated[
        tuple[AnswerSpan, ...],
        about(
            "answers in the text after the prompt, which the closed loop scores: every answer for `all`, otherwise "
            "the first"
        ),
    ] = ()
    id: Annotated[str | None, about("its name in the dataset", omit=True)] = None
    task: Annotated[str | None, about("its task", omit=True)] = None
    length: Annotated[Number | None, about("length for which it was made", omit=True)] = None
    depth: Annotated[NotNegative | None, about("depth of its fact in the prompt, 0 to 1", omit=True)] = None
    classes: Annotated[
        tuple[str, ...], about("classes from which an answer must choose, for the score `classification`", omit=True)
    ] = ()

    def __post_init__(self) -> None:
        if not self.answers:
            raise ValueError(f"sequence {self.sequence} has no answer")
