"""All checks of a job are made once, when it is compiled, and none when it is executed."""

import os
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvscope.closed_loop import compile as closed_compile
from kvscope.core.errors import KvscopeError, OutputExists, ReplayError, TraceError, UsageError
from kvscope.core.options import (
    ClosedLoopOptions,
    OutputOptions,
    PlanOptions,
    Positions,
    Prefill,
    ReplayOptions,
    choice,
)
from kvscope.engine import feasible
from kvscope.engine.plan import EvictionPlan
from kvscope.kernels import available
from kvscope.policies.base import Policy
from kvscope.replay import compile as module
from kvscope.replay import feasible as of_traces
from kvscope.replay import open_loop
from kvscope.replay.compile import compile_replay
from kvscope.trace.reader import Trace, open_trace
from tests.trace import make

PACKAGE = Path(module.__file__).parents[1]
EXAMPLE = Path(__file__).parents[2] / "traces" / "example"
POLICIES = ["h2o", "tova", "belady"]
BUDGETS = ["20%", 30]
CLOSED = ReplayOptions(closed=ClosedLoopOptions())
CHECKS = [  # modules that call each check
    (of_traces, "require"),
    (module, "require_closed"),
    (module, "require_steps"),
    (module, "measurable"),
    (module, "torch_device"),
    (module, "parse_budgets"),
    (feasible, "require_room"),
    (closed_compile, "require_gates"),
    (closed_compile, "self_check"),
    (closed_compile, "derotations"),
    (EvictionPlan, "require"),
    (EvictionPlan, "make"),
    (Policy, "fit"),
    (open_loop, "footprint"),
]


@pytest.fixture(scope="module")
def example() -> Trace:
    return open_trace(EXAMPLE)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each check was called."""
    counted: Counter[str] = Counter()

    def counting(name: str, check: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counted[name] += 1
            return check(*args, **kwargs)

        return call

    for owner, name in CHECKS:
        call = counting(name, getattr(owner, name))
        monkeypatch.setattr(owner, name, staticmethod(call) if name == "make" else call)
    return counted


def test_nothing_is_checked_twice_and_nothing_after(example: Trace, calls: Counter[str], tmp_path: Path) -> None:
    job = compile_replay(example, POLICIES, BUDGETS, replace(CLOSED, closed=ClosedLoopOptions(Positions.compacted)))
    sequences = len(example.sequences)
    assert dict(calls) | {"footprint": 0} == {
        "make": len(POLICIES),
        "require": 2 * len(POLICIES),  # of the plan, and of the trace
        "fit": len(POLICIES),
        "require_room": len(POLICIES) * len(BUDGETS) * sequences,
        "require_closed": len(POLICIES) - 1,  # a clairvoyant bound has no closed run
        "require_gates": len(POLICIES) - 1,
        **dict.fromkeys(("require_steps", "measurable", "torch_device", "parse_budgets", "self_check"), 1),
        "derotations": 1,
        "footprint": 0,
    }
    assert job.footprint.bytes > 0 and calls["footprint"] == sequences
    calls.clear()
    made = job.execute(OutputOptions(tmp_path / "r", command="kvscope replay"))
    assert not calls, "the job had been checked, and its footprint computed"
    assert len(made.info.runs) == len(job.runs) == 2 * (2 * len(POLICIES) - 1)
    assert [run.number for run in job.runs] == [run.run for run in made.info.runs]


@pytest.mark.parametrize(
    ("policies", "budgets", "options", "error", "why"),
    [
        ([], "20%", {}, UsageError, "no policy is given"),
        (["h2"], "20%", {}, UsageError, "no policy is called 'h2'"),
        (["h2o"], "0", {}, UsageError, "not above zero"),
        (["h2o"], "2", {"plan": PlanOptions({"recent": "3"})}, UsageError, "more than the budget of 2"),
        (["h2o"], "20%", {"plan": PlanOptions({"alpha": "1"})}, UsageError, "has a parameter --alpha"),
        (["h2o"], "20%", {"plan": PlanOptions(compress="later")}, UsageError, "'later' is unknown"),
        (["tova"], "20%", {"plan": PlanOptions(allocate="ada")}, UsageError, "decides per layer"),
        (["h2o"], "20%", {"plan": PlanOptions(accumulate="int8")}, UsageError, "precision 'int8' is unknown"),
        (["snapkv"], "20%", {"prefill": Prefill.stream}, UsageError, "not defined for stream prefill"),
        (["h2o"], "20%", {"metrics": ("mass",)}, UsageError, "no metric is called 'mass'"),
        (["h2o"], "20%", {"device": "abacus"}, UsageError, "abacus"),
        (["belady"], "20%", {"closed": ClosedLoopOptions()}, UsageError, "cannot run in the closed loop"),
        (["quest"], "20%", {"closed": ClosedLoopOptions(Positions.compacted)}, UsageError, "nothing to compact"),
        (["h2o"], "20%", {"closed": ClosedLoopOptions(model="no/such")}, KvscopeError, "no/such"),
    ],
)
def test_errors_are_found_before_anything_is_written(
    example: Trace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    policies: list[str],
    budgets: str,
    options: dict[str, Any],
    error: type[KvscopeError],
    why: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error) as caught:
        compile_replay(example, policies, budgets, ReplayOptions(**options))
    assert why in caught.value.what and caught.value.todo
    assert not list(tmp_path.iterdir())


def test_missing_signals_are_found(tmp_path: Path) -> None:
    make.record(tmp_path / "plain", lengths=[20], prompt=12)
    make.record(tmp_path / "whole", lengths=[12], prompt=12)
    plain, whole = open_trace(tmp_path / "plain"), open_trace(tmp_path / "whole")
    with pytest.raises(TraceError, match="keydiff needs keys"):
        compile_replay(plain, ["keydiff"])
    with pytest.raises(TraceError, match="output_error needs values"):
        compile_replay(plain, ["h2o"], options=ReplayOptions(metrics=("output_error",)))
    with pytest.raises(TraceError, match=r"which the closed loop needs|the closed loop needs all"):
        compile_replay(plain, ["h2o"], "40%", CLOSED)
    with pytest.raises(ReplayError, match="ends with its prompt"):
        compile_replay(whole, ["h2o"], "40%")
    job = compile_replay(plain, ["h2o"], "40%")
    assert "output_error" in job.skipped_metrics and "values" in job.skipped_metrics["output_error"]


def test_skipped_policies_are_named_with_the_reason(tmp_path: Path) -> None:
    make.record(tmp_path / "plain", lengths=[20], prompt=12)
    plain, asked = open_trace(tmp_path / "plain"), ["h2o", "keydiff", "snapkv", "tova"]
    options = ReplayOptions(Prefill.stream, skip_unsupported=True)
    job = compile_replay(plain, asked, "40%", options)
    assert [plan.policy.name for plan in job.plans] == ["h2o", "tova"]
    assert [label.partition("(")[0] for label in job.skipped] == ["keydiff", "snapkv"]
    assert "keydiff needs keys" in job.skipped["keydiff"]
    assert "--store maps+vectors" in job.remedies["keydiff"] and list(job.remedies) == list(job.skipped)
    assert "not defined for stream prefill" in list(job.skipped.values())[1]
    assert not compile_replay(plain, ["h2o"], "40%").skipped
    with pytest.raises(UsageError, match=r"no selected policy can run .* keydiff needs keys"):
        compile_replay(plain, ["keydiff"], "40%", options)


def test_an_output_that_exists_is_one_error(example: Trace, tmp_path: Path) -> None:
    job = compile_replay(example, ["window"])
    job.execute(OutputOptions(tmp_path / "r"))
    with pytest.raises(OutputExists, match="r exists already"):
        job.execute(OutputOptions(tmp_path / "r"))
    job.execute(OutputOptions(tmp_path / "r", force=True))


def test_plain_strings_become_choices() -> None:
    assert choice(Prefill, "stream", "prefill") is Prefill.stream
    with pytest.raises(UsageError, match=r"prefill 'half' is unknown\nUse one of: full, stream\."):
        choice(Prefill, "half", "prefill")


@pytest.mark.skipif(not available(), reason="the kernel needs numba")
def test_there_are_few_calls_between_a_command_and_the_kernel(
    example: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames: list[str] = []

    def kernel(*_: Any, **__: Any) -> bool:
        inside = [frame for frame in traceback.extract_stack() if f"{PACKAGE}{os.sep}" in frame.filename]
        frames[:] = [f"{Path(frame.filename).name}:{frame.name}" for frame in inside]
        raise KeyboardInterrupt

    job = compile_replay(example, ["h2o"])
    monkeypatch.setattr("kvscope.engine.numba_stepper.step_block", kernel)
    with pytest.raises(KeyboardInterrupt):
        job.execute(OutputOptions(tmp_path / "r"))
    assert frames, "the kernel was called"
    assert len(["cli", *frames, "kernel"]) <= 6, frames
