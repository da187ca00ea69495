"""What other programs read: Markdown that renders, JUnit XML that test reporters accept."""

from pathlib import Path
from xml.etree import ElementTree as xml

import pytest
from markdown_it import MarkdownIt

from kvscope.core.summary_records import SUMMARY, SummaryRecord
from kvscope.results.baseline import load_summary
from kvscope.results.decisions import Decisions, ResidencyChange
from kvscope.results.diff import Diff, DiffRow, diff
from kvscope.results.render import MOST, junit, markdown
from tests.results.make import make

NASTY = "a|b `c` *d* <script>alert(1)</script> [e](f) \\ & ~g~ _h_\ni\x00\ud800"
VISIBLE = "a|b `c` *d* <script>alert(1)</script> [e](f) \\ & ~g~ _h_ i\\x00\\ud800"

# Attributes of each element that both Jenkins's schema (junit-10.xsd) and Ant's (JUnit.xsd) know, and those that one of
# them asks for. Ant's asks for the time and the machine of the run too, which would make two equal runs differ.
KNOWN = {
    "testsuites": ({"name", "time", "tests", "failures", "errors"}, set()),
    "testsuite": ({"name", "tests", "failures", "errors", "time"}, {"name", "tests", "failures", "errors", "time"}),
    "testcase": ({"classname", "name", "time"}, {"classname", "name", "time"}),
    "failure": ({"message", "type"}, {"type"}),
}
CHILD = {"testsuites": "testsuite", "testsuite": "testcase", "testcase": "failure"}


@pytest.fixture
def found(tmp_path: Path) -> Diff:
    base = load_summary(make(tmp_path / "base", [8]).path)
    data = SUMMARY.plain(base)
    data["runs"][0]["metrics"]["retained_mass"]["mean"] -= 0.25
    data["runs"][0]["metrics"]["output_error"]["mean"] -= 0.25
    data["runs"][1]["metrics"]["held_keys"]["mean"] = None
    new = SUMMARY.decode(data, tmp_path, SummaryRecord)
    return diff(base, new, decisions=True, sources=(str(tmp_path / "base"), "new"))


def cells(text: str) -> list[list[list[str]]]:
    """Return the tables of a Markdown text as a renderer shows them: rows of cells, the head first."""
    tables: list[list[list[str]]] = []
    for token in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text):
        if token.type == "table_open":
            tables.append([])
        elif token.type == "tr_open":
            tables[-1].append([])
        elif token.type == "inline" and tables and token.level > 2:
            assert all(child.type in ("text", "text_special", "entity") for child in token.children or ()), token
            tables[-1][-1].append("".join(child.content for child in token.children or ()))
    return tables


def test_the_markdown_table_renders(found: Diff) -> None:
    text = markdown(found)
    (table,) = cells(text)
    assert table[0] == ["run", "metric", "base", "new", "change", "tolerance", "verdict"]
    assert {len(row) for row in table} == {7}
    assert len(table) == 1 + len(found.rows)
    (worse,) = [row for row in table if row[-1] == "worse"]
    assert worse[:2] == ["h2o 50% stream open", "retained_mass"]
    assert worse[4:6] == ["-0.2500", "0.001"]
    assert text.startswith("### kvscope: regression\n\n")
    assert found.verdict() in text


def test_names_cannot_break_the_markdown_nor_the_xml() -> None:
    row = DiffRow(NASTY, NASTY, 1.0, 0.5, -0.5, 0.1, "0.1", "worse")
    moved = ResidencyChange(0, 1, 2, 3, 4, base=(3, None), new=(3, 4))
    found = Diff(NASTY, NASTY, [row], [Decisions(NASTY, False, 1, 9, [moved])])
    first, second = cells(markdown(found))
    assert first[1][:2] == [VISIBLE, VISIBLE]
    assert second[1] == ["0", "1", "2", "3", "retained", "evicted at 4"]
    html = MarkdownIt("commonmark").enable("table").render(markdown(found))
    assert "<script" not in html and html.count("<table>") == 2
    root = xml.fromstring(junit(found).encode())
    assert root[0].get("name", "").startswith("a|b `c` *d* <script>")


def test_a_long_table_is_cut_and_says_so() -> None:
    rows = [DiffRow(f"run {index}", "m", 1.0, 0.5, -0.5, 0.1, "0.1", "worse") for index in range(MOST + 7)]
    text = markdown(Diff("a", "b", rows))
    assert len(cells(text)[0]) == 1 + MOST
    assert "7 more rows are not shown." in text
    assert len(text.encode()) < 2**20, "a job summary may have 1 MiB"


def check(element: xml.Element) -> None:
    known, needed = KNOWN[element.tag]
    assert needed <= element.attrib.keys() <= known, element.tag
    assert {child.tag for child in element} <= {CHILD.get(element.tag)}
    for child in element:
        check(child)
    if element.tag in ("testsuites", "testsuite"):
        assert element.get("tests") == str(len(list(element.iter("testcase"))))
        assert element.get("failures") == str(len(list(element.iter("failure"))))


def test_junit_has_the_form_that_test_reporters_know(found: Diff) -> None:
    root = xml.fromstring(junit(found).encode())
    assert root.tag == "testsuites"
    check(root)
    assert [suite.get("name") for suite in root] == ["h2o 50% stream open", "tova 50% stream open"]
    cases = {(case.get("classname", "").split()[0], case.get("name")): case for case in root.iter("testcase")}
    assert len(cases) == len(found.rows) + 2
    failed = {place: case[0] for place, case in cases.items() if len(case)}
    assert failed.keys() == {("h2o", "retained_mass"), ("tova", "held_keys")}
    assert failed["h2o", "retained_mass"].get("type") == "worse"
    assert "-0.2500; tolerance 0.001" in failed["h2o", "retained_mass"].get("message", "")
    assert "missing" in failed["tova", "held_keys"].get("message", "")


def test_junit_names_the_evictions_that_changed() -> None:
    row = DiffRow("h2o", "m", 1.0, 1.0, 0.0, 0.1, "0.1", "same")
    moved = ResidencyChange(0, 1, 2, 3, 4, base=(3, 9), new=(3, 4))
    root = xml.fromstring(junit(Diff("a", "b", [row], [Decisions("h2o", False, 1, 9, [moved])])).encode())
    check(root)
    (failure,) = root.iter("failure")
    assert failure.get("type") == "different"
    assert failure.get("message") == "1 of 9 residency intervals differ"
    assert "layer 1, kv_head 2, key 3, base evicted at 9, new evicted at 4" in (failure.text or "")
    root = xml.fromstring(junit(Diff("a", "b", [row], [Decisions("h2o", False)])).encode())
    assert "has only a summary" in next(root.iter("failure")).get("message", "")
