"""Tables of right answers: a row for each task, length, policy and budget."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from kvscope.cli.console import ALWAYS, Column, show_table

if TYPE_CHECKING:
    from kvscope.core.records import ReplayRecord
    from kvscope.core.summary_records import MetricSummary, RunSummary, TaskSummary

ALL = "all"  # tasks and lengths together
# Metric, header, digits, and `Column.keep`: how late the column is dropped on a narrow terminal.
_METRICS = (
    ("answer_score", "answer\nscore", 2, ALWAYS),
    ("answer_first", "answer\nfirst", 2, 97),
    ("answer_loss", "answer\nloss", 3, 96),
)


def show_tasks(runs: Sequence[RunSummary], replay: ReplayRecord) -> None:
    """Print the figures of right answers by task and length; nothing where no right answers are known."""
    from kvscope.core.summary_records import TaskSummary

    rows = [(run, task) for run in runs for task in run.tasks]
    if not rows:
        return
    order = list(dict.fromkeys((task.task, task.length) for _, task in rows))
    rows.sort(key=lambda row: order.index((row[1].task, row[1].length)))  # runs stay in order
    if len(order) > 1:
        rows += [(run, TaskSummary(ALL, None, run.metrics)) for run in runs if run.tasks]
    table = [
        Column("task", [task.task or "-" for _, task in rows], wrap=24),
        Column("length", [str(task.length or "-") for _, task in rows], numeric=True),
        Column("policy", [run.label for run, _ in rows], wrap=20),
        Column("budget", [str(run.budget or "-") for run, _ in rows], numeric=True),
    ]
    for name, header, digits, keep in _METRICS:
        if any(name in task.metrics for _, task in rows):
            cells = [cell(task.metrics.get(name), digits) for _, task in rows]
            table.append(Column(header, cells, keep=keep, numeric=True))
    table.append(Column("examples", [str(_examples(task)) for _, task in rows], keep=95, numeric=True))
    show_table(table, title="right answers", notes=_notes(rows, replay))


def _notes(rows: Iterable[tuple[RunSummary, TaskSummary]], replay: ReplayRecord) -> list[str]:
    """Return the lines under the table: what the columns are, and what could not be scored."""
    names = {name for _, task in rows for name in task.metrics}
    examples = replay.trace.examples
    lines = []
    if "answer_score" in names:
        metrics = ", ".join(sorted({example.metric for example in examples}))
        lines.append(f"Answer score: score of the text that the model generates after evictions, by {metrics}.")
    lines.append(
        "Answer first: share of examples in which every token of the right answer is the model's first choice under "
        "the policy, given the tokens of the trace; answer loss: mean loss of these tokens in nats."
    )
    without = sum(not example.spans for example in examples)
    if without:
        lines.append(
            f"{without} of {len(examples)} answers are not in the text after the prompt, so they have no loss: force "
            f"them with a continuation to measure it."
        )
    other = len(replay.trace.sequences) - len(examples)
    if other:
        lines.append(f"{other} of {len(replay.trace.sequences)} sequences have no right answers.")
    if any(value.low is not None for _, task in rows for value in _figures(task)):
        lines.append("Second line of a cell: 95 % interval over examples.")
    return lines


def cell(value: MetricSummary | None, digits: int) -> str:
    """Return a mean, and its interval in a second line where it has one."""
    if value is None or value.mean is None:
        return "-"
    text = f"{value.mean:.{digits}f}"
    if value.low is None or value.high is None:
        return text
    return f"{text}\n{value.low:.{digits}f}..{value.high:.{digits}f}"


def _figures(task: TaskSummary) -> list[MetricSummary]:
    return [task.metrics[name] for name, *_ in _METRICS if name in task.metrics]


def _examples(task: TaskSummary) -> int:
    return max((value.count or 0 for value in _figures(task)), default=0)
