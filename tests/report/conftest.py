"""One small trace with its replay, made once."""

from pathlib import Path

import pytest

from kvscope.report.source import ReportInput
from kvscope.results.store import Replay
from kvscope.trace.reader import Trace
from tests.report.make import make_replay, make_trace


@pytest.fixture(scope="session")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    return make_trace(tmp_path_factory.mktemp("traces") / "small")


@pytest.fixture(scope="session")
def replay(trace: Trace, tmp_path_factory: pytest.TempPathFactory) -> Replay:
    return make_replay(tmp_path_factory.mktemp("reports") / "small", trace)


@pytest.fixture
def source(trace: Trace, replay: Replay) -> ReportInput:
    return ReportInput((replay,), {trace.identity: trace})


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    return tmp_path / "page.html"
