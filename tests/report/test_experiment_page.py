"""The page of an experiment: what it says, that it draws, and that its controls reach every panel."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvscope.core.errors import ResultError
from kvscope.core.experiment_records import ExperimentRecord, Failure
from kvscope.report.experiment import page_data, write_page
from kvscope.results.experiment import pool
from tests.report.browser import CHROMIUM, HOSTILE, Tab
from tests.results.test_experiment import METRICS, cell, runs_of

pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium")

MANY = [0.1 * n for n in range(8)]


def record(
    name: str = "mine", tasks: tuple[str, ...] = ("a", "b"), policies: tuple[str, ...] = ("x", "y")
) -> ExperimentRecord:
    """Return the summary of two policies at two budgets, and a bound, over two tasks."""

    def values(place: int) -> dict[tuple[str, str], dict[str, list[float | None]]]:
        shift = 0.01 * place
        mass = {
            (policy, budget): {
                "retained_mass": [min(1.0, one / 2 + shift + 0.1 * n + 0.05 * b) for one in MANY],
                "answer_score": [float(number % 2) for number in range(8)],
            }
            for n, policy in enumerate(policies)
            for b, budget in enumerate(("10%", "20%"))
        }
        return {**mass, ("belady", "10%"): {"retained_mass": [1.0] * 8}}

    losses = {policies[0]: [1.2] * 8, policies[1]: [2.0] * 8}
    cells = [cell(f"t{n}", values(n), task=task, losses=losses) for n, task in enumerate(tasks)]
    found = pool(runs_of(*cells))
    return ExperimentRecord(
        name=name,
        spec={},
        versions={},
        metrics=found.metrics,
        runs=found.runs,
        verdicts=found.verdicts,
        replays=tuple(one.replay for one in cells),
        failed=(Failure("y at 5%", "too few keys", "Use more."),),
        skipped={"quest": "needs keys"},
    )


def test_the_headline_names_the_best_and_where_they_disagree() -> None:
    page = page_data(record())
    assert isinstance(page["answer"], list) and len(page["answer"]) == 2
    assert all("x by perplexity" in str(line) and "y by retained mass" in str(line) for line in page["answer"])
    assert all(str(line).endswith("they disagree.") for line in page["answer"])


def test_every_row_and_every_metric_is_on_the_page() -> None:
    made = record()
    page: Any = page_data(made)
    assert page["parts"] == ["a · 64", "b · 64", "all tasks together"]
    assert [(run["policy"], run["budget"], run["part"]) for run in page["runs"]] == [
        (run.policy, run.budget, ["a", "b", None].index(run.task)) for run in made.runs
    ]
    assert {metric["name"] for metric in page["metrics"]} == set(made.metrics) > set(METRICS)
    assert [run["ranked"] for run in page["runs"] if run["policy"] == "belady"] == [False] * 3
    rows = next(panel["data"]["rows"] for panel in page["panels"] if panel["name"] == "missing")
    assert [row[0] for row in rows] == ["y at 5%", "quest"]


def test_one_task_has_no_panel_of_tasks() -> None:
    names = [panel["name"] for panel in page_data(record(tasks=("a",)))["panels"]]  # type: ignore[union-attr, index, call-overload]
    assert names == ["results", "curves", "missing"]


def test_without_results_there_is_no_page() -> None:
    with pytest.raises(ResultError, match="has no results"):
        page_data(replace(record(), runs=()))


def test_the_same_summary_gives_the_same_bytes(tmp_path: Path) -> None:
    one, two = (write_page(record(), tmp_path / name).read_bytes() for name in ("a.html", "b.html"))
    assert one == two


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize(
    "context",
    [
        {},
        {"color_scheme": "dark", "viewport": {"width": 800, "height": 900}},
        {"viewport": {"width": 420, "height": 800}},
    ],
    ids=["wide", "dark and narrow", "phone"],
)
def test_every_panel_draws_in_silence_and_fits(browser: Any, tmp_path: Path, context: Any) -> None:
    page = write_page(record(), tmp_path / "page.html")
    tab = Tab(browser, page, **context)
    assert (tab.said, tab.asked) == ([], [page.as_uri()])
    assert tab.run("document.documentElement.dataset.ready") == "yes"
    assert tab.count(".panel") == 4 and tab.count(".panel .body:empty") == 0
    assert tab.run("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
    tab.context.close()


@needs_browser
def test_the_choice_reaches_every_panel_and_the_address(browser: Any, tmp_path: Path) -> None:
    tab = Tab(browser, write_page(record(), tmp_path / "page.html"))
    table, curve, tasks = "#results table", "#curves .plot", "#tasks table"
    before = tab.text(table)
    assert tab.count(f"{table} tbody tr") == 5 and "16" in before
    tab.choose("Tasks", "b · 64")
    assert tab.text(table) != before and tab.address() == {"part": "1"}
    title = f"document.querySelector('{curve}').layout.yaxis.title.text"
    assert tab.run(title) == "answer score (higher is better)"
    tab.choose("Metric", "retained mass")
    assert tab.run(title) == "retained mass (higher is better)"
    cells = tab.text(tasks)
    tab.choose("Budget", "20%")
    assert tab.text(tasks) != cells and tab.address() == {"part": "1", "metric": "retained_mass", "budget": "20%"}
    assert tab.run("document.querySelectorAll('#results .best').length") > 0
    marked = "row => row.textContent.includes('belady') && row.querySelector('.best')"
    bound = f"[...document.querySelectorAll('#results tr')].filter({marked}).length"
    assert tab.run(bound) == 0, "a bound is not ranked"
    tab.context.close()


@needs_browser
def test_texts_of_users_stay_texts(browser: Any, tmp_path: Path) -> None:
    made = record(HOSTILE[0], tuple(HOSTILE[1:3]), (HOSTILE[3], HOSTILE[9]))
    page = write_page(replace(made, failed=(Failure(HOSTILE[4], HOSTILE[5], HOSTILE[7]),)), tmp_path / "page.html")
    tab = Tab(browser, page)
    assert (tab.said, tab.asked) == ([], [page.as_uri()])
    assert not tab.run("window.pwned") and tab.count("a[href^='https']") == 0
    for part in range(3):
        tab.run("part => kvscope.state.set({ part, metric: 'retained_mass' })", part)
    assert not tab.run("window.pwned") and tab.said == []
    assert re.search(r"</script><script>", page.read_text()) is None
    tab.context.close()
