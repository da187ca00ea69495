"""All checks of a closed-loop job are made once, when it is compiled, and none when it is executed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvscope.closed_loop import compile as module
from kvscope.closed_loop.compile import compile_perplexity, compile_verify
from kvscope.core.errors import KvscopeError, ModelError, TraceError, UsageError
from kvscope.core.options import (
    ClosedLoopOptions,
    ModelSource,
    OutputOptions,
    PerplexityOptions,
    PlanOptions,
    Positions,
    VerifyOptions,
)
from kvscope.engine import feasible
from kvscope.engine.plan import EvictionPlan
from kvscope.policies.base import Policy
from kvscope.trace.reader import Trace, open_trace
from tests.trace import make

ROOT = Path(__file__).parents[2]
DEMO = ModelSource("demo")
CHECKS = [
    (module, "require_closed"),
    (module, "require_decodable"),
    (module, "require_gates"),
    (module, "self_check"),
    (module, "attention_facts"),
    (module, "derotations"),
    (feasible, "require_room"),
    (EvictionPlan, "require"),
    (EvictionPlan, "make"),
    (Policy, "fit"),
]


@pytest.fixture(scope="module")
def example() -> Trace:
    return open_trace(ROOT / "traces" / "example")


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text((ROOT / "traces" / "example.txt").read_text() * 2)
    return tmp_path / "t.txt"


@pytest.fixture
def no_more_checks(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Make every check raise an error from now on."""

    def too_late(*_: Any, **__: Any) -> None:
        raise AssertionError("checked after the job was compiled")

    def begin() -> None:
        for owner, name in CHECKS:
            monkeypatch.setattr(owner, name, too_late)

    return begin


@pytest.mark.parametrize("positions", list(Positions))
def test_a_compiled_perplexity_checks_nothing(
    text: Path, tmp_path: Path, no_more_checks: Callable[[], None], positions: Positions
) -> None:
    options = PerplexityOptions(positions=positions, window=24, max_windows=2)
    job = compile_perplexity(DEMO, [text], ["h2o", "window"], "20%,8", options)
    assert len(job.runs) == 4 and len(job.closed.passages) == 2
    no_more_checks()
    made = job.execute(OutputOptions(tmp_path / "r"))
    assert {run.positions for run in made.info.runs} == {positions}


def test_a_compiled_verification_checks_nothing(example: Trace, no_more_checks: Callable[[], None]) -> None:
    options = VerifyOptions(closed=ClosedLoopOptions(Positions.compacted), tokens=4)
    job = compile_verify(example, ["tova", "streaming-llm"], "20%", options)
    no_more_checks()
    found = job.execute()
    assert len(found) == len(job.runs) == 2
    assert all(verdict.agrees and verdict.decided for verdict in found)


@pytest.mark.parametrize(
    ("policies", "budgets", "options", "why"),
    [
        ([], "20%", {}, "no policy is given"),
        (["belady"], "20%", {}, "cannot run in the closed loop"),
        (["quest"], "20%", {"positions": Positions.compacted}, "nothing to compact"),
        (["h2o"], "none", {}, "not a number"),
        (["streaming-llm"], "3", {}, "more than the budget of 3"),
        (["snapkv"], "20%", {}, "not defined for stream prefill"),
        (["h2o"], "20%", {"metrics": ("mass",)}, "no metric is called"),
        (["h2o"], "20%", {"window": 10**6}, "more than the model's context"),
        (["h2o"], "20%", {"window": 16, "prompt": 16}, "fills a window"),
        (["h2o"], "20%", {"plan": PlanOptions(allocate="ada", params={"nothing": "1"})}, "nothing"),
    ],
)
def test_errors_in_a_perplexity_job(
    text: Path, policies: list[str], budgets: str, options: dict[str, Any], why: str
) -> None:
    with pytest.raises(UsageError) as caught:
        compile_perplexity(DEMO, [text], policies, budgets, PerplexityOptions(**options))
    assert why in caught.value.what and caught.value.todo
    assert list(text.parent.iterdir()) == [text]


def test_texts_and_models_that_do_not_exist(text: Path) -> None:
    with pytest.raises(UsageError, match="no text file is given"):
        compile_perplexity(DEMO, [], ["h2o"])
    with pytest.raises(UsageError, match="cannot read"):
        compile_perplexity(DEMO, [text.with_name("none.txt")], ["h2o"])
    with pytest.raises(ModelError, match="no/such"):
        compile_perplexity(ModelSource("no/such"), [text], ["h2o"])
    text.write_text("a")
    with pytest.raises(UsageError, match="too few tokens"):
        compile_perplexity(DEMO, [text], ["h2o"])


@pytest.mark.parametrize(
    ("policies", "budgets", "error", "why"),
    [
        ([], "20%", UsageError, "no policy is given"),
        (["quest"], "20%", UsageError, "keys that a smaller cache does not hold"),
        (["ideal"], "20%", UsageError, "cannot run in the closed loop"),
        (["streaming-llm"], "3", UsageError, "more than the budget of 3"),
    ],
)
def test_errors_in_a_verification(
    example: Trace, policies: list[str], budgets: str, error: type[KvscopeError], why: str
) -> None:
    with pytest.raises(error) as caught:
        compile_verify(example, policies, budgets)
    assert why in caught.value.what


def test_a_trace_without_a_model_cannot_be_verified(tmp_path: Path) -> None:
    make.record(tmp_path / "plain", lengths=[20], prompt=12)
    with pytest.raises(TraceError, match=r"the closed loop needs all|has no model"):
        compile_verify(open_trace(tmp_path / "plain"), ["h2o"], "40%")
