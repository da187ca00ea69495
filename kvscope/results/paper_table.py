"""The summary of a replay as a table for a paper or a page: Markdown or LaTeX, intervals, the best in bold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvscope.core.latex import escape_latex
from kvscope.core.near_copies import copies_note
from kvscope.core.summary_records import RunSummary, SummaryRecord
from kvscope.results.render import escape_markdown

# Metrics that are shown where the replay has them, and their digits.
DIGITS = {
    "held_keys": 1,
    "retained_mass": 3,
    "ideal_cosine": 3,
    "output_error": 3,
    "perplexity": 3,
    "token_kl": 3,
    "top1_agreement": 3,
}


@dataclass(frozen=True)
class PaperTable:
    """A table in plain text: the names of its columns, its cells, which are bold, and a sentence under it."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    bold: frozenset[tuple[int, int]]
    note: str


def paper_table(summary: SummaryRecord) -> PaperTable:
    """Return a row for every run and a column for every metric of `DIGITS` that the summary has.

    A cell is the mean and, where there is one, its 95 % interval. The best of the runs with one budget, prefill and
    loop is bold, on the mean as it is shown; runs that evict nothing and bounds, which use later rows, are no rivals.
    """
    names = [name for name in DIGITS if any(run.mean(name) is not None for run in summary.runs)]
    rows = [[run.label, run.budget or "-", run.loop, *(_cell(run, name) for name in names)] for run in summary.runs]
    bold = frozenset((row, 3 + column) for column, name in enumerate(names) for row in _best(summary, name))
    kinds = sorted({f"{run.prefill} prefill" for run in summary.runs})
    note = (
        f"{', '.join(kinds)}; {len(summary.trace.sequences)} sequences of {summary.trace.model or 'an unknown model'}"
    )
    note += "; 95 % bootstrap intervals over sequences in brackets; the best of each budget and loop in bold"
    copies = copies_note(summary.trace.near_copies)
    return PaperTable(["policy", "budget", "loop", *names], rows, bold, f"{note}; {copies}." if copies else f"{note}.")


def as_markdown(table: PaperTable) -> str:
    """Return the table in the syntax of GitHub."""
    rows = _rows(table, escape_markdown, "**{}**")
    rule = ["---"] + ["---:"] * (len(table.head) - 1)
    lines = [f"| {' | '.join(row)} |" for row in ([escape_markdown(name) for name in table.head], rule, *rows)]
    return "\n".join([*lines, "", escape_markdown(table.note)]) + "\n"


def as_latex(table: PaperTable) -> str:
    """Return the table for LaTeX with the package ``booktabs``."""
    lines = [f"\\begin{{tabular}}{{l{'r' * (len(table.head) - 1)}}}", "\\toprule"]
    lines += [" & ".join(escape_latex(name) for name in table.head) + r" \\", "\\midrule"]
    lines += [" & ".join(row) + r" \\" for row in _rows(table, escape_latex, "\\textbf{{{}}}")]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", f"% {table.note}"]) + "\n"


def _rows(table: PaperTable, escape: Callable[[str], str], bold: str) -> list[list[str]]:
    return [
        [
            bold.format(escape(cell)) if (row, column) in table.bold else escape(cell)
            for column, cell in enumerate(cells)
        ]
        for row, cells in enumerate(table.rows)
    ]


def _cell(run: RunSummary, name: str) -> str:
    value, digits = run.metrics.get(name), DIGITS[name]
    if value is None or value.mean is None:
        return "-"
    mean = f"{value.mean:.{digits}f}"
    return mean if value.low is None else f"{mean} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


def _best(summary: SummaryRecord, name: str) -> list[int]:
    """Return the rows whose mean is the best of their budget, prefill and loop; none where there is one rival only."""
    direction = summary.metrics[name].direction
    if direction == "none":
        return []
    groups: dict[tuple[str | None, str, str], dict[int, float]] = {}
    for row, run in enumerate(summary.runs):
        mean = run.mean(name)
        if mean is not None and run.count("retained_mass") and not run.clairvoyant:
            group = groups.setdefault((run.budget, run.prefill, str(run.loop)), {})
            group[row] = round(mean, DIGITS[name])
    best = max if direction == "higher" else min
    return [
        row
        for group in groups.values()
        if len(group) > 1
        for row, mean in group.items()
        if mean == best(group.values())
    ]
