"""The examples in git are whole, say what they claim, and are what this code makes of them.

A change of decisions or metrics that nobody meant shows here first. If it was meant: python tools/examples.py
"""

import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from pandas.testing import assert_frame_equal, assert_series_equal

from kvscope.replay.run import replay
from kvscope.results.store import Replay, open_replay
from kvscope.trace.reader import Trace, open_trace

ROOT = Path(__file__).resolve().parent.parent
MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def trace() -> Trace:
    return open_trace(ROOT / "traces" / "example", verify=True)


@pytest.fixture(scope="module")
def committed() -> Replay:
    return open_replay(ROOT / "reports" / "example", verify=True)


@pytest.fixture(scope="module")
def again(trace: Trace, committed: Replay, tmp_path_factory: pytest.TempPathFactory) -> Replay:
    """Return the same policies and budgets, replayed now; policies that came later are not in the example."""
    policies = list(dict.fromkeys(run["label"] for run in committed.info["runs"]))
    budgets = list(dict.fromkeys(run["budget"] for run in committed.info["runs"] if run["budget"] is not None))
    return replay(trace, policies, budgets, output=tmp_path_factory.mktemp("replay") / "example")


def values(run: dict[str, Any]) -> dict[str, Any]:
    """Return what `summary.json` says of the metrics of one run, flat."""
    return {f"{name} {what}": value for name, stated in run["metrics"].items() for what, value in stated.items()}


def test_the_prompt_asks_for_its_facts_and_the_model_knows_the_last(trace: Trace) -> None:
    tokens = trace.tokens(0)
    prompt = "".join(tokens["text"][tokens["is_prompt"]])
    assert prompt == (ROOT / "traces" / "example.txt").read_text(encoding="utf-8")
    facts = {(name, verb): value for name, verb, value in re.findall(r"Note: (\w+) (\w+) (\d+)\.", prompt)}
    asked = re.findall(r"Question: what (\w+) (\w+)\? Answer: \2 \1", prompt)
    assert len(facts) >= 2
    assert {(name, verb) for verb, name in asked} == set(facts)
    verb, name = asked[-1]
    assert "".join(tokens["text"][~tokens["is_prompt"]]).startswith(f" {facts[name, verb]}.")


def test_the_trace_has_everything_that_a_policy_may_need(trace: Trace) -> None:
    assert trace.stored >= {"maps", "value_l1", "value_l2", "key_l2", "similarity", "queries", "vectors:keys"}
    assert 80 <= trace.sequences[0].prompt <= 100
    assert trace.sequences[0].length - trace.sequences[0].prompt == 16


def test_the_replay_is_of_this_trace(trace: Trace, committed: Replay) -> None:
    assert committed.info["trace"]["identity"] == trace.identity


def test_decisions_are_the_same(committed: Replay, again: Replay) -> None:
    assert [run["decisions"] for run in again.info["runs"]] == [run["decisions"] for run in committed.info["runs"]]
    assert_frame_equal(again.residency(), committed.residency())


def test_metrics_are_the_same(committed: Replay, again: Replay) -> None:
    assert_frame_equal(again.fidelity(), committed.fidelity(), rtol=0, atol=1e-6)
    for made, kept in zip(again.summary["runs"], committed.summary["runs"], strict=True):
        assert (made["label"], made["budget"]) == (kept["label"], kept["budget"])
        stated = pd.Series(values(kept), dtype=float)
        assert_series_equal(pd.Series(values(made), dtype=float), stated, rtol=0, atol=1e-6)


@pytest.mark.parametrize("folder", ["traces/example", "reports/example"])
def test_examples_are_small_and_tell_nothing_of_a_machine(folder: str) -> None:
    files = [file for file in (ROOT / folder).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 1.5 * MEGABYTE
    for file in files:
        assert str(ROOT).encode() not in file.read_bytes(), f"{file} names a folder of this machine"
        if file.suffix == ".json":
            assert not re.search(r'"(host|pid)"|"/', file.read_text(encoding="utf-8")), f"{file} holds a path or a host"
