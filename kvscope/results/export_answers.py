"""Tables of right answers for an export: every example under every closed run, and means by task and length."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pyarrow as pa

from kvscope.core.answer_records import ANSWERS
from kvscope.core.printable import encodable
from kvscope.core.records import RunRecord
from kvscope.results.answers import OF_ANSWERS, SCORE
from kvscope.results.store import Replay
from kvscope.results.stream import by_sequence

EXAMPLES, TASKS = "examples", "tasks"  # names of the tables


def _field(name: str, kind: pa.DataType, about: str) -> pa.Field:
    return pa.field(name, kind, metadata={"about": about})


RUN = _field("run", pa.int32(), "number of the run")
TASK = (
    _field("task", pa.string(), "task of the example; null where the dataset names none"),
    _field("length", pa.int64(), "length that the example was made for"),
)
EXAMPLE = [
    RUN,
    _field("sequence", pa.int32(), "number of the sequence"),
    _field("id", pa.string(), "name of the example in its dataset"),
    *TASK,
    _field("depth", pa.float64(), "where its fact is in the prompt, 0 to 1"),
    _field("answers", pa.string(), "right answers, as a JSON list"),
    _field("scored_by", pa.string(), "how an answer is scored"),
    _field("tokens", pa.int64(), "tokens that were generated"),
    _field("text", pa.string(), "what the model generated under the policy; null where nothing was generated"),
]


def answer_tables(replay: Replay) -> dict[str, Iterator[pa.Table]]:
    """Return the tables ``examples`` and ``tasks`` of a replay, in pieces; none without right answers.

    ``examples`` has every example under every closed run, with what the model says and all metrics; ``tasks`` has
    the means of each task and length with intervals.
    """
    closed = [run for run in replay.info.runs if run.loop == "closed"]
    if not closed or not replay.info.trace.examples:
        return {}
    return {EXAMPLES: (_examples(replay, run) for run in closed), TASKS: iter([_tasks(replay)])}


def _examples(replay: Replay, run: RunRecord) -> pa.Table:
    """Return every example under one run: what it is, what the model says, and the value of every metric."""
    metrics = list(replay.summary.metrics)
    scored = [name for name in metrics if name != SCORE or ANSWERS in replay.info.sizes]
    values = by_sequence(replay, [run.run], scored)
    said = {}
    if ANSWERS in replay.info.sizes:
        frame = replay.answers(run.run)
        parts = (frame[name].tolist() for name in ("sequence", "tokens", "text"))
        said = {sequence: (tokens, text) for sequence, tokens, text in zip(*parts, strict=True)}
    rows = []
    for example in replay.info.trace.examples:
        tokens, text = said.get(example.sequence, (None, None))
        name, task = (None if one is None else encodable(one) for one in (example.id, example.task))
        answers = json.dumps(example.answers)
        facts = (run.run, example.sequence, name, task, example.length, example.depth, answers, example.metric)
        rows.append((*facts, tokens, text, *(values[run.run, each].get(example.sequence) for each in scored)))
    schema = pa.schema([*EXAMPLE, *(pa.field(name, pa.float64()) for name in scored)])
    columns = [pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), schema, strict=True)]
    return pa.Table.from_arrays(columns, schema=schema)


def _tasks(replay: Replay) -> pa.Table:
    """Return a row for each run, task and length: mean, interval and count of every metric of answers."""
    names = [name for name in OF_ANSWERS if name in replay.summary.metrics]
    parts = {"": pa.float64(), "_low": pa.float64(), "_high": pa.float64(), "_count": pa.int64()}
    fields = [pa.field(name + part, kind) for name in names for part, kind in parts.items()]
    schema = pa.schema([RUN, *TASK, *fields])
    rows: list[list[object]] = []
    for run in replay.summary.runs:
        for task in run.tasks:
            row: list[object] = [run.run, None if task.task is None else encodable(task.task), task.length]
            for name in names:
                found = task.metrics.get(name)
                row += [None] * 4 if found is None else [found.mean, found.low, found.high, found.count]
            rows.append(row)
    columns = [pa.array([row[at] for row in rows], field.type) for at, field in enumerate(schema)]
    return pa.Table.from_arrays(columns, schema=schema)
