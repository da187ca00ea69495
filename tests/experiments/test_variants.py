"""Quantised caches and merging rules in an experiment: the runs that a single command makes."""

from pathlib import Path

import pytest

from kvscope.core.errors import UsageError
from kvscope.core.experiment_records import ExperimentRecord
from kvscope.core.options import ClosedLoopOptions, OutputOptions, PlanOptions, ReplayOptions
from kvscope.experiments.cells import Done, Store
from kvscope.experiments.spec import read_experiment
from kvscope.replay.compile import compile_replay
from kvscope.results.store import Replay
from kvscope.trace.reader import open_trace
from tests.experiments.conftest import plan_in, run_in, with_

KIVI = "int4:kivi(group=16,residual=16)"
STEPS = ("trace", "replay", "closed-loop")
ONE = {"tasks": ("needle:wording=notes",), "examples": 1, "steps": STEPS, "budgets": ("30%",)}


def single(folder: Path, policies: list[str], **plan: tuple[str, ...]) -> Replay:
    """Return what one command replays over the only trace of an experiment."""
    (trace,) = (path for path in (folder / "traces" / "cells").iterdir() if path.is_dir())
    options = ReplayOptions(plan=PlanOptions(**plan), closed=ClosedLoopOptions(), device="cpu")
    return compile_replay(open_trace(trace), policies, "30%", options).execute(OutputOptions(folder / "single"))


def compared(record: ExperimentRecord, replay: Replay) -> list[str]:
    """Compare every row with the runs of a replay that have its label, and return the labels."""
    for row in record.runs:
        runs = {run.loop: run for run in replay.summary.runs if run.label == row.policy and run.budget == row.budget}
        opened, closed = runs.get("open", runs["closed"]), runs["closed"]  # merging has no open run
        for name in ("perplexity", "perplexity_ratio"):
            assert row.mean(name) == pytest.approx(closed.mean(name), rel=1e-6)
        for name in ("retained_mass", "held_keys", "cache_bytes"):
            expected = opened.mean(name)
            assert row.mean(name) == (None if expected is None else pytest.approx(expected, rel=1e-6)), name
    return [row.policy for row in record.runs]


@pytest.mark.parametrize("store", ["maps", "maps+vectors"])
def test_caches_compose_with_policies_and_budgets(store: str, tmp_path: Path) -> None:
    """Of a trace of maps, quantised caches run in the closed loop alone."""
    caches = ("16bit", KIVI)
    record = run_in(tmp_path, with_(**ONE, policies=("h2o", "full"), cache=caches, store=store))
    assert record.failed == ()
    replay = single(tmp_path, ["h2o", "full"], caches=caches)
    assert compared(record, replay) == ["h2o", f"h2o + {KIVI}", "full", f"full + {KIVI}"]
    sizes = {row.policy: row.mean("cache_bytes") for row in record.runs}
    assert sizes[f"h2o + {KIVI}"] < sizes["h2o"] < sizes["full"], sizes


def test_merging_composes_and_reuses_what_is_done(tmp_path: Path) -> None:
    plain = with_(**ONE, policies=("h2o", "full"))
    assert len(run_in(tmp_path, plain).runs) == 2
    merging = with_(**ONE, policies=("h2o", "full"), merge=("none", "cam", "d2o"))
    missing = plan_in(tmp_path, merging).replays(Done(Store.under(tmp_path / "traces", tmp_path / "reports")))
    assert [one.label for unit in missing for one in unit.requests] == ["h2o + cam", "h2o + d2o"]
    record = run_in(tmp_path, merging)
    assert record.failed == ()
    labels = compared(record, single(tmp_path, ["h2o", "full"], merges=("none", "cam", "d2o")))
    assert sorted(labels) == ["full", "h2o", "h2o + cam", "h2o + d2o"], "the full cache has nothing to merge"
    found = {row.policy: row.mean("perplexity") for row in record.runs}
    assert len(set(found.values())) == 4, found


@pytest.mark.parametrize(
    ("lines", "what"),
    [
        ("cache: [int5]", "cache: "),
        ("cache: [int4:kivi, int4:kivi]", "cache: int4:kivi,int4:kivi names a cache twice"),
        ("cache: 4", "cache"),
        ("merge: [glue]", "merge: "),
        ("merge: [cam, cam]", "merge: cam,cam names a rule twice"),
        ("merge: cam\ncache: [16bit, int4:kivi]", "merge: cam cannot be combined with a cache in int4:kivi"),
        ("merge: cam\nsteps: [trace, replay]", "merge: cam runs in the closed loop alone"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(lines: str, what: str, tmp_path: Path) -> None:
    file = tmp_path / "e.yaml"
    file.write_text(f"model: demo\ntasks: needle\nlengths: 100\npolicies: h2o\n{lines}\n")
    with pytest.raises(UsageError) as error:
        read_experiment(file)
    assert what in error.value.what and "--" not in error.value.what
    assert error.value.todo.strip() and "command" not in error.value.todo
    file.write_text(
        "model: demo\ntasks: needle\nlengths: 100\npolicies: h2o\ncache: int4:kivi\nmerge: none\nbudgets: 20%\n"
    )
    assert (read_experiment(file).cache, read_experiment(file).merge) == (("int4:kivi",), ("none",))
