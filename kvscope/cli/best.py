"""The best policies of each kind at each budget, above the summary table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvscope.cli.console import ALWAYS, Column, show_table

if TYPE_CHECKING:
    from kvscope.core.summary_records import SummaryRecord
    from kvscope.results.ranking import Best

# Metric: header, and `Column.keep`.
HEADERS = {
    "answer_score": ("answers", ALWAYS),
    "perplexity_ratio": ("perplexity,\nratio to full", ALWAYS),
    "output_error": ("output\nerror", 90),
    "late_mass_retained": ("late\nmass", 80),
    "retained_mass": ("retained\nmass", ALWAYS),
}
MOST = 2  # labels in a cell; of more the number is given


def show_best(summary: SummaryRecord) -> None:
    """Print the best of each kind by each metric, and where the metrics disagree; nothing without competitors."""
    from kvscope.results.ranking import best_of

    found = best_of(summary.runs, summary.metrics)
    if found:
        show_table(columns(found), title="best policy", notes=notes(found))


def columns(found: Sequence[Best]) -> list[Column]:
    """Return the columns: budget, kind, number of policies, and the best by each metric that any line has."""
    named = {name: about for name, about in HEADERS.items() if any(name in best.winners for best in found)}
    return [
        Column("budget", [best.budget for best in found], numeric=True),
        Column("kind", [best.kind for best in found], wrap=10),
        Column("of", [str(best.count) for best in found], numeric=True),
        # Not wrapped: a line that begins with a part of a label could be a command of a CI system.
        *(Column(header, [_cell(best, name) for best in found], keep) for name, (header, keep) in named.items()),
    ]


def notes(found: Sequence[Best]) -> list[str]:
    """Return the lines under the table."""
    lines = ["Policies are ranked within a kind, because kinds hold and read different numbers of keys at one budget."]
    apart = [f"{best.budget} ({best.kind})" for best in found if not best.agree]
    if apart:
        lines.append(f"The metrics disagree at {', '.join(apart)}: no policy is the best by every metric.")
    return lines


def _cell(best: Best, name: str) -> str:
    """Return the value and who has it; ``-`` where the metric does not tell the policies apart."""
    if name not in best.winners:
        return "-"
    value, labels = best.winners[name]
    who = ", ".join(labels) if len(labels) <= MOST else f"{len(labels)} policies"
    return f"{value:.3f} {who}"
