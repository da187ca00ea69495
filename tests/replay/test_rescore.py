"""Metrics computed from the residency intervals of a replay equal those that the replay wrote."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from kvscope.core.errors import OutputExists, ResultError, TraceError, UsageError
from kvscope.core.options import ClosedLoopOptions
from kvscope.metrics import METRICS
from kvscope.model.generate import trace as record
from kvscope.replay.rescore import rescore
from kvscope.replay.run import replay
from kvscope.results.store import Replay
from kvscope.trace.reader import Trace, open_trace
from tests.model.tiny import saved
from tests.trace.make import record as record_small

ROOT = Path(__file__).resolve().parents[2]
PLACE = ["run", "sequence", "layer", "head", "step"]
# One policy of each kind of residency: per-step eviction, a single eviction, per layer, sparse readers, no eviction.
FULL = ["full", "h2o", "tova", "snapkv:window=4", "ada-kv:window=4", "quest", "recycled-attention", "h2o:variant=mask"]
STREAM = ["window", "random", "a2sf", "vatp:sinks=1", "quest", "a2sf:variant=streaming-mask"]


@pytest.fixture(scope="module")
def example() -> Trace:
    return open_trace(ROOT / "traces" / "example")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """A trace of rows without values."""
    path = tmp_path_factory.mktemp("small") / "t"
    record_small(path, lengths=[14, 9], heads=4, kv_heads=2)
    return open_trace(path)


def sorted_fidelity(made: Replay) -> pd.DataFrame:
    return made.fidelity().sort_values(PLACE).reset_index(drop=True)


def same(one: Replay, other: Replay) -> None:
    """Fail unless two replays have the same decisions and, up to rounding, the same numbers."""
    pd.testing.assert_frame_equal(sorted_fidelity(one), sorted_fidelity(other), rtol=0, atol=1e-6)
    assert [run.decisions for run in one.info.runs] == [run.decisions for run in other.info.runs]
    for kept, made in zip(one.summary.runs, other.summary.runs, strict=True):
        assert kept.tails.keys() == made.tails.keys()
        for name, value in kept.metrics.items():
            assert vars(made.metrics[name]) == pytest.approx(vars(value), abs=1e-6)


@pytest.mark.parametrize(("prefill", "policies"), [("full", FULL), ("stream", STREAM)])
def test_every_metric_equals_that_of_the_replay(
    prefill: str, policies: list[str], example: Trace, tmp_path: Path
) -> None:
    made = replay(example, policies, "20%,45%", output=tmp_path / "r", prefill=prefill)  # type: ignore[arg-type]
    again = rescore(made, example, output=tmp_path / "s")
    assert list(again.info.metrics) == METRICS.names()
    same(made, again)


@pytest.mark.parametrize("name", ["gpt_oss", "gemma3"])
def test_with_learned_sinks_and_sliding_windows(name: str, tmp_path: Path) -> None:
    prompts = []
    for number in (0, 1):
        prompts.append(tmp_path / f"{number}.txt")
        prompts[-1].write_text(" ".join(f"w{1 + index * (7 + number) % 60}" for index in range(14 + number)))
    source = record(str(saved(tmp_path / name, name)), prompts, output=tmp_path / "t", max_new_tokens=12, store="qkv")
    assert source.header.learned_sinks == (name == "gpt_oss")
    assert any(window is not None for window in source.header.sliding_window)
    policies = ["h2o", "tova", "quest:page_size=2,fewest_pages=1", "full"]
    made = replay(source, policies, "30%", output=tmp_path / "r")
    same(made, rescore(made, source, output=tmp_path / "s"))


def test_some_metrics_in_another_folder(small: Trace, tmp_path: Path) -> None:
    made = replay(small, ["h2o"], "40%", output=tmp_path / "r", prefill="stream", metrics=["full_cosine"])
    before = {file.name: file.read_bytes() for file in made.path.iterdir()}
    seen: list[float] = []
    again = rescore(made, small, ["retained_mass", "held_keys"], output=tmp_path / "s", progress=seen.append)
    assert list(again.info.metrics) == ["retained_mass", "held_keys"]
    assert again.info.scored is not None and again.info.scored.replay == "r"
    assert seen == [0.25, 0.5, 0.75, 1.0]
    assert {file.name: file.read_bytes() for file in made.path.iterdir()} == before
    with pytest.raises(OutputExists, match="exists"):
        rescore(made, small, output=tmp_path / "s")


def test_blocks_of_rows_change_nothing(small: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = replay(small, ["tova", "recycled-attention:stride=3"], "40%", output=tmp_path / "r", prefill="stream")
    monkeypatch.setattr("kvscope.replay.rescore.BLOCK_BYTES", 1)
    same(made, rescore(made, small, output=tmp_path / "s"))


def test_a_metric_without_its_signal_is_skipped_unless_it_is_named(small: Trace, tmp_path: Path) -> None:
    made = replay(small, ["h2o"], "40%", output=tmp_path / "r", prefill="stream")
    assert set(METRICS.names()) - set(made.info.metrics) == {"output_error"} == set(made.info.left_out)
    assert "--store" in made.info.left_out["output_error"]
    assert set(rescore(made, small, output=tmp_path / "s").info.left_out) == {"output_error"}
    for scores in (
        lambda: replay(small, ["h2o"], "40%", output=tmp_path / "x", prefill="stream", metrics=["output_error"]),
        lambda: rescore(made, small, ["output_error"], output=tmp_path / "x"),
    ):
        with pytest.raises(TraceError, match="output_error needs values") as caught:
            scores()
        assert "--store" in caught.value.todo
    assert not (tmp_path / "x").exists()


def test_another_trace_is_refused(small: Trace, example: Trace, tmp_path: Path) -> None:
    made = replay(small, ["h2o"], "40%", output=tmp_path / "r", prefill="stream")
    with pytest.raises(ResultError, match="was not made from"):
        rescore(made, example, output=tmp_path / "s")
    with pytest.raises(UsageError, match="no metric"):
        rescore(made, small, ["retained_mas"], output=tmp_path / "s")


def test_closed_runs_are_skipped(tmp_path: Path) -> None:
    prompt = tmp_path / "p.txt"
    prompt.write_text("The captain looked at the sea. Note: Clara holds 583. What holds Clara?")
    source = record("demo", [prompt], output=tmp_path / "t", max_new_tokens=4, store="qkv")
    made = replay(source, ["window"], "40%", output=tmp_path / "r", closed=ClosedLoopOptions())
    assert [run.loop for run in made.info.runs] == ["open", "closed"]
    again = rescore(made, source, output=tmp_path / "s")
    assert [run.loop for run in again.info.runs] == ["open"]
    kept = sorted_fidelity(made)
    first = kept[kept["layer"] == 0]
    one, other = (first[first["run"] == run].drop(columns="run").reset_index(drop=True) for run in (0, 1))
    assert (one["output_error"] > 0.1).any()
    pd.testing.assert_frame_equal(one, other, rtol=0, atol=1e-4)  # nothing before the first layer has been evicted
    expected = kept[kept["run"] == 0].reset_index(drop=True)
    assert np.isfinite(expected["retained_mass"]).all()
    pd.testing.assert_frame_equal(sorted_fidelity(again), expected, rtol=0, atol=1e-6)
    made.info = replace(made.info, runs=made.info.runs[1:])
    with pytest.raises(UsageError, match="has closed runs only"):
        rescore(made, source, output=tmp_path / "x")
