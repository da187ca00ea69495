"""Formats of a comparison: Markdown for a job summary or a comment, JUnit XML for test reports."""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.etree import ElementTree as xml

from kvscope.core.printable import printable
from kvscope.results.decisions import Decisions, ResidencyChange
from kvscope.results.diff import Diff, DiffRow

MOST = 1000  # rows of a Markdown table: a job summary is limited to 1 MiB
CHANGE_COLUMNS = ("sequence", "layer", "kv_head", "key", "base", "new")
_COUNTED = (("tests", "testcase"), ("failures", "failure"))
UNNAMED = "One side has only a summary; compare the replay folders to list the differences."


def markdown(found: Diff) -> str:
    """Return a comparison as Markdown: the verdict, then a table of changed values, or of all if there are few.

    Tables use the syntax of GitHub; names of policies and files are escaped.
    """
    rows = found.shown()
    lines = [f"### kvscope: {'regression' if found.regressed else 'no regression'}", ""]
    lines += [f"{escape_markdown(found.base)} → {escape_markdown(found.new)}. {found.verdict()}", ""]
    if rows:
        head = ("run", "metric", "base", "new", "change", "tolerance", "verdict")
        lines += _table(head, [_cells(row) for row in rows[:MOST]], numeric=(2, 3, 4, 5))
    if len(rows) > MOST:
        lines += [f"{len(rows) - MOST} more rows are not shown.", ""]
    for run in found.changed_decisions:
        lines += [f"**{escape_markdown(run.run)}**: {escape_markdown(change_count(run))}", ""]
        if run.first:
            lines += _table(CHANGE_COLUMNS, [change_cells(change) for change in run.first], numeric=range(4))
    return "\n".join(lines).rstrip() + "\n"


def junit(found: Diff) -> str:
    """Return a comparison as JUnit XML: a suite for each run, a case for each metric and for the decisions.

    Only elements and attributes that all JUnit schemas share are used: ``testsuites``, ``testsuite``, ``testcase`` and
    ``failure``. The times are 0: nothing is timed.
    """
    root = xml.Element("testsuites", name="kvscope diff", time="0")
    for run in dict.fromkeys(row.run for row in found.rows):
        suite = xml.SubElement(root, "testsuite", name=_printable(run), time="0")
        for row in found.rows:
            if row.run == run:
                failed = f"{row.metric} {_said(row)}" if row.fails else ""
                _case(suite, run, row.metric, row.verdict, failed)
        for decided in found.decisions or ():
            if decided.run == run:
                _case(
                    suite, run, "decisions", "different", "" if decided.equal else change_count(decided), decided.first
                )
    for part in (root, *root):
        count = {name: str(len(part.findall(f".//{tag}"))) for name, tag in _COUNTED}
        part.attrib |= count | {"errors": "0"}
    xml.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + xml.tostring(root, encoding="unicode") + "\n"


def change_count(run: Decisions) -> str:
    """Return a sentence on how many residency intervals of a run differ."""
    if run.equal:
        return "decisions are the same"
    if run.changed is None:
        return f"decisions differ. {UNNAMED}"
    return f"{run.changed:,} of {run.stays:,} residency intervals differ"


def change_cells(change: ResidencyChange) -> list[str]:
    """Return the cells of the columns `CHANGE_COLUMNS`."""
    return [str(change.sequence), str(change.layer), str(change.kv_head), str(change.key), *change.words()]


def number(value: float | None, sign: bool = False) -> str:
    """Return a value with four digits, or a dash."""
    return "-" if value is None else f"{value:+.4f}" if sign else f"{value:.4f}"


def _cells(row: DiffRow) -> list[str]:
    return [row.run, row.metric, number(row.base), number(row.new), number(row.change, True), row.stated, row.verdict]


def _said(row: DiffRow) -> str:
    if row.verdict == "missing":
        return "is missing in the new replay"
    return f"changed from {number(row.base)} to {number(row.new)} ({number(row.change, True)}; tolerance {row.stated})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int]) -> list[str]:
    rule = ["---:" if index in numeric else "---" for index in range(len(head))]
    cells = [[escape_markdown(cell) for cell in row] for row in (head, *rows)]
    return [f"| {' | '.join(row)} |" for row in (cells[0], rule, *cells[1:])] + [""]


def _case(
    suite: xml.Element, run: str, name: str, verdict: str, failed: str, first: Sequence[ResidencyChange] = ()
) -> None:
    case = xml.SubElement(suite, "testcase", classname=_printable(run), name=_printable(name), time="0")
    if failed:
        failure = xml.SubElement(case, "failure", message=_printable(failed), type=verdict)
        lines = [
            ", ".join(f"{n} {v}" for n, v in zip(CHANGE_COLUMNS, change_cells(change), strict=True)) for change in first
        ]
        failure.text = _printable("\n".join([failed, *lines]))


def escape_markdown(text: str) -> str:
    """Return text escaped for Markdown, on one line."""
    return re.sub(r"([\\`*_\[\]<>|~&$])", r"\\\1", " ".join(_printable(text).split()))


def _printable(text: str) -> str:
    """Return text without the characters that XML forbids, or that a terminal or a CI system takes for commands."""
    return re.sub("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", printable(text))
