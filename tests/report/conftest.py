"""One small trace with its replay, and one that has something for every panel, each made once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvscope.core.answer_records import AnswerSpan, ExampleRef
from kvscope.report.source import ReportInput
from kvscope.results.store import Replay
from kvscope.trace.prompt_parts import SpanRecord
from kvscope.trace.reader import Trace
from tests.report.browser import CHROMIUM
from tests.report.make import make_replay, make_trace

WORDS = ["Once", " upon", " a", " time", ",", "\n", "there", " was", " a", " king", ".", "\n"]
RICH = {
    "full": {None: None},
    "h2o": {"4": 0.5, "8": 0.75},
    "tova": {"4": 0.625, "8": 0.8},
    "window": {"4": 0.25, "8": 0.5},
    "snapkv": {"4": 0.7, "8": 0.9},
    "quest": {"4": 0.6, "8": 0.7},
    "belady": {"4": 0.8, "8": 0.95},
    **{f"a2sf:alpha={alpha}": {"4": alpha, "8": 0.5} for alpha in (0.1, 0.5, 0.9)},
}
EXAMPLES = [ExampleRef(0, ("king",), "exact", (AnswerSpan(12, 14),), "1", "needle", 24, 0.25)]
ALPHAS = {f"a2sf:alpha={alpha}": {"alpha": alpha, "recent": 0} for alpha in (0.1, 0.5, 0.9)}


@pytest.fixture(scope="session")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    return make_trace(tmp_path_factory.mktemp("traces") / "small")


@pytest.fixture(scope="session")
def replay(trace: Trace, tmp_path_factory: pytest.TempPathFactory) -> Replay:
    return make_replay(tmp_path_factory.mktemp("reports") / "small", trace)


@pytest.fixture
def source(trace: Trace, replay: Replay) -> ReportInput:
    return ReportInput((replay,), {trace.identity: trace})


@pytest.fixture(scope="session")
def rich_trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    stored = ("maps", "value_l1", "value_l2", "key_l2", "queries")
    return make_trace(
        tmp_path_factory.mktemp("traces") / "rich",
        texts=2 * WORDS,
        prompt=10,
        stored=stored,
        logprob=True,
        spans=[SpanRecord("needle", 2, 5)],
    )


@pytest.fixture(scope="session")
def rich(rich_trace: Trace, tmp_path_factory: pytest.TempPathFactory) -> ReportInput:
    """Open and closed loop, every kind of policy, a sweep, a right answer."""
    folder = tmp_path_factory.mktemp("reports")
    bounds = {"share_of_belady": 0.75, "belady_of_ideal": 0.5}
    opened = make_replay(folder / "open", rich_trace, mass=RICH, params=ALPHAS, bounds=bounds)
    feasible = {name: values for name, values in RICH.items() if name != "belady"}
    closed = make_replay(folder / "closed", rich_trace, mass=feasible, params=ALPHAS, loop="closed", examples=EXAMPLES)
    return ReportInput((opened, closed), {rich_trace.identity: rich_trace})


@pytest.fixture(scope="session")
def gated(trace: Trace, tmp_path_factory: pytest.TempPathFactory) -> ReportInput:
    """A policy that decides itself how much it keeps, beside others."""
    mass = {"attention-gate": {"2": 0.5}, "h2o": {"2": 0.5, "4": 0.75}, "tova": {"4": 0.5}}
    replay = make_replay(tmp_path_factory.mktemp("reports") / "gated", trace, mass=mass)
    return ReportInput((replay,), {trace.identity: trace})


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    return tmp_path / "page.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A browser; only tests that have checked that there is one ask for it."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        launched = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield launched
        launched.close()
