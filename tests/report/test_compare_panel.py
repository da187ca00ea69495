"""Two replays side by side: what differs is marked, and runs are paired by policy and budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvscope.core.summary_records import MetricSummary
from kvscope.report.page import report
from kvscope.report.panels.compare import compare
from kvscope.report.source import ReportInput
from kvscope.trace.record import ModelRecord
from tests.report.browser import CHROMIUM, Tab
from tests.report.make import make_replay, make_trace
from tests.results.make import with_summary

MASS = {"h2o": {"2": 0.5, "4": 0.75}, "tova": {"2": 0.625, "4": 0.875}}
OTHER = {"h2o": {"2": 0.5, "4": 0.8}, "tova": {"2": 0.4, "4": 0.875}, "window": {"2": 0.3}}


@pytest.fixture
def two(tmp_path: Path) -> ReportInput:
    """One prompt, two models."""
    first = make_trace(tmp_path / "t1")
    second = make_trace(tmp_path / "t2", texts=["A", " queen", "\n", " said", " 7", "!"], model=ModelRecord(id="other"))
    replays = (make_replay(tmp_path / "one", first, mass=MASS), make_replay(tmp_path / "two", second, mass=OTHER))
    return ReportInput(replays, {first.identity: first, second.identity: second})


def test_facts_that_differ_are_marked(two: ReportInput) -> None:
    data = compare(two)
    assert data is not None
    rows = {row["name"]: row for row in data["facts"]}
    assert rows["prompt"] == {"name": "prompt", "values": ["The king↵", "A queen↵"], "differs": True}
    assert rows["policies"]["values"] == ["2", "3"] and rows["policies"]["differs"]
    assert rows["layers"] == {"name": "layers", "values": ["2", "2"], "differs": False}
    assert {name for name, row in rows.items() if row["differs"]} == {
        "trace", "identity of the trace", "policies", "prompt",
    }  # fmt: skip


def test_runs_of_one_policy_and_budget_are_in_one_row(two: ReportInput) -> None:
    data = compare(two)
    assert data is not None
    runs = {run.id: run for run in two.runs}
    pairs = [[(runs[id].source, runs[id].label, runs[id].budget) for id in row["runs"]] for row in data["rows"]]
    assert sorted(pairs) == [[("one", *run), ("two", *run)] for run in (
        ("h2o", "2"), ("h2o", "4"), ("tova", "2"), ("tova", "4"))]  # fmt: skip
    assert data["notes"] == ["1 of 9 runs have no counterpart in another replay."]
    assert compare(ReportInput(two.replays[:1])) is None


def test_loops_of_one_replay_are_not_mixed(rich: ReportInput, tmp_path: Path) -> None:
    data = compare(rich)
    assert data is not None
    runs = {run.id: run for run in rich.runs}
    assert all(row["runs"][0] and runs[row["runs"][0]].protocol[1] == "open" for row in data["rows"])
    assert next(row for row in data["facts"] if row["name"] == "loop")["differs"]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium")
def test_the_page_marks_rows_beyond_the_intervals(browser: Any, two: ReportInput, tmp_path: Path) -> None:
    first, second = two.replays
    for run in range(4):  # intervals in which h2o at 4 overlaps, and tova at 2 does not
        for place, replay in enumerate((first, second)):
            metrics = replay.summary.runs[run].metrics
            mean = metrics["retained_mass"].mean
            assert mean is not None
            wide = MetricSummary(mean, low=mean - 0.05, high=mean + 0.05, count=metrics["retained_mass"].count)
            made = with_summary(replay, run, metrics={**metrics, "retained_mass": wide})
            first, second = (made, second) if place == 0 else (first, made)
    tab = Tab(browser, report([first, second], two.traces, tmp_path / "page.html"))
    assert tab.said == []
    rows = (
        "[...document.querySelectorAll('#compare [aria-label=\"Runs side by side\"] tbody tr')].map(it => it.innerText)"
    )
    marked = [text for text in tab.run(rows) if "≠" in text]
    assert len(tab.run(rows)) == 4 and len(marked) == 1
    assert marked[0].startswith("tova 2") and "-0.2250" in marked[0]
    assert "1 of 4 rows differ in retained mass." in tab.text("#compare .body > .small")
    stars = [text for text in tab.run(rows) if text.count("★") == 1 and text.startswith("tova 2")]
    assert stars, "tova is the best at 2 in the first replay alone"
    tab.page.locator("#compare").get_by_label("only what differs").check()
    assert len(tab.run(rows)) == 1 and tab.address()["differing"] == "yes"
    tab.context.close()
