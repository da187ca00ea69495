"""The page in a real browser: it draws every panel, asks nobody for anything, and does what its controls say.

Each test prevents a fault that data cannot show: a drawing that fails, text that becomes markup, a control without an
effect, a choice that does not reach the other panels or the address.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from kvscope.core.summary_records import LoopGap
from kvscope.replay.run import replay
from kvscope.report.encoding import packed, packed_floats, packed_halves
from kvscope.report.limits import Limits
from kvscope.report.page import page_data, report
from kvscope.report.source import ReportInput
from kvscope.trace.prompt_parts import ImageRecord
from kvscope.trace.reader import Trace
from tests.report.browser import CHROMIUM, HOSTILE, Tab
from tests.report.make import make_replay, make_trace
from tests.report.test_summary_panels import run_of
from tests.results.make import with_summary
from tests.trace.layers import record as record_layers

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium")


@pytest.fixture(scope="module")
def rich_page(rich: ReportInput, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report(rich.replays, rich.traces, tmp_path_factory.mktemp("page") / "rich.html")


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    trace = make_trace(folder / "trace", texts=HOSTILE, prompt=4, prompt_file=HOSTILE[1], stored=("maps", "value_l1"))
    labels = {"h2o": HOSTILE[1], "tova": HOSTILE[5], "window": HOSTILE[9]}
    mass = {name: {"2": 0.5, "4": 0.6} for name in ("h2o", "tova", "window")}
    replay = make_replay(folder / "replay", trace, mass=mass, labels=labels, command=" ".join(HOSTILE))
    return report([replay], {trace.identity: trace}, folder / "page.html", title=HOSTILE[0])


@pytest.fixture(scope="module")
def shared(browser: Any, rich_page: Path) -> Iterator[Tab]:
    opened = Tab(browser, rich_page)
    yield opened
    opened.context.close()


@pytest.fixture
def tab(shared: Tab) -> Tab:
    """The page as it is when it opens, without opening it anew."""
    shared.run(
        "kvscope.state.set(Object.fromEntries(['run', 'other', 'part', 'layer', 'head', 'step', 'token', 'sort',"
        " 'columns', 'budget', 'kind', 'lines', 'view', 'mode', 'shade', 'metric',"
        " 'span', 'lost'].map(name => [name, null])))"
    )
    shared.page.emulate_media(media="screen")
    return shared


@pytest.mark.parametrize(
    "context",
    [
        {},
        {"color_scheme": "dark", "viewport": {"width": 800, "height": 900}},
        {"viewport": {"width": 420, "height": 800}},
    ],
    ids=["wide", "dark and narrow", "phone"],
)
def test_every_panel_draws_in_silence_and_fits(browser: Any, rich_page: Path, rich: ReportInput, context: Any) -> None:
    tab = Tab(browser, rich_page, **context)
    assert tab.said == []
    assert tab.asked == [rich_page.as_uri()]
    assert tab.run("document.documentElement.dataset.ready") == "yes"
    bodies = "[...document.querySelectorAll('.panel')].map(it => [it.id, it.querySelector('.body').textContent.length])"
    drawn = dict(tab.run(bodies))
    assert set(drawn) == {panel["name"] for panel in page_data(rich)["panels"]}
    assert all(drawn.values()), drawn
    assert tab.run("document.documentElement.scrollWidth <= window.innerWidth"), "nothing sticks out of the page"
    wide = "[...document.querySelectorAll('.panel')].filter(it => it.scrollWidth > it.clientWidth + 1)"
    assert tab.run(f"{wide}.map(it => it.id)") == []
    tab.context.close()


@pytest.mark.slow
def test_hostile_text_is_shown_and_does_nothing(browser: Any, hostile_page: Path) -> None:
    tab = Tab(browser, hostile_page, "#text?token=1&shade=held")
    assert tab.said == []
    assert tab.asked == [hostile_page.as_uri()]
    assert tab.run("window.pwned") is None
    assert tab.count("#page img, #page script, #page [onerror], #page [onload], #page iframe") == 0
    assert tab.run("[...document.querySelectorAll('#page a')].every(it => it.getAttribute('href').startsWith('#'))")
    shown = tab.run("[...document.querySelectorAll('#text [data-at]')].map(it => it.textContent)")
    assert shown[:4] == HOSTILE[:4]
    assert shown[4].startswith("⟨U+2028⟩⟨U+2029⟩")
    assert shown[5:7] == ["⟨U+202E⟩evil⟨U+202C⟩⟨U+200F⟩", "⟨U+0000⟩⟨U+001B⟩[31m⟨U+007F⟩"]
    assert tab.run("document.title") == HOSTILE[0]
    tab.page.locator("#residency canvas").first.hover(position={"x": 300, "y": 100})
    assert tab.text("#residency .tip")
    tab.choose("Policy", HOSTILE[9])
    assert tab.text("#residency h3").startswith(HOSTILE[9])
    assert HOSTILE[9] in tab.text("#over-time .legend")
    assert tab.run("window.pwned") is None
    assert tab.said == []
    tab.context.close()


@pytest.mark.slow
def test_the_policy_of_the_page_lets_nothing_out(tab: Tab) -> None:
    fetched = "fetch('https://example.org/').then(() => 'let out', () => 'refused')"
    assert tab.run(fetched) == "refused"
    loaded = "const it = new Image(); it.onload = () => done('let out'); it.onerror = () => done('refused');"
    assert tab.run(f"new Promise(done => {{ {loaded} it.src = 'https://example.org/x.png'; }})") == "refused"
    script = "const it = document.createElement('script'); it.textContent = 'window.pwned = true';"
    tab.run(f"(() => {{ {script} document.body.append(it); }})()")
    assert tab.run("window.pwned") is None, "a script that is not the page's own does not run"
    assert [line for line in tab.said if "Content Security Policy" not in line] == []
    tab.said.clear()


@pytest.mark.slow
def test_numbers_arrive_as_they_were_packed(tab: Tab) -> None:
    cases = {
        "integers": packed(np.array([-3, 0, 70_000])),
        "floats": packed_floats(np.array([0.25, np.nan, 0.75])),
        "halves": packed_halves(np.array([0, 6e-8, 1e-5, 0.1, 1, 65504], np.float16)),
    }
    found = {
        name: tab.run(
            "it => kvscope.numbers(it).then(all => [...all].map(one => Number.isNaN(one) ? null : one))", value
        )
        for name, value in cases.items()
    }
    assert found["integers"] == [-3, 0, 70_000]
    assert found["floats"] == [0.25, None, 0.75]
    assert found["halves"] == np.array([0, 6e-8, 1e-5, 0.1, 1, 65504], np.float16).astype(np.float64).tolist()


@pytest.mark.slow
def test_a_choice_in_the_bar_reaches_the_panels_and_the_address(tab: Tab, rich: ReportInput) -> None:
    tab.choose("Policy", "window · open loop · open")
    tab.choose("Budget", "8")
    run = run_of(rich, "window", "8")
    assert tab.address()["run"] == run.id
    assert tab.text("#residency h3") == "window · open loop · open · 8, layer 0, all key/value heads"
    assert "window · open loop · open · 8" in tab.text("#regrets .small")
    assert tab.count(f"#overview tr.shown[data-run='{run.id}']") == 1
    tab.choose("Layer", "1")
    tab.choose("Query head", "3")
    assert tab.text("#inspector .small").startswith("Layer 1, query head 3,")
    assert (tab.address()["layer"], tab.address()["head"]) == ("1", "3")


@pytest.mark.slow
def test_the_slider_moves_text_and_address(tab: Tab) -> None:
    slider = tab.page.locator(".choice input[type=range]")
    slider.focus()
    held = "document.querySelectorAll('#text .share-10').length"
    at_end = tab.run(held)
    slider.press("Home")
    for _ in range(12):
        slider.press("ArrowRight")
    assert tab.address()["step"] == "12"
    assert tab.count("#text .later") == 11
    assert tab.run(held) == at_end, "a window of four keys holds four keys at every step"
    assert tab.page.locator("#text .now").get_attribute("data-at") == "12"


@pytest.mark.slow
def test_the_address_brings_back_the_whole_choice(browser: Any, rich_page: Path, rich: ReportInput) -> None:
    run, other = run_of(rich, "tova", "8").id, run_of(rich, "window", "8").id
    fragment = f"#residency?run={run}&other={other}&layer=0&head=2&step=15&token=9"
    fragment += "&metric=output_error&mode=difference&view=2.12.10.20"
    tab = Tab(browser, rich_page, fragment)
    assert (tab.chosen("Policy"), tab.chosen("Budget"), tab.chosen("Layer")) == ("tova · open loop · open", "8", "0")
    assert tab.chosen("Compare with") == "window · open loop · open"
    both = "tova · open loop · open · 8 and window · open loop · open · 8"
    assert tab.text("#residency h3") == f"{both}, layer 0, query head 2 (key/value head 1)"
    assert "only window" in tab.text("#residency .legend:visible")
    assert (
        tab.page.locator("#residency canvas")
        .get_attribute("aria-label")
        .startswith("Tokens 2 to 11 down, steps 10 to 19")
    )
    assert tab.run("document.querySelector('#head-map select').value") == "output_error"
    assert tab.page.locator("#residency").evaluate("it => Math.abs(it.getBoundingClientRect().top) < 300")
    assert tab.run("location.hash") == fragment
    tab.context.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "fragment",
    [
        "#text?run=9.9&step=abc&layer=77&head=-1&token=1e9&view=1.2.3&lines=0.99&sort=nothing",
        "#nowhere?__proto__=1&run=__proto__",
        "#%E0%A4%A",
    ],
)
def test_a_wrong_address_is_as_good_as_none(browser: Any, rich_page: Path, rich: ReportInput, fragment: str) -> None:
    tab = Tab(browser, rich_page, fragment)
    assert tab.said == []
    assert tab.run("kvscope.state.get('run')") == rich.first.id
    assert tab.run("kvscope.state.get('step')") == 23
    tab.context.close()


@pytest.mark.slow
def test_numbers_of_the_first_sentence_are_explained_by_pointer_and_keyboard(tab: Tab) -> None:
    words = tab.page.locator(".answer .explained", has_text="keys held")
    tip = tab.page.locator(".answer .tip").first
    assert not tip.is_visible()
    words.hover()
    assert tip.inner_text().startswith("The budget is 4 keys in each key/value head.")
    tab.page.mouse.move(0, 0)
    assert not tip.is_visible()
    words.focus()
    assert tip.is_visible()
    assert words.get_attribute("aria-describedby") == tip.get_attribute("id")
    words.press("Escape")
    assert not tip.is_visible()


@pytest.mark.slow
def test_the_first_screen_is_shown_before_what_takes_long(browser: Any, rich_page: Path) -> None:
    """The library of plots takes most of the time, and nothing on the first screen needs it."""
    watch = (
        "new MutationObserver(() => { if (!('loaded' in window) && document.documentElement.dataset.shown)"
        " window.loaded = Boolean(window.Plotly); }).observe(document, { subtree: true, attributes: true });"
    )
    tab = Tab(browser, rich_page, before=watch, viewport={"width": 1280, "height": 700})
    assert tab.run("window.loaded") is False and tab.run("Boolean(window.Plotly)") is True
    tab.context.close()


ORDER = """window.order = [];
new MutationObserver((changes) => {
  for (const { target } of changes) {
    if (target.matches('.panel:not(.waiting)') && !order.includes(target.id)) order.push(target.id);
  }
}).observe(document, { subtree: true, attributes: true, attributeFilter: ['class'] });"""


@pytest.mark.slow
def test_panels_near_the_window_are_drawn_first_and_all_are_drawn(
    browser: Any, rich_page: Path, rich: ReportInput
) -> None:
    names = [panel["name"] for panel in page_data(rich)["panels"]]
    top = Tab(browser, rich_page, before=ORDER, viewport={"width": 1280, "height": 700})
    assert sorted(top.run("order")) == sorted(names) and top.run("order")[0] == names[0]
    assert top.count(".panel.waiting") == 0
    top.context.close()
    view = f"view=2.12.10.20&metric=output_error&lines={len(names) % 3}"
    late = Tab(browser, rich_page, f"#queries?{view}", before=ORDER, viewport={"width": 1280, "height": 700})
    order = late.run("order")
    assert order[0] == "queries" and order.index("over-time") > 2
    assert sorted(order) == sorted(names)
    assert late.said == []
    late.context.close()


STEPS = """window.steps = [];
const inside = (panel, windows) => {
  const { top, bottom } = panel.getBoundingClientRect();
  return bottom > -windows * innerHeight && top < (1 + windows) * innerHeight;
};
new MutationObserver((changes) => {
  for (const { target } of changes) {
    if (!target.matches('.panel:not(.waiting)') || steps.some(([id]) => id === target.id)) continue;
    const waiting = [...document.querySelectorAll('.panel.waiting')];
    const ids = (windows) => waiting.filter((panel) => inside(panel, windows)).map((panel) => panel.id);
    steps.push([target.id, ids(0), ids(1)]);
  }
}).observe(document, { subtree: true, attributes: true, attributeFilter: ['class'] });"""


@pytest.mark.slow
def test_panels_in_the_window_are_drawn_before_those_above_it(browser: Any, rich_page: Path) -> None:
    told = 0
    for name in ("heads", "regrets", "queries"):
        tab = Tab(browser, rich_page, f"#{name}", before=STEPS, viewport={"width": 1280, "height": 1400})
        for (_, inside, near), (following, *_) in pairwise(tab.run("steps")):
            assert not inside or following in inside
            told += bool(inside) and near[0] not in inside
        tab.context.close()
    assert told, "a panel in the window waited while one above it did"


SET_EARLY = """new MutationObserver((_, self) => {
  if (!document.documentElement.dataset.shown) return;
  self.disconnect();
  kvscope.state.set({ step: 5 });
  window.early = location.hash;
}).observe(document, { subtree: true, attributes: true });"""


@pytest.mark.slow
def test_a_choice_keeps_what_the_address_says_of_panels_that_are_not_drawn_yet(browser: Any, rich_page: Path) -> None:
    tab = Tab(browser, rich_page, "#overview?view=2.12.10.20&lines=0", before=SET_EARLY)
    assert "view=2.12.10.20" in tab.run("early") and "lines=0" in tab.run("early") and "step=5" in tab.run("early")
    assert tab.run("kvscope.state.get('view')") == "2.12.10.20"
    tab.context.close()


@pytest.mark.slow
def test_other_kinds_of_charts_are_prepared_when_one_is_drawn(browser: Any, rich_page: Path) -> None:
    tab = Tab(browser, rich_page)
    assert tab.run("typeof Plotly.registerCharts") == "function", "the panels have lines and points alone"
    tab.run(
        "(async () => { const box = document.createElement('div'); document.querySelector('main').append(box);"
        " await kvscope.plot(box, [{ type: 'bar', x: [1, 2], y: [3, 4] }], {}); window.drawn = box; })()"
    )
    assert tab.run("drawn.querySelectorAll('.bars .point').length") == 2
    assert tab.run("typeof Plotly.registerCharts") == "undefined"
    assert tab.said == []
    tab.context.close()


CLICKED_EARLY = """new MutationObserver((_, self) => {
  const link = document.querySelectorAll('nav a')[9];
  if (link) { self.disconnect(); link.click(); }
}).observe(document, { subtree: true, childList: true });"""


@pytest.mark.slow
@pytest.mark.parametrize("context", [{}, {"viewport": {"width": 420, "height": 800}}], ids=["wide", "phone"])
def test_a_jump_before_all_panels_are_drawn_ends_at_its_panel(browser: Any, rich_page: Path, context: Any) -> None:
    tab = Tab(browser, rich_page, before=CLICKED_EARLY, **context)
    place = tab.run("document.querySelectorAll('.panel h2')[9].getBoundingClientRect().top")
    assert 0 <= place < 300, "panels above it have grown since the click"
    tab.page.mouse.wheel(0, -400)
    tab.until("document.querySelectorAll('.panel h2')[9].getBoundingClientRect().top > 300")
    tab.context.close()


@pytest.mark.slow
def test_the_table_sorts_and_warns_of_kinds(tab: Tab) -> None:
    first = "document.querySelector('#overview .summary tbody tr').dataset.run"
    header = tab.page.locator("#overview .summary th", has_text="retained mass")
    header.get_by_role("button").click()
    assert header.get_attribute("aria-sort") == "descending"
    assert "of 3 kinds" in tab.text("#overview .warning")
    best = tab.run(first)
    header.get_by_role("button").click()
    assert header.get_attribute("aria-sort") == "ascending"
    assert tab.run(first) != best
    tab.page.locator("#overview").get_by_label("Kind", exact=True).select_option("every step")
    assert tab.text("#overview .warning") == ""
    kinds = set(tab.page.locator("#overview .summary tbody tr[data-run] .kind").all_inner_texts())
    assert kinds == {"every step"}
    assert tab.count("#overview .bounds tr") == 0


@pytest.mark.slow
def test_bounds_stand_apart(tab: Tab) -> None:
    rows = tab.run("[...document.querySelectorAll('#overview .bounds tr')].map(it => it.textContent)")
    assert rows[0].startswith("Bounds: these use the future")
    assert len(rows) == 3
    assert all("belady" in row for row in rows[1:])


@pytest.mark.slow
def test_lines_are_found_and_chosen(tab: Tab) -> None:
    drawn = "document.querySelector('#budget-curve .plot').data.map(it => it.name)"
    before = tab.run(drawn)
    tab.page.get_by_placeholder("find a policy").fill("snap")
    boxes = tab.page.locator("#budget-curve .lines input")
    assert boxes.count() == 2, "open and closed"
    boxes.first.uncheck()
    assert len(tab.run(drawn)) == len(before) - 1
    tab.page.get_by_placeholder("find a policy").fill("")
    tab.page.locator("#budget-curve").get_by_role("button", name="None").click()
    assert all(name.startswith("ideal") for name in tab.run(drawn))
    assert tab.address()["lines"] == ""
    tab.page.locator("#budget-curve").get_by_role("button", name="Usual").click()
    assert tab.run(drawn) == before


@pytest.mark.slow
def test_readers_that_hold_every_key_have_a_strip(browser: Any, trace: Trace, tmp_path: Path) -> None:
    replay = make_replay(tmp_path / "r", trace, mass={"h2o": {"2": 0.5, "4": 0.6}, "quest": {"2": 0.5, "4": 0.6}})
    for number in (2, 3):
        metrics = replay.summary.runs[number].metrics
        held = replace(metrics["held_keys"], mean=5.0)
        replay = with_summary(replay, number, metrics={**metrics, "held_keys": held})
    tab = Tab(browser, report([replay], {}, tmp_path / "page.html"))
    lines = "document.querySelector('#budget-curve .plot').data.map(it => [it.name, it.xaxis || 'x', [...it.x]])"
    assert {name: place for name, *place in tab.run(lines) if name != "ideal"} == {
        "h2o": ["x", [2, 4]],
        "quest": ["x2", ["2", "4"]],
    }
    axis = tab.page.locator("#budget-curve").get_by_label("Against")
    axis.select_option("share")
    assert {name: place for name, *place in tab.run(lines)}["h2o"] == ["x", [0.4, 0.8]]
    axis.select_option("read")
    assert {name: place for name, *place in tab.run(lines)}["quest"] == ["x", [3, 5]]
    assert tab.said == []
    tab.context.close()


@pytest.mark.slow
def test_a_cell_of_the_map_chooses_its_head_with_mouse_and_keyboard(tab: Tab) -> None:
    cells = tab.page.locator("#head-map [role=gridcell]")
    cells.nth(2).click()
    assert (tab.chosen("Layer"), tab.chosen("Query head")) == ("0", "2")
    tab.page.locator("#head-map [aria-selected=true]").press("ArrowDown")
    tab.page.keyboard.press("ArrowRight")
    tab.page.keyboard.press("Enter")
    assert (tab.chosen("Layer"), tab.chosen("Query head")) == ("1", "3")


@pytest.mark.slow
def test_the_raster_says_why_a_key_went(tab: Tab, rich: ReportInput) -> None:
    def said(policy: str, token: int, step: int) -> str:
        run = run_of(rich, policy, "4").id
        tab.run(f"kvscope.state.set({{ run: '{run}', layer: 1, head: 0, token: {token}, step: {step} }})")
        return tab.text("#residency .readout").split("; ", 2)[2]

    assert said("h2o", 21, 22).startswith("held since step 21, to the end; attention of query head 0: ")
    assert said("h2o", 3, 22).startswith(
        "evicted at step 9, held since step 3; at the end of the prompt, h2o retained others of its 10 keys; "
        "it would still have received "
    )
    gone = said("h2o", 12, 22)
    assert gone.startswith("evicted at step 16, held since step 12; token 16 “,” needed its place, and h2o scored it")
    assert said("quest", 12, 22).startswith("not read at step 16, read since step 12; quest read other keys")
    assert "the best schedule for the following rows" in said("belady", 12, 22)


@pytest.mark.slow
def test_the_raster_is_walked_with_the_keyboard(tab: Tab) -> None:
    canvas = tab.page.locator("#residency canvas").first
    canvas.focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "Shift+ArrowDown"):
        canvas.press(key)
    assert tab.address()["token"] == "11"
    assert tab.text("#residency .readout").startswith("token 11 “↵”, generated; step ")
    canvas.press("+")
    assert tab.address()["view"].count(".") == 3
    canvas.press("Escape")
    assert tab.address()["view"] == "0.24.0.24"


@pytest.mark.slow
def test_dragging_zooms_and_a_click_chooses(tab: Tab) -> None:
    canvas = tab.page.locator("#residency canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box
    tab.page.mouse.move(box["x"] + 200, box["y"] + 100)
    tab.page.mouse.down()
    tab.page.mouse.move(box["x"] + 500, box["y"] + 250)
    tab.page.mouse.up()
    k0, k1, t0, t1 = map(int, tab.address()["view"].split("."))
    assert 0 < k0 < k1 < 24
    assert 0 < t0 < t1 <= 24
    tab.page.mouse.click(box["x"] + 300, box["y"] + 200)
    assert k0 <= int(tab.address()["token"]) < k1


@pytest.mark.slow
def test_two_runs_stand_side_by_side_or_as_difference(tab: Tab) -> None:
    tab.choose("Compare with", "window · open loop · open")
    assert tab.count("#residency canvas") == 2
    tab.page.locator("#residency").get_by_label("Two policies").select_option("difference")
    assert tab.count("#residency canvas") == 1
    assert tab.text("#residency .legend:visible").count("only ") == 2


@pytest.mark.slow
def test_a_token_shows_its_life(tab: Tab) -> None:
    tab.page.locator("#text [data-at='9']").click()
    assert tab.text("#text .life h3").startswith("Token 9 “␣king”: held by")
    assert tab.count("#text .life [role=gridcell]") == 4
    tab.page.locator("#text .text").press("ArrowRight")
    assert tab.address()["token"] == "10"


@pytest.mark.slow
def test_images_are_marked_and_listed(browser: Any, tmp_path: Path) -> None:
    images = [ImageRecord("cat.png", "d" * 64, 40, 24, 1, 2, 1), ImageRecord(HOSTILE[1], "d" * 64, 8, 9, 2, 3, 1)]
    trace = make_trace(tmp_path / "trace", images=images)
    tab = Tab(browser, report([make_replay(tmp_path / "r", trace)], {trace.identity: trace}, tmp_path / "p.html"))
    assert tab.count("#text .text [data-image='1']") == tab.count("#text .text [data-image='2']") == 1
    assert tab.text("#text [data-at='1']") == "▦"
    listed = tab.page.locator("#text .images li")
    assert listed.first.inner_text() == "▦ image 1: tokens 1 to 1 (1 of 6), cat.png, 40 × 24 pixels"
    assert listed.count() == tab.count("#text .end.image") == 2
    colours = tab.run("['0', '1'].map(at => getComputedStyle(document.querySelector(`#text [data-at='${at}']`)).color)")
    assert colours[0] != colours[1]
    tab.page.locator("#text [data-at='1']").click()
    assert tab.text("#text .life h3").startswith("Token 1 “image 1 (1/1)”")
    tab.context.close()


@pytest.mark.slow
def test_text_can_be_shaded_by_loss_and_regret(tab: Tab, rich: ReportInput) -> None:
    tab.run("id => kvscope.state.set({ run: id })", run_of(rich, "tova", "4", "closed").id)
    shades = tab.page.locator("#text").get_by_label("Shade by")
    assert shades.evaluate("it => [...it.options].map(one => one.value)") == ["held", "loss", "regret", "surprise"]
    for shade in ("loss", "regret", "surprise"):
        shades.select_option(shade)
        assert tab.count("#text [class*=loss-]") > 3


@pytest.mark.slow
def test_a_regret_leads_to_the_row_that_missed_it(tab: Tab) -> None:
    row = tab.page.locator("#regrets tbody tr").first
    layer, missed = row.locator("td").nth(1).inner_text(), row.locator("td").nth(5).inner_text()
    row.get_by_role("button").click()
    said = tab.text("#inspector .small")
    assert said.startswith(f"Layer {layer}, query head")
    assert f", step {missed} " in said
    assert "nearest" not in said
    names = tab.run("document.querySelector('#inspector .plot').data.map(it => it.name)")
    assert "in the ideal set, but not seen" in names
    assert tab.count("#regrets tr.shown") == 1
    assert "attention of query head" in tab.text("#residency .readout"), "the raster knows the row too"


@pytest.mark.slow
def test_a_cell_of_a_span_leads_to_residency_and_text(tab: Tab, rich: ReportInput) -> None:
    tab.run(f"kvscope.state.set({{ run: '{run_of(rich, 'window', '4').id}' }})")
    panel = tab.page.locator("#spans")
    assert panel.locator("button").filter(has_text="Show in").count() == 0
    panel.get_by_label("Lost", exact=True).select_option("last token")
    assert "4 of 4 heads lost all of “a time,” (needle, tokens 2 to 4), 0 hold it to the end." in tab.text(
        "#spans .small"
    )
    panel.locator("[role=gridcell]").nth(3).click()
    assert (tab.chosen("Layer"), tab.chosen("Query head")) == ("1", "2")
    assert (tab.address()["token"], tab.address()["step"]) == ("2", "9")
    panel.get_by_role("button", name="Show in residency").click()
    tab.until("Math.abs(document.querySelector('#residency').getBoundingClientRect().top) < 300")
    assert tab.run("location.hash").startswith("#residency?")
    assert tab.text("#residency .readout").startswith("token 2 “␣a”, prompt; step 9")
    panel.get_by_role("button", name="Show in the text").click()
    tab.until("Math.abs(document.querySelector('#text').getBoundingClientRect().top) < 300")
    assert tab.page.locator("#text .text .picked").get_attribute("data-at") == "2"


@pytest.mark.slow
def test_the_matrix_chooses_what_to_compare(tab: Tab) -> None:
    tab.page.locator("#agreement [role=gridcell]").nth(1).click()
    assert "other" in tab.address()
    assert tab.count("#residency canvas") == 2


@pytest.mark.slow
def test_the_matrix_has_numbers_everywhere_and_no_colour_on_its_diagonal(tab: Tab) -> None:
    cell = "[...document.querySelectorAll('#agreement table.full tbody tr')].map((row, r) => [...row.cells].slice(1)"
    texts = tab.run(f"{cell}.map(it => it.textContent))")
    colours = tab.run(f"{cell}.map(it => it.style.backgroundColor))")
    assert len(texts) > 5
    for place, (row, painted) in enumerate(zip(texts, colours, strict=True)):
        assert (row[place], painted[place]) == ("–", ""), "a run agrees with itself: not a finding"
        assert all(text[:2] in ("0.", "1.") and len(text) == 4 for at, text in enumerate(row) if at != place)
    low, high = (float(text.rstrip(" %")) for text in tab.text("#agreement .scale").split("\n") if text.strip())
    values = [float(text) for place, row in enumerate(texts) for at, text in enumerate(row) if at != place]
    assert (low, high) == pytest.approx((100 * min(values), 100 * max(values)), abs=1), "the scale is that of the pairs"
    table = "document.querySelector('#agreement table.full').getBoundingClientRect().width"
    assert tab.run(f"{table} > 0.97 * document.querySelector('#agreement .body').clientWidth"), "the full width"


@pytest.mark.slow
def test_axes_of_the_raster_have_words(tab: Tab) -> None:
    tab.run(
        "const write = CanvasRenderingContext2D.prototype.fillText; window.drawn = [];"
        "CanvasRenderingContext2D.prototype.fillText = function (text, ...at)"
        "{ drawn.push(text); return write.call(this, text, ...at); }; kvscope.redrawAll();"
    )
    words = tab.run("window.drawn")
    assert "step, and its token" in words
    assert words.count("␣king") >= 2, "of a row and of a column"


@pytest.mark.slow
def test_a_map_that_is_cut_off_says_that_it_scrolls(browser: Any, rich_page: Path) -> None:
    for width, shown in ((1280, False), (420, True)):
        tab = Tab(browser, rich_page, viewport={"width": width, "height": 900})
        hint = tab.page.locator("#agreement .hint").first
        tab.run("new Promise(go => requestAnimationFrame(() => requestAnimationFrame(go)))")
        assert hint.is_visible() is shown
        assert "Scroll sideways to see all" in str(hint.text_content())
        tab.context.close()


@pytest.mark.slow
def test_every_plot_has_its_numbers_in_a_table(tab: Tab) -> None:
    panels = tab.run("[...document.querySelectorAll('.panel:has(.plot):not(#inspector)')].map(it => it.id)")
    assert len(panels) >= 5
    for panel in panels:
        details = tab.page.locator(f"#{panel} details.behind").last
        details.locator("summary").click()
        playwright.expect(details.locator("tbody tr").first).to_be_visible()  # its rows are made when it opens
        details.locator("summary").click()


@pytest.mark.slow
def test_every_control_has_a_name(tab: Tab) -> None:
    wanted = "[...document.querySelectorAll('select, input, button, canvas, [role=grid], [tabindex=\"0\"]')]"
    named = "(it.labels && it.labels.length) || it.getAttribute('aria-label') || it.textContent.trim()"
    assert tab.run(f"{wanted}.filter(it => !({named})).map(it => it.outerHTML.slice(0, 80))") == []
    ids = tab.run("[...document.querySelectorAll('[id]')].map(it => it.id)")
    assert len(ids) == len(set(ids))


@pytest.mark.slow
@pytest.mark.parametrize(("panel", "holds"), [("budget-curve", "tova"), ("head-map", "rect"), ("residency", "<image")])
def test_figures_are_saved_as_svg_in_inches_and_points(
    browser: Any, rich_page: Path, tmp_path: Path, panel: str, holds: str
) -> None:
    tab = Tab(browser, rich_page, color_scheme="dark")
    place = tab.page.locator(f"#{panel}")
    place.get_by_text("Save as SVG").click()
    place.get_by_label("width, inches").fill("4")
    place.get_by_label("font, points").fill("9")
    with tab.page.expect_download() as waiting:
        place.get_by_role("button", name="Save", exact=True).click()
    waiting.value.save_as(tmp_path / "figure.svg")
    assert waiting.value.suggested_filename == f"{panel}.svg"
    text = (tmp_path / "figure.svg").read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    assert root.attrib["width"] == "4in" and root.attrib["viewBox"].startswith("0 0 384 ")
    assert holds in text and "font-size: 12px" in text.replace('font-size="12"', "font-size: 12px"), "9 points"
    ground = "getComputedStyle(document.body).backgroundColor"
    tab.until(f"{ground} === 'rgb(18, 22, 28)'")  # the page is dark again
    assert "#56b4e9" not in text and "rgb(86, 180, 233)" not in text, "colours for paper"
    assert tab.said == []
    tab.context.close()


@pytest.mark.slow
def test_the_keyboard_reaches_every_control_and_shows_where_it_is(browser: Any, rich_page: Path) -> None:
    tab = Tab(browser, rich_page)
    tab.run(
        """(() => {
          const every = 'a[href], select, input, button, summary, canvas, [tabindex="0"]';
          const seen = { opacityProperty: true, visibilityProperty: true };
          const there = it => it.checkVisibility(seen) && it.tabIndex >= 0;
          window.controls = [...document.querySelectorAll(every)].filter(there);
          Object.assign(window, { reached: [], bare: [] });
          document.addEventListener('focusin', ({ target }) => {
            reached.push(target);
            const { outlineStyle, outlineWidth } = getComputedStyle(target);
            if (outlineStyle === 'none' || parseFloat(outlineWidth) < 2) bare.push(target.outerHTML.slice(0, 80));
          });
        })()"""
    )
    count = tab.run("controls.length")
    assert count > 100
    for _ in range(2 * count):  # areas that scroll are places too
        tab.page.keyboard.press("Tab")
        if tab.page.evaluate("document.activeElement === document.body"):
            break  # behind the last
    missing = "controls.filter(it => it.isConnected && !reached.includes(it)).map(it => it.outerHTML.slice(0, 80))"
    assert tab.run(missing) == []
    assert tab.run("[...new Set(bare)]") == []
    tab.context.close()


@pytest.mark.slow
def test_the_theme_can_be_chosen(tab: Tab) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    light = tab.run(ground)
    tab.page.get_by_label("Colours").select_option("dark")
    assert tab.run(ground) != light
    tab.page.get_by_label("Colours").select_option("")
    assert tab.run(ground) == light


@pytest.mark.slow
def test_it_prints_in_light_without_what_only_a_screen_needs(browser: Any, rich_page: Path) -> None:
    tab = Tab(browser, rich_page, color_scheme="dark")
    assert len(tab.page.pdf()) > 50_000
    tab.page.emulate_media(media="print")
    assert not tab.page.locator("nav").is_visible()
    assert tab.page.locator(".save:visible, .hint:visible, .modebar:visible").count() == 0, "only a screen needs them"
    cut = "[...document.querySelectorAll('.panel')].filter(it => it.scrollWidth > it.clientWidth + 1).map(it => it.id)"
    assert tab.run(cut) == []
    assert tab.page.locator("#provenance h2").is_visible()
    assert tab.said == []
    tab.context.close()


@pytest.mark.slow
def test_panels_name_what_the_page_does_not_contain(browser: Any, rich: ReportInput, tmp_path: Path) -> None:
    few = Limits(raster_bytes=300, share_bytes=200, map_bytes=200, line_bytes=300, row_bytes=200, weights=1400)
    page = report(rich.replays, rich.traces, tmp_path / "few.html", limits=few)
    last = run_of(rich, "h2o", "8").id
    tab = Tab(browser, page, f"#text?run={last}&layer=1")
    assert tab.said == []
    assert "The page does not contain the raster" in tab.text("#residency .small")
    assert tab.text("#head-map .small").endswith("the page does not contain its map.")
    assert "The page does not contain" in tab.text("#text .small")
    assert "is not in this page" in tab.text("#norms .small")
    assert tab.count(".notes li") >= 6
    tab.context.close()


@pytest.mark.slow
def test_a_page_without_trace_draws_what_is_left(browser: Any, rich: ReportInput, tmp_path: Path) -> None:
    page = report(rich.replays, {}, tmp_path / "bare.html")
    tab = Tab(browser, page)
    assert tab.said == []
    assert json.loads(tab.run("document.getElementById('data').textContent"))["parts"]["0.0"]["tokens"] is None
    canvas = tab.page.locator("#residency canvas").first
    canvas.focus()
    canvas.press("ArrowDown")
    assert tab.text("#residency .readout").startswith("token 0 ")
    tab.context.close()


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 420])
def test_keys_by_depth_draw_and_choose_a_run(browser: Any, gated: ReportInput, tmp_path: Path, width: int) -> None:
    page = report(list(gated.replays), gated.traces, tmp_path / "page.html")
    tab = Tab(browser, page, viewport={"width": width, "height": 900})
    assert tab.said == []
    lines = tab.run("document.querySelector('#depth .plot').data.map(it => [it.name, it.y.length])")
    assert lines == [["attention-gate · 2", 2], ["h2o · 2", 2], ["tova · 4", 2]]
    assert tab.run("document.documentElement.scrollWidth <= window.innerWidth")
    tab.run("document.querySelector('#depth .plot').emit('plotly_click', { points: [{ customdata: '0.3' }] })")
    assert tab.run("kvscope.state.get('run')") == "0.3"
    tab.context.close()


@pytest.mark.slow
def test_what_was_tuned_and_what_both_loops_hold_is_drawn(browser: Any, trace: Trace, tmp_path: Path) -> None:
    settings = [{"alpha": 0.1}, {"alpha": 0.9}]
    tuned = {"settings": settings, "layers": [0, 1], "choice": [[0, 1], [1, 1]]}
    replay = make_replay(tmp_path / "r", trace, mass={"tuned": {"2": 0.5}}, params={"tuned": tuned}, loop="closed")
    replay = with_summary(replay, 0, gap=LoopGap(0.75, {"0": 1.0, "1": 0.5}, None))
    tab = Tab(browser, report([replay], {trace.identity: trace}, tmp_path / "page.html"))
    assert tab.said == []
    cells = "[...document.querySelectorAll('{} [role=gridcell]')].map(it => it.textContent)"
    assert tab.run(cells.format("#sweep")) == ["0.1", "0.9", "0.9", "0.9"]
    assert tab.run(cells.format("#agreement")) == ["0.75", "1.00", "0.50"]
    tab.page.locator("#sweep [role=gridcell]").nth(3).click()
    assert (tab.chosen("Layer"), tab.chosen("Query head")) == ("1", "2")
    tab.context.close()


@pytest.mark.slow
def test_layers_that_differ_in_their_heads_show_those_that_they_have(browser: Any, tmp_path: Path) -> None:
    trace = record_layers(
        tmp_path / "t"
    )  # layer 0 has 4 query heads over 2, layer 1 has 6 over 3, layer 5 has 4 over 4
    made = replay(trace, ["h2o", "tova"], "12", output=tmp_path / "r")
    tab = Tab(
        browser, report([made], {trace.identity: trace}, tmp_path / "r.html"), "#?layer=1&head=5&token=45&step=50"
    )
    assert (tab.chosen("Layer"), tab.chosen("Query head")) == ("1", "5")
    tab.choose("Layer", "0")
    assert tab.chosen("Query head") == "all", "layer 0 has no query head 5"
    options = "[...document.querySelectorAll('.choice select')].map((each) => each.options.length)"
    assert 1 + 4 in tab.run(options) and 1 + 6 not in tab.run(options)
    cells = tab.page.locator("#head-map [role=gridcell]")
    assert cells.count() == 6 * 6
    assert cells.nth(4).get_attribute("title") == "layer 0 has 4 query heads"
    cells.nth(4).click()
    assert tab.chosen("Query head") == "all"
    cells.nth(6 * 5 + 3).click()
    assert (tab.chosen("Layer"), tab.chosen("Query head")) == ("5", "3")
    assert "key/value head 3" in str(cells.nth(6 * 5 + 3).get_attribute("title"))
    life = tab.page.locator("#text .life [role=gridcell]")
    assert life.count() == 6 * 4
    assert life.nth(2).get_attribute("title") == "layer 0 has 2 key/value heads"
    life.nth(4 + 2).click()
    assert (tab.chosen("Layer"), tab.chosen("Query head")) == ("1", "4"), "the first query head of key/value head 2"
    assert tab.said == []
    tab.context.close()
