"""A small sample of `tools/strings.py`, and that its judges see what they look for."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import escape

import pytest

from kvscope.report.template import DOCUMENT
from tools import strings

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[strings.Browser]:
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    opened = strings.Browser(CHROMIUM)
    yield opened
    opened.close()


def test_strings_of_every_kind() -> None:
    given = strings.hostile(200, 0)
    assert len({text for _, text in given}) == 200
    assert {kind for kind, _ in given} == set(strings.KINDS)
    assert given == strings.hostile(200, 0) != strings.hostile(200, 1)
    forms = {form for forms in strings.KINDS.values() for form in forms}
    assert forms <= {text for _, text in given}, "200 are enough for every form"


SAMPLE = [
    ("ANSI", "\x1b]0;title\x07\x9b31m"),
    ("surrogates", "\udc80\ud83d"),
    ("formulas", "\uff1d1+1"),
    ("CI commands", "xxxxxxxxxxxxxxxxxxx ::error::x ##[add-mask]y"),
]


@pytest.mark.parametrize(("kind", "text"), SAMPLE)
def test_a_string_is_text_wherever_it_is_printed(kind: str, text: str, tmp_path: Path) -> None:
    with contextlib.chdir(tmp_path), pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "40")
        found = list(strings.one_string(kind, text, "=1", tmp_path))
    assert [each for each in found if each.wrong] == []
    assert sum(each.outcome == "shown" for each in found) > 15


@pytest.mark.slow
def test_strings_are_text_in_a_page(browser: strings.Browser, tmp_path: Path) -> None:
    given = [(kind, forms[0]) for kind, forms in strings.KINDS.items()][: strings.ON_A_PAGE]
    for number, (_, text) in enumerate(given):
        strings.make(text, given[number - 1][1], tmp_path / str(number))
    found = list(strings.on_a_page(given, 0, tmp_path, browser))
    assert len(found) == 2 * strings.ON_A_PAGE
    assert [each for each in found if each.wrong] == []


PAGES = {
    f"<img src='x' onerror='{strings.RUN}'>": "element: <img",
    f"<iframe src='{strings.AWAY}'></iframe>": f"request: {strings.AWAY}",
    "<script>alert(1)</script>": "dialog: 1",
    f"<svg onload='{strings.RUN}'></svg>": "a string ran",
    f"<a href='{strings.AWAY}'>x</a>": "element: <a",
}


@pytest.mark.parametrize("markup", PAGES)
def test_a_page_that_does_something_is_found(browser: strings.Browser, tmp_path: Path, markup: str) -> None:
    """The page's own policy would stop some of it, so that it is opened without."""
    code = "document.documentElement.dataset.ready = 'yes'; const kvscope = { settled: async () => 0 }"
    made = DOCUMENT.format(
        policy="default-src *", generator="", title="", style="", data='{"runs": []}', plotly="", code=code
    )
    page = tmp_path / "page.html"
    page.write_text(made.replace('<div id="page">', f'<div id="page">{markup}'), encoding="utf-8")
    assert PAGES[markup] in browser.wrong(page, policy=False)


@pytest.mark.parametrize(
    ("said", "wrong"),
    [
        (strings.Said(0, "fine\n", "a note\n"), ""),
        (strings.Said(1, "", "error: x\nDo y.\n"), ""),
        (strings.Said(1, "", "error: x\n"), "not two lines"),
        (strings.Said(0, "a\x1b[31m", ""), "control characters"),
        (strings.Said(0, "", "\u202e"), "control characters"),
        (strings.Said(0, "a\n \u2003::error::x", ""), "a command of a CI system"),
        (strings.Said(0, "a ##[error]x", ""), "a command of a CI system"),
        (strings.Said(99, "", "Traceback (most recent call last):"), "Traceback"),
        (strings.Said(7, "", ""), "status 7"),
    ],
)
def test_what_a_terminal_would_not_merely_show_is_found(said: strings.Said, wrong: str) -> None:
    found = strings.wrong_on_a_terminal(said)
    assert wrong in found and bool(wrong) == bool(found)


def test_tables_and_documents_that_are_not_inert_are_found(tmp_path: Path) -> None:
    table = tmp_path / "runs.csv"
    for text, wrong in (('"a","b"\n"\'=1",-1.5e-3\n', ""), ('"a"\n"=1"\n', "a formula"), ('"a"\n1,2\n', "2 cells")):
        table.write_text(text)
        found = strings.wrong_in_tables(tmp_path)
        assert wrong in found and bool(wrong) == bool(found)
    name = escape("</testcase>")
    assert strings.wrong_in_junit(f"<testsuites><testsuite name='{name}'/></testsuites>") == ""
    assert "no XML" in strings.wrong_in_junit("<testsuites name='\x01'/>")
    assert "elements" in strings.wrong_in_junit("<testsuites><system-out/></testsuites>")
    assert strings.wrong_in_markdown("### a\n\n| a |\n|---|\n| \\[x\\](y) |\n") == ""
    for text in ("[x](y)", "<b>x</b>", "![x](y)", "`x`", "- x", "> x", "<https://a.b>"):
        assert strings.wrong_in_markdown(text)
