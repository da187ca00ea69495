"""The page as a file: whole or absent, the same every time, and inert whatever it shows."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from kvscope.errors import ResultError, UsageError
from kvscope.report.encoding import visible, visible_token
from kvscope.report.page import ordered_panels, page_data, report
from kvscope.report.panel import PANELS, panel
from kvscope.report.source import Limits, ReportInput
from kvscope.report.template import asset, document, element_text, inert_json
from kvscope.results.store import Replay
from kvscope.trace.reader import Trace
from tests.report.make import make_replay, make_trace

HOSTILE = [
    "</script><img src=x onerror=alert(1)>",
    "<!--<script>",
    "\u2028\u2029 ",
    "\u202eevil\u202c",
    "\x00\x1b[31m\x7f\x85",
    "&lt;b&gt; \ufeff",
]


class Reader(HTMLParser):
    """Elements with their attributes, and the text of each script and style."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.title = ""
        self._open = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open = tag
        if tag in ("script", "style"):
            self.texts.append((tag, ""))

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open in ("script", "style"):
            tag, text = self.texts[-1]
            self.texts[-1] = (tag, text + data)
        elif self._open == "title":
            self.title += data


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_bytes().decode("utf-8"))
    reader.close()
    return reader


def carried(reader: Reader) -> Any:
    """Return the JSON that the page carries."""
    return json.loads(reader.texts[1][1])


@pytest.fixture(scope="module")
def page(trace: Trace, replay: Replay, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report([replay], {trace.identity: trace}, tmp_path_factory.mktemp("page") / "page.html")


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    trace = make_trace(folder / "trace", texts=HOSTILE, prompt_file=HOSTILE[0])
    labels = {"h2o": HOSTILE[0], "tova": HOSTILE[3], "window": "<a href=https://example.org>w</a>"}
    replay = make_replay(folder / "replay", trace, labels=labels, command=" ".join(HOSTILE))
    return report([replay], {trace.identity: trace}, folder / "page.html", title=HOSTILE[0] + HOSTILE[3])


def test_page_carries_every_panel_with_its_help(page: Path, source: ReportInput) -> None:
    data = carried(read(page))
    assert [each["name"] for each in data["panels"]] == [
        "summary",
        "budget-curve",
        "head-map",
        "residency",
        "provenance",
    ]
    assert data == json.loads(inert_json(page_data(source)))
    assert all(len(re.findall(r"[.](?: |$)", each["help"])) == 2 for each in data["panels"]), "two sentences each"


def test_every_panel_has_a_drawing(page: Path) -> None:
    code = read(page).texts[-1][1]
    for name in PANELS.names():
        assert f'kvscope.drawing("{name}", ' in code


@pytest.mark.parametrize("which", ["page", "hostile_page"])
def test_page_holds_only_the_elements_of_the_template(which: str, request: pytest.FixtureRequest) -> None:
    reader = read(request.getfixturevalue(which))
    tags = [tag for tag, _ in reader.elements]
    assert (
        tags
        == ["html", "head", "meta", "meta", "meta", "meta", "meta", "title", "style", "body", "noscript", "div"]
        + ["script"] * 3
    )
    for tag, attributes in reader.elements:
        assert not {"src", "href", "action", "srcset", "data"} & set(attributes), tag
        assert not [name for name in attributes if name.startswith("on")], tag


def test_style_loads_nothing(page: Path) -> None:
    style = next(text for tag, text in read(page).texts if tag == "style")
    assert "url(" not in style
    assert "@import" not in style


def test_own_scripts_fetch_nothing_and_make_no_html(page: Path) -> None:
    code = read(page).texts[-1][1]
    for word in ("http:", "https:", "//cdn", "fetch(", "XMLHttpRequest", "WebSocket", "import(", "sendBeacon"):
        assert word not in code, word
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
        assert word not in code, word
    assert "showSendToCloud: false" in code, "the plot library offers an upload of the chart unless told not to"


def test_security_policy_allows_these_scripts_and_no_network(page: Path) -> None:
    reader = read(page)
    policy = next(
        attributes["content"] or ""
        for tag, attributes in reader.elements
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    )
    rules = {rule.split()[0]: rule.split()[1:] for rule in policy.split(";")}
    scripts = [text for tag, text in reader.texts if tag == "script"][1:]
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    assert rules["default-src"] == rules["connect-src"] == rules["base-uri"] == rules["form-action"] == ["'none'"]
    assert rules["script-src"] == [f"'sha256-{digest}'" for digest in digests]
    assert rules["img-src"] == ["data:", "blob:"]
    assert "http" not in policy
    assert "unsafe-eval" not in policy


def test_hostile_text_is_carried_whole_and_visible(hostile_page: Path) -> None:
    reader = read(hostile_page)
    data = carried(reader)
    panels = {each["name"]: each["data"] for each in data["panels"]}
    assert panels["residency"]["sequences"]["0.0"]["tokens"] == [
        "</script><img␣src=x␣onerror=alert(1)>",
        "<!--<script>",
        "⟨U+2028⟩⟨U+2029⟩␣",
        "⟨U+202E⟩evil⟨U+202C⟩",
        "⟨U+0000⟩⟨U+001B⟩[31m⟨U+007F⟩⟨U+0085⟩",
        "&lt;b&gt;␣⟨U+FEFF⟩",
    ]
    assert data["title"] == reader.title == "</script><img src=x onerror=alert(1)>⟨U+202E⟩evil⟨U+202C⟩"
    assert data["labels"][1:] == [HOSTILE[0], "⟨U+202E⟩evil⟨U+202C⟩", "<a href=https://example.org>w</a>"]
    assert panels["provenance"]["sources"][1]["prompts"][0]["file"] == HOSTILE[0]


def test_raw_bytes_of_the_data_hold_no_mark(hostile_page: Path) -> None:
    text = read(hostile_page).texts[1][1]
    assert text.isascii()
    assert not set("<>&") & set(text)


def test_json_is_inert_and_comes_back() -> None:
    value = {"\u2028<": ["</script>", "<!--", "\ud800", "é"]}
    text = inert_json(value)
    assert text.isascii()
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == value
    with pytest.raises(ValueError, match="JSON"):
        inert_json(float("nan"))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("שלום", "שלום"),
        ("a\nb\tc\rd", "a↵b⇥c⟨U+000D⟩d"),
        ("\u200f\u2066x\u2069\u200b\u00ad", "⟨U+200F⟩⟨U+2066⟩x⟨U+2069⟩⟨U+200B⟩⟨U+00AD⟩"),
        ("\ud83d", "⟨U+D83D⟩"),
        ("naïve 😀", "naïve 😀"),
    ],
)
def test_nothing_hides_in_text(text: str, shown: str) -> None:
    assert visible(text) == shown
    assert visible(shown) == shown
    assert visible_token(f" {text}") == f"␣{shown}".replace(" ", "␣")


@pytest.mark.parametrize("script", ["x = '</SCRIPT >'", "if (a <!--b) c()"])
def test_a_script_that_would_end_its_element_is_refused(script: str) -> None:
    with pytest.raises(ValueError, match="a script of the page holds"):
        element_text(script)


def test_line_ends_are_those_a_browser_hashes() -> None:
    assert element_text("a\r\nb\rc\n") == "a\nb\nc\n"


def test_same_input_gives_the_same_bytes(page: Path, trace: Trace, replay: Replay, tmp_path: Path) -> None:
    again = report([Replay(replay.path, dict(replay.info))], {trace.identity: trace}, tmp_path / "elsewhere.html")
    assert again.read_bytes() == page.read_bytes()


def test_size_is_that_of_the_library_and_little_more(page: Path) -> None:
    assert 1_000_000 < page.stat().st_size < 7_000_000
    bare = document({"title": "", "generator": "", "panels": []}, [])
    assert page.stat().st_size - len(bare.encode()) < 100_000


def test_existing_page_stays_unless_forced(replay: Replay, empty: Path) -> None:
    empty.write_text("mine")
    with pytest.raises(ResultError, match="exists already") as caught:
        report([replay], {}, empty)
    assert "--force" in caught.value.todo
    assert empty.read_text() == "mine"
    report([replay], {}, empty, force=True)
    assert empty.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert [file.name for file in empty.parent.iterdir()] == ["page.html"]


def test_failed_panel_leaves_the_old_page(replay: Replay, empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty.write_text("mine")

    def broken(*_: object) -> str:
        raise RuntimeError("a defect")

    monkeypatch.setattr("kvscope.report.page.document", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        report([replay], {}, empty, force=True)
    assert empty.read_text() == "mine"


def test_folder_of_the_page_is_made(replay: Replay, tmp_path: Path) -> None:
    assert report([replay], {}, tmp_path / "new" / "deep" / "page.html").is_file()


def test_unwritable_place_is_an_error_with_advice(replay: Replay, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ResultError, match="cannot be written") as caught:
        report([replay], {}, file / "page.html")
    assert "folder" in caught.value.todo


def test_folder_as_output_is_an_error(replay: Replay, tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="is a folder"):
        report([replay], {}, tmp_path, force=True)


def test_no_replay_is_an_error(empty: Path) -> None:
    with pytest.raises(ResultError, match="no replay"):
        report([], {}, empty)
    assert not empty.exists()


def test_panel_that_needs_a_trace_says_that_it_is_absent(replay: Replay) -> None:
    each = next(iter(ordered_panels()))
    needy = type(each)(**{**each.__dict__, "needs": frozenset({"trace"})})
    shown = page_data(ReportInput((replay,)), panels=[needy])["panels"][0]
    assert shown["data"] is None
    assert shown["notes"][0].startswith("Not shown: the trace")


def test_limits_reach_the_page(trace: Trace, replay: Replay, empty: Path) -> None:
    report([replay], {trace.identity: trace}, empty, limits=Limits(raster_bytes=10))
    notes = {each["name"]: each["notes"] for each in carried(read(empty))["panels"]}
    assert notes["residency"][0].startswith("0 of 7 runs are shown, in 1 of 2 layers")


def test_panel_must_have_a_drawing_and_ask_for_what_there_is() -> None:
    with pytest.raises(UsageError, match="has no drawing"):
        panel("bare", title="", order=1, help="")(lambda source: {})
    with pytest.raises(UsageError, match="needs weather"):
        panel("odd", title="", order=1, needs={"weather"}, help="")(lambda source: {})
    assert not {"bare", "odd"} & set(PANELS.names())


def test_assets_are_in_the_package() -> None:
    assert ":focus-visible" in asset("page.css")
    assert "prefers-color-scheme" in asset("page.css")
    assert "@media print" in asset("page.css")
