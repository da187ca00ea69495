"""The page as a file: whole or absent, the same every time, and inert whatever it shows."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import zlib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plotly.offline import get_plotlyjs

from kvscope.core.errors import OutputExists, ResultError, UsageError
from kvscope.report.encoding import packed, packed_floats, packed_halves, unpacked, visible, visible_token
from kvscope.report.limits import Limits
from kvscope.report.page import ordered_panels, page_data, report, report_data
from kvscope.report.panel import PANELS, panel
from kvscope.report.source import ReportInput
from kvscope.report.template import asset, charts_on_demand, document, element_text, inert_json
from kvscope.results.store import Replay, open_replay
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
        "overview",
        "budget-curve",
        "over-time",
        "head-map",
        "residency",
        "text",
        "regrets",
        "inspector",
        "agreement",
        "provenance",
    ]
    assert data == json.loads(inert_json(page_data(source)))


def test_progress_is_told_after_every_panel(replay: Replay, trace: Trace, source: ReportInput, empty: Path) -> None:
    made = [panel for panel in ordered_panels() if panel.needs <= source.offers]
    expected = [number / len(made) for number in range(1, len(made) + 1)]
    for write in (report, report_data):
        told: list[float] = []
        write([replay], {trace.identity: trace}, empty, force=True, progress=told.append)
        assert told == expected


def test_every_panel_explains_itself_in_a_few_sentences(rich: ReportInput, gated: ReportInput) -> None:
    quantised = ReportInput((open_replay(Path(__file__).parents[2] / "reports" / "example-quantised"),))
    panels = [panel for source in (rich, gated, quantised) for panel in page_data(source)["panels"]]
    assert {each["name"] for each in panels} == set(PANELS.names())
    assert all(2 <= len(re.findall(r"[.](?: |$)", each["help"])) <= 4 for each in panels)


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


def test_only_the_call_that_prepares_all_charts_is_changed_in_the_script_of_plotly() -> None:
    original = get_plotlyjs()
    changed = charts_on_demand(original)
    assert changed != original and changed.count(".registerCharts=()=>") == 1
    assert re.sub(r"(\w+)\.registerCharts=\(\)=>\1\.register", r"\1.register", changed) == original
    assert charts_on_demand("x.register([a(),b()])") == "x.register([a(),b()])", "no list of all charts"


def test_security_policy_allows_these_scripts_and_no_network(page: Path) -> None:
    reader = read(page)
    policy = next(
        attributes["content"] or ""
        for tag, attributes in reader.elements
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    )
    rules = {rule.split()[0]: rule.split()[1:] for rule in policy.split(";")}
    _, plotly, code = (text for tag, text in reader.texts if tag == "script")
    scripts = [zlib.decompress(base64.b64decode(plotly)).decode(), code]
    assert scripts[0] == charts_on_demand(get_plotlyjs())
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
    assert data["parts"]["0.0"]["tokens"] == [
        "</script><img␣src=x␣onerror=alert(1)>",
        "<!--<script>",
        "⟨U+2028⟩⟨U+2029⟩␣",
        "⟨U+202E⟩evil⟨U+202C⟩",
        "⟨U+0000⟩⟨U+001B⟩[31m⟨U+007F⟩⟨U+0085⟩",
        "&lt;b&gt;␣⟨U+FEFF⟩",
    ]
    assert data["title"] == reader.title == "</script><img src=x onerror=alert(1)>⟨U+202E⟩evil⟨U+202C⟩"
    assert set(data["labels"]) == {"full", HOSTILE[0], "⟨U+202E⟩evil⟨U+202C⟩", "<a href=https://example.org>w</a>"}
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


@pytest.mark.parametrize(
    ("values", "dtype"),
    [([], "uint8"), ([0, 255], "uint8"), ([-1, 255], "int16"), ([0, 65535], "uint16"), ([-1, 65535], "int32")],
)
def test_integers_are_packed_as_small_as_they_fit(values: list[int], dtype: str) -> None:
    value = packed(np.array(values, np.int64))
    assert value["dtype"] == dtype
    assert unpacked(value).tolist() == values


def test_packed_floats_keep_shape_ends_and_gaps() -> None:
    values = np.array([[0.25, np.nan, 0.75], [0.5, 0.3, 0.25]])
    value = packed_floats(values)
    assert (value["low"], value["high"], value["shape"]) == (0.25, 0.75, [2, 3])
    np.testing.assert_allclose(unpacked(value), values, atol=0.5 / 65534)
    assert unpacked(packed_floats(np.full(3, 7.0))).tolist() == [7.0] * 3
    assert np.isnan(unpacked(packed_floats(np.full(2, np.nan)))).all()


def test_packed_halves_are_exact() -> None:
    values = np.array([0, 6e-8, 0.1, 1, 65504], np.float16)
    np.testing.assert_array_equal(unpacked(packed_halves(values)), values)


def test_same_input_gives_the_same_bytes(page: Path, trace: Trace, replay: Replay, tmp_path: Path) -> None:
    again = report([Replay(replay.path, replace(replay.info))], {trace.identity: trace}, tmp_path / "elsewhere.html")
    assert again.read_bytes() == page.read_bytes()


def test_size_is_that_of_the_library_and_little_more(page: Path) -> None:
    assert 1_000_000 < page.stat().st_size < 2_500_000
    bare = document({"title": "", "generator": "", "panels": []}, [])
    assert page.stat().st_size - len(bare.encode()) < 150_000


def test_existing_page_stays_unless_forced(replay: Replay, empty: Path) -> None:
    empty.write_text("mine")
    with pytest.raises(OutputExists, match="exists already") as caught:
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


def test_panel_that_needs_a_trace_is_named_where_it_is_missing(replay: Replay) -> None:
    each = next(iter(ordered_panels()))
    needy = type(each)(**{**each.__dict__, "needs": frozenset({"trace"})})
    page = page_data(ReportInput((replay,)), panels=[needy])
    assert page["panels"] == []
    assert page["notes"][-1] == "Not shown without a trace: Overview. Make the report where the trace is stored."


def test_the_data_behind_the_page_can_be_had_alone(
    trace: Trace, replay: Replay, source: ReportInput, tmp_path: Path
) -> None:
    path = report_data([replay], {trace.identity: trace}, tmp_path / "page.json")
    assert json.loads(path.read_text()) == page_data(source)
    assert path.read_text().isascii()
    with pytest.raises(OutputExists, match="exists already"):
        report_data([replay], {}, path)


def test_limits_reach_the_page(trace: Trace, replay: Replay, empty: Path) -> None:
    report([replay], {trace.identity: trace}, empty, limits=Limits(raster_bytes=10))
    notes = {each["name"]: each["notes"] for each in carried(read(empty))["panels"]}
    assert notes["residency"][0].startswith("0 of 7 runs are shown, in 1 of 2 layers")


def test_panel_must_have_a_drawing_and_ask_for_what_there_is() -> None:
    with pytest.raises(UsageError, match="has no script"):
        panel("bare", title="", order=1, help="")(lambda source: {})
    with pytest.raises(UsageError, match="needs weather"):
        panel("odd", title="", order=1, needs={"weather"}, help="")(lambda source: {})
    assert not {"bare", "odd"} & set(PANELS.names())


def test_assets_are_in_the_package() -> None:
    assert ":focus-visible" in asset("page.css")
    assert "prefers-color-scheme" in asset("page.css")
    assert "@media print" in asset("page.css")
