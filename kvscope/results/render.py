"""A comparison as other programs read it: Markdown for a job summary or a comment, JUnit XML for test reports."""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.etree import ElementTree as xml

from kvscope.results.decisions import Decisions, Moved
from kvscope.results.diff import Diff, DiffRow

MOST = 1000  # rows of a Markdown table: a job summary may have 1 MiB
MOVED = ("sequence", "layer", "kv_head", "key", "base", "new")
_COUNTED = (("tests", "testcase"), ("failures", "failure"))
UNNAMED = "Which ones cannot be said: of one side only the summary is there. Compare the replay folders."


def markdown(found: Diff) -> str:
    """Return a comparison as Markdown: the verdict, then tables of what is not the same, or of all if it is short.

    The table syntax is that of GitHub; whatever comes from names of policies and files is escaped.
    """
    rows = found.shown()
    lines = [f"### kvscope: {'regression' if found.regressed else 'no regression'}", ""]
    lines += [f"{_escape(found.base)} → {_escape(found.new)}. {found.verdict()}", ""]
    if rows:
        head = ("run", "metric", "base", "new", "change", "tolerance", "verdict")
        lines += _table(head, [_cells(row) for row in rows[:MOST]], numeric=(2, 3, 4, 5))
    if len(rows) > MOST:
        lines += [f"{len(rows) - MOST} more rows are not shown.", ""]
    for run in found.redecided:
        lines += [f"**{_escape(run.run)}**: {_escape(counted(run))}", ""]
        if run.first:
            lines += _table(MOVED, [moved_cells(moved) for moved in run.first], numeric=range(4))
    return "\n".join(lines).rstrip() + "\n"


def junit(found: Diff) -> str:
    """Return a comparison as JUnit XML: a suite for each run, a case for each metric and for the decisions.

    Elements and attributes are those that the schemas in use share: ``testsuites``, ``testsuite``, ``testcase`` and
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
                _case(suite, run, "decisions", "different", "" if decided.equal else counted(decided), decided.first)
    for part in (root, *root):
        count = {name: str(len(part.findall(f".//{tag}"))) for name, tag in _COUNTED}
        part.attrib |= count | {"errors": "0"}
    xml.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + xml.tostring(root, encoding="unicode") + "\n"


def counted(run: Decisions) -> str:
    """Return in words how many decisions of a run differ."""
    if run.equal:
        return "decisions are the same"
    if run.changed is None:
        return f"decisions differ. {UNNAMED}"
    return f"{run.changed:,} of {run.stays:,} stays of keys differ"


def moved_cells(moved: Moved) -> list[str]:
    """Return the cells of the columns `MOVED`."""
    return [str(moved.sequence), str(moved.layer), str(moved.kv_head), str(moved.key), *moved.words()]


def number(value: float | None, sign: bool = False) -> str:
    """Return a value with four digits, or a dash."""
    return "-" if value is None else f"{value:+.4f}" if sign else f"{value:.4f}"


def _cells(row: DiffRow) -> list[str]:
    return [row.run, row.metric, number(row.base), number(row.new), number(row.change, True), row.stated, row.verdict]


def _said(row: DiffRow) -> str:
    if row.verdict == "missing":
        return "is missing: the base has it, the new side does not"
    return f"went from {number(row.base)} to {number(row.new)} ({number(row.change, True)}; tolerance {row.stated})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int]) -> list[str]:
    rule = ["---:" if index in numeric else "---" for index in range(len(head))]
    cells = [[_escape(cell) for cell in row] for row in (head, *rows)]
    return [f"| {' | '.join(row)} |" for row in (cells[0], rule, *cells[1:])] + [""]


def _case(suite: xml.Element, run: str, name: str, verdict: str, failed: str, first: Sequence[Moved] = ()) -> None:
    case = xml.SubElement(suite, "testcase", classname=_printable(run), name=_printable(name), time="0")
    if failed:
        failure = xml.SubElement(case, "failure", message=_printable(failed), type=verdict)
        lines = [", ".join(f"{n} {v}" for n, v in zip(MOVED, moved_cells(moved), strict=True)) for moved in first]
        failure.text = _printable("\n".join([failed, *lines]))


def _escape(text: str) -> str:
    """Return text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_\[\]<>|~&$])", r"\\\1", " ".join(_printable(text).split()))


def _printable(text: str) -> str:
    """Return text without the characters that XML forbids."""
    return re.sub("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)
