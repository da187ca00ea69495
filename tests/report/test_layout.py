"""The layout of pages in windows of several widths: nothing is cut, covered or without words.

The names of policies are long, as with caches of fewer bits: short ones fit everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from kvscope.report.page import report
from kvscope.report.source import ReportInput
from kvscope.trace.reader import Trace
from tests.report.browser import CHROMIUM, Tab
from tests.report.conftest import ALPHAS, EXAMPLES, RICH
from tests.report.make import make_replay
from tests.report.test_summary_panels import run_of

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium")

CACHES = ("int4:kivi(group=16,residual=16)", "int2:kivi(group=16,residual=16)")
LONG = {"h2o": f"h2o + {CACHES[0]}", "tova": f"streaming-llm + {CACHES[1]}"}


@pytest.fixture(scope="module")
def crowded(rich_trace: Trace, tmp_path_factory: pytest.TempPathFactory) -> ReportInput:
    """Two replays in both loops, of policies with long names, with right answers, spans and a sweep."""
    folder = tmp_path_factory.mktemp("crowded")
    feasible = {name: values for name, values in RICH.items() if name != "belady"}
    made = [
        make_replay(folder / f"a-replay-{loop}", rich_trace, mass=feasible, params=ALPHAS, labels=LONG, **more)
        for loop, more in {"open": {}, "closed": {"loop": "closed", "examples": EXAMPLES}}.items()
    ]
    return ReportInput(tuple(made), {rich_trace.identity: rich_trace})


@pytest.fixture(scope="module", params=[1440, 1024, 420])
def tab(request: Any, browser: Any, crowded: ReportInput, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    page = report(crowded.replays, crowded.traces, tmp_path_factory.mktemp("page") / "page.html")
    run, other = (run_of(crowded, label, "8", "closed").id for label in LONG.values())
    fragment = f"#?run={run}&other={other}&token=9&head=0&lines=0.1.2.3.4.5.6.7"
    opened = Tab(browser, page, fragment, viewport={"width": request.param, "height": 900})
    yield opened
    assert opened.said == []
    opened.context.close()


@pytest.mark.slow
def test_nothing_is_wider_than_its_panel(tab: Tab) -> None:
    """But for what is in an area that scrolls."""
    wide = tab.run(
        """(() => {
          const scrolls = it => it.closest('.scroll, .text, .lines, .unseen');
          const over = it => it.getBoundingClientRect().right > it.closest('.panel').getBoundingClientRect().right + 1;
          return [...document.querySelectorAll('.panel .body *')]
            .filter(it => it.checkVisibility() && !scrolls(it) && over(it))
            .map(it => `${it.closest('.panel').id}: ${it.outerHTML.slice(0, 90)}`);
        })()"""
    )
    assert wide == []
    assert tab.run("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.slow
def test_a_table_that_is_cut_has_a_hint(tab: Tab) -> None:
    tab.run("document.querySelectorAll('.behind').forEach(it => { it.open = true; })")
    tab.page.wait_for_timeout(200)  # the sizes are observed
    found = tab.run(
        """[...document.querySelectorAll('.panel .scroll')].filter(it => it.checkVisibility()).map(it => {
          const hint = it.previousElementSibling;
          return [it.closest('.panel').id, it.scrollWidth > it.clientWidth + 1,
            Boolean(hint && hint.matches('.hint') && hint.checkVisibility())];
        })"""
    )
    assert len(found) > 15
    assert [each for each in found if each[1] != each[2]] == []
    assert any(cut for _, cut, _ in found) or tab.run("window.innerWidth") == 1440
    tab.run("document.querySelectorAll('.behind').forEach(it => { it.open = false; })")


@pytest.mark.slow
def test_buttons_and_legends_cover_no_plot(tab: Tab) -> None:
    found = tab.run(
        """[...document.querySelectorAll('.plot')].filter(it => it.checkVisibility() && it.data).map(it => {
          const rect = one => it.querySelector(one).getBoundingClientRect();
          const drawn = [...it.querySelectorAll('.xy .plot, .xy2 .plot, .nsewdrag')];
          const top = Math.min(...drawn.map(one => one.getBoundingClientRect().top));
          const legend = it.querySelectorAll('.legend .traces').length;
          return [it.closest('.panel').id, rect('.modebar').bottom - top, legend];
        })"""
    )
    assert len(found) >= 7
    assert [each for each in found if each[1] > 1] == [], "buttons over the plot"
    assert [each for each in found if each[2]] == [], "the legend of Plotly is not used"


@pytest.mark.slow
def test_axes_have_words_that_are_not_cut(tab: Tab) -> None:
    found = tab.run(
        """[...document.querySelectorAll('.plot')].filter(it => it.checkVisibility() && it.data).flatMap(it => {
          const box = it.getBoundingClientRect();
          const inside = word => {
            const one = word.getBoundingClientRect();
            return one.left >= box.left - 1 && one.right <= box.right + 1
              && one.bottom <= box.bottom + 1 && one.top >= box.top - 1;
          };
          const words = [...it.querySelectorAll('.xtitle, .ytitle, .x2title, .y2title')];
          const both = words.length >= 2 && words.every(word => word.textContent);
          return [[it.closest('.panel').id, both, words.every(inside)]];
        })"""
    )
    assert len(found) >= 7
    assert [each for each in found if not (each[1] and each[2])] == []


@pytest.mark.slow
def test_titles_do_not_overlap(tab: Tab) -> None:
    """Texts of headings, of the control that saves figures, and of the lines of legends."""
    found = tab.run(
        """(() => {
          const rects = it => {
            const range = document.createRange();
            range.selectNodeContents(it);
            return [...range.getClientRects()].filter(one => one.width);
          };
          const beside = (a, b) => a.right <= b.left + 1 || b.right <= a.left + 1;
          const above = (a, b) => a.bottom <= b.top + 1 || b.bottom <= a.top + 1;
          const meet = (x, y) => x.some(one => y.some(two => !beside(one, two) && !above(one, two)));
          return [...document.querySelectorAll('.panel')].flatMap(panel => {
            const all = [...panel.querySelectorAll('h2, h3, .save summary, .legend > span, .how > summary')]
              .filter(it => it.checkVisibility()).map(it => [it.textContent, rects(it)]);
            return all.flatMap(([a, x], at) => all.slice(at + 1)
              .filter(([, y]) => meet(x, y)).map(([b]) => [panel.id, a, b]));
          });
        })()"""
    )
    assert found == []


@pytest.mark.slow
def test_tips_stay_in_the_window(tab: Tab) -> None:
    inside = "(it => it.left >= 0 && it.right <= window.innerWidth)"
    for words in tab.page.locator(".answer .explained").all():
        words.focus()
        assert tab.run(f"{inside}(document.activeElement.nextSibling.getBoundingClientRect())")
    canvas = tab.page.locator("#residency canvas").first
    canvas.evaluate("it => it.scrollIntoView({ block: 'center' })")
    box = canvas.bounding_box()
    assert box
    for share in (0.45, 0.55, 0.96):
        tab.page.mouse.move(box["x"] + share * box["width"], box["y"] + 0.5 * box["height"])
        assert tab.page.locator("#residency .tip").first.is_visible()
        assert tab.run(f"{inside}(document.querySelector('#residency .tip').getBoundingClientRect())")
    tab.page.mouse.move(0, 0)


@pytest.mark.slow
def test_maps_take_the_room_that_they_can_use(tab: Tab) -> None:
    """A map of few columns is not stretched over the page, and one of many uses all of it."""
    shares = tab.run(
        "['#head-map', '#agreement'].map(it => { const table = document.querySelector(`${it} table.heat`);"
        " return [table.tHead.rows[0].cells.length, table.clientWidth, table.parentElement.clientWidth]; })"
    )
    (columns, wide, room), (_, full, place) = shares
    assert min(room, 60 * (columns - 1)) - 1 <= wide <= 120 * (columns - 1)
    assert full >= place - 1


@pytest.mark.slow
def test_cells_of_a_row_have_one_height(tab: Tab) -> None:
    apart = tab.run(
        """[...document.querySelectorAll('.panel table tr')].filter(row => row.checkVisibility()).flatMap(row =>
          [...row.cells].filter(cell => cell.rowSpan === 1 && cell.checkVisibility()
            && Math.abs(cell.getBoundingClientRect().height - row.getBoundingClientRect().height) > 1.5)
            .map(cell => `${cell.closest('.panel').id}: ${cell.outerHTML.slice(0, 60)}`))"""
    )
    assert apart == []
