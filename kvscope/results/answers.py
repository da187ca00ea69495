"""Whether policies give right answers: losses of the answers, and scores of what is generated, by task and length."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvscope.core.answer_records import ExampleRef
from kvscope.core.records import MetricRecord
from kvscope.core.summary_records import MetricSummary, TaskSummary
from kvscope.results.statistics import interval

Array = NDArray[Any]
SCORE = "answer_score"
OF_ANSWERS: dict[str, MetricRecord] = {
    SCORE: MetricRecord(
        "higher", (0, 1), summary="Score of what the model generates under the policy, by the metric of each task."
    ),
    "answer_first": MetricRecord(
        "higher", (0, 1), summary="Share of examples in which every token of the answer is the policy's first choice."
    ),
    "answer_loss": MetricRecord(
        "lower",
        (0, None),
        unit="nats",
        summary="Loss of the tokens of the answer under the policy, mean over examples.",
    ),
}
Task = tuple[str | None, int | None]  # name and length


class Answers:
    """Collects values of every example as they are written or read, and forms their means.

    Parameters
    ----------
    examples : sequence of ExampleRef
        The sequences whose right answers are known.
    near_copies : sequence of int
        Cluster of every sequence; empty if each is its own.
    """

    def __init__(self, examples: Sequence[ExampleRef], near_copies: Sequence[int] = ()) -> None:
        self._near_copies = near_copies
        self._examples = {example.sequence: example for example in examples}
        # run -> metric -> sequence -> value
        self._values: dict[int, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))

    def add_losses(self, run: int, sequence: int, position: Array, values: Mapping[str, Array]) -> None:
        """Take the losses of the scored tokens ``[S]`` of a sequence; those of an answer count."""
        example = self._examples.get(sequence)
        tokens = [token for span in example.spans for token in range(span.start, span.stop)] if example else []
        of_answer = np.isin(position, tokens)
        if not tokens or int(of_answer.sum()) < len(set(tokens)):
            return
        found = self._values[run]
        found["answer_first"][sequence] = float(values["top1_correct"][of_answer].all())
        found["answer_loss"][sequence] = float(values["nll_policy"][of_answer].mean(dtype=np.float64))

    def add_score(self, run: int, sequence: int, score: float) -> None:
        """Take the score of what was generated after the prompt of a sequence."""
        self._values[run][SCORE][sequence] = score

    def of(self, run: int) -> dict[str, MetricSummary]:
        """Return the mean of every metric over all examples, with its 95 % bootstrap interval over them."""
        return self._means(run, self._examples)

    def by_task(self, run: int) -> tuple[TaskSummary, ...]:
        """Return the same for each task and length, in the order of the examples; nothing for an open run."""
        if run not in self._values:
            return ()
        groups: dict[Task, list[int]] = defaultdict(list)
        for example in self._examples.values():
            groups[example.task, example.length].append(example.sequence)
        return tuple(TaskSummary(*task, self._means(run, sequences)) for task, sequences in groups.items())

    def by_sequence(self, run: int) -> dict[str, dict[int, float]]:
        """Return the value of every example that has one, by metric."""
        return {name: dict(of) for name, of in self._values[run].items()} if run in self._values else {}

    @property
    def metrics(self) -> dict[str, MetricRecord]:
        """The metrics that have a value, as they declare themselves."""
        there = {name for of_run in self._values.values() for name in of_run}
        return {name: record for name, record in OF_ANSWERS.items() if name in there}

    def _means(self, run: int, sequences: Iterable[int]) -> dict[str, MetricSummary]:
        found, chosen = {}, list(sequences)
        for name in OF_ANSWERS if run in self._values else ():
            of = self._values[run].get(name, {})
            there = [sequence for sequence in chosen if sequence in of]
            values = np.array([of[sequence] for sequence in there])
            clusters = [self._near_copies[sequence] for sequence in there] if self._near_copies else ()
            if there:
                found[name] = MetricSummary(float(values.mean()), *interval(values, clusters=clusters), len(values))
        return found
