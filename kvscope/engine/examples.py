"""The sequences of a trace whose right answers are known, and where these answers are in the text after the prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence

from kvscope.core.answer_records import USUAL, AnswerSpan, ExampleRef
from kvscope.core.text_spans import token_range
from kvscope.trace.prompt_parts import ExampleRecord
from kvscope.trace.reader import Trace

ALL = "all"  # the score that asks for every answer


def examples_of(trace: Trace) -> tuple[ExampleRef, ...]:
    """Return every sequence of a trace that has right answers."""
    found = []
    for number, sequence in enumerate(trace.record.sequences):
        if not sequence.answers:
            continue
        facts = sequence.example or ExampleRecord()
        metric = facts.metric or USUAL
        texts = [str(text) for text in trace.tokens(number)["text"]]
        spans = answer_spans(texts, sequence.prompt, sequence.answers, every=metric == ALL)
        answers = tuple(sequence.answers)
        own = {"id": facts.id, "task": facts.task, "length": facts.length, "depth": facts.depth}
        found.append(ExampleRef(number, answers, metric, spans, **own, classes=tuple(facts.classes)))  # type: ignore[arg-type]
    return tuple(found)


def answer_spans(texts: Sequence[str], prompt: int, answers: Sequence[str], *, every: bool) -> tuple[AnswerSpan, ...]:
    """Return the tokens of right answers after the prompt: of the one that comes first, or of every one.

    Case is ignored, and what follows an answer must not continue its last word. Nothing if no answer is there, or not
    every one where every one is asked for.

    Parameters
    ----------
    texts : sequence of str
        The text that each token of the sequence adds.
    prompt : int
        ``P``.
    answers : sequence of str
        Right answers.
    every : bool
        Whether all are asked for.
    """
    after, begins = "".join(texts[prompt:]), sum(map(len, texts[:prompt]))
    places = [re.search(re.escape(answer.strip()) + r"(?!\w)", after, re.IGNORECASE) for answer in answers]
    there = sorted((place.start(), place.end()) for place in places if place is not None and place.end())
    if not there or (every and len(there) < len(answers)):
        return ()
    ranges = (token_range(begins + start, begins + stop, texts) for start, stop in (there if every else there[:1]))
    return tuple(AnswerSpan(max(start, prompt), stop) for start, stop in ranges)
