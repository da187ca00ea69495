"""The best policies of each kind at each budget, above the summary table."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap
from typing import TYPE_CHECKING

from kvscope.cli.console import GAP, Column, show_table, stdout

if TYPE_CHECKING:
    from kvscope.core.summary_records import SummaryRecord
    from kvscope.results.ranking import Best

HEADERS = {
    "answer_score": "answers",
    "perplexity_ratio": "perplexity,\nratio to full",
    "output_error": "output\nerror",
    "late_mass_retained": "late\nmass",
    "retained_mass": "retained\nmass",
}
MIN_LABEL = 12  # characters of a label that are on one line at least
MOST = 2  # labels in a cell; of more the number is given


def show_best(summary: SummaryRecord) -> None:
    """Print the best of each kind by each metric, and where the metrics disagree; nothing without competitors."""
    from kvscope.results.ranking import best_of

    found = best_of(summary.runs, summary.metrics)
    if found:
        across, width = columns(found), stdout().width
        fits = sum(column.width() for column in across) - GAP <= width
        show_table(across if fits else lines(found, width), title="best policy", notes=notes(found))


def columns(found: Sequence[Best]) -> list[Column]:
    """Return the columns: budget, kind, number of policies, and the best by each metric that any line has."""
    return [
        Column("budget", [best.budget for best in found], numeric=True),
        Column("kind", [best.kind for best in found], wrap=10),
        Column("of", [str(best.count) for best in found], numeric=True),
        *(Column(HEADERS[name], [" ".join(_cell(best, name)).rstrip() for best in found]) for name in _metrics(found)),
    ]


def lines(found: Sequence[Best], width: int) -> list[Column]:
    """Return the columns of a table for a narrow terminal, with a line for each metric.

    A line never begins with a part of a label, which could be a command of a CI system.
    """
    metrics = _metrics(found)
    cells = [_cell(best, name) for best in found for name in metrics]
    table = [
        Column("budget", _first(metrics, [best.budget for best in found]), numeric=True),
        Column("kind", _first(metrics, [best.kind for best in found])),
        Column("of", _first(metrics, [str(best.count) for best in found]), numeric=True),
        Column("by", [HEADERS[name].replace("\n", " ") for name in metrics] * len(found)),
        Column("best", [value for value, _ in cells], numeric=True),
    ]
    room = max(MIN_LABEL, width - sum(column.width() for column in table))
    return [*table, Column("policy", ["\n".join(wrap(who, room, subsequent_indent="… ")) for _, who in cells])]


def _metrics(found: Sequence[Best]) -> list[str]:
    return [name for name in HEADERS if any(name in best.winners for best in found)]


def _first(metrics: Sequence[str], values: Sequence[str]) -> list[str]:
    """Return the cells of a column whose values are shown in the first of the lines for the metrics."""
    return [value if name == metrics[0] else "" for value in values for name in metrics]


def notes(found: Sequence[Best]) -> list[str]:
    """Return the lines under the table."""
    lines = ["Policies are ranked within a kind, because kinds hold and read different numbers of keys at one budget."]
    apart = [f"{best.budget} ({best.kind})" for best in found if not best.agree]
    if apart:
        lines.append(f"The metrics disagree at {', '.join(apart)}: no policy is the best by every metric.")
    return lines


def _cell(best: Best, name: str) -> tuple[str, str]:
    """Return the value and who has it; ``-`` where the metric does not tell the policies apart."""
    if name not in best.winners:
        return "-", ""
    value, labels = best.winners[name]
    who = ", ".join(labels) if len(labels) <= MOST else f"{len(labels)} policies"
    return f"{value:.3f}", who
