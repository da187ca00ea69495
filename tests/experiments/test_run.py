"""Running an experiment: the figures, what a stopped run leaves, what fails and what stays."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvscope.core.experiment_records import EXPERIMENT, CellRecord, ExperimentRecord
from kvscope.core.options import Prefill
from kvscope.experiments import execute
from kvscope.experiments.cells import Done, Store
from kvscope.experiments.plan import ReplayUnit, TraceUnit
from kvscope.experiments.run import in_order, run_here, summarise
from kvscope.model import loading
from kvscope.results.store import open_replay
from tests.experiments.conftest import SMALL, plan_in, run_in, with_


def records(folder: Path) -> list[CellRecord]:
    return list(Store.under(folder / "traces", folder / "reports").records())


def test_every_policy_and_budget_has_a_row_for_each_task_and_for_all(made: tuple[Path, ExperimentRecord]) -> None:
    _, record = made
    rows = [(run.task, run.length, run.policy, run.budget, run.sequences) for run in record.runs]
    runs = [(policy, budget) for policy in ("h2o", "a2sf(alpha=0.7)") for budget in SMALL.budgets] + [("full", None)]
    assert rows == [
        *((task, 100, *run, 2) for task in SMALL.tasks for run in runs),
        *((None, None, *run, 4) for run in runs),
    ]
    assert record.failed == () and len(record.replays) == 2


def test_figures_are_those_of_the_replays(made: tuple[Path, ExperimentRecord]) -> None:
    """Brute force: means of steps, heads and layers, and losses of tokens, from the tables of the replays."""
    folder, record = made
    for run in (one for one in record.runs if one.task is None):
        masses, losses, full, scores = [], [], [], []
        for name in record.replays:
            replay = open_replay(folder / "reports" / "cells" / name)
            opened = next(
                r for r in replay.info.runs if (r.label, r.budget, r.loop) == (run.policy, run.budget, "open")
            )
            closed = next(r for r in replay.info.runs if r.open_run == opened.run)
            fidelity = replay.fidelity(opened.run)
            by_head = fidelity.groupby(["sequence", "layer", "head"])["held_keys"].mean()
            masses += by_head.groupby(["sequence", "layer"]).mean().groupby("sequence").mean().tolist()
            tokens = replay.tokens(closed.run)
            losses += tokens["nll_policy"].tolist()
            full += tokens["nll_full"].tolist()
            scores += replay.answers(closed.run)["answer_score"].tolist()
        assert run.mean("held_keys") == pytest.approx(np.mean(masses), rel=1e-6)
        assert run.mean("perplexity") == pytest.approx(np.exp(np.mean(losses)), rel=1e-6)
        assert run.mean("perplexity_ratio") == pytest.approx(np.exp(np.mean(losses) - np.mean(full)), rel=1e-6)
        assert run.mean("answer_score") == np.mean(scores)


def test_policies_together_have_the_figures_of_each_alone(made: tuple[Path, ExperimentRecord], tmp_path: Path) -> None:
    _, record = made
    alone = run_in(tmp_path, with_(policies=("a2sf:alpha=0.7",), budgets=("60%",)))
    ours = [run for run in record.runs if run.policy == "a2sf(alpha=0.7)" and run.budget == "60%"]
    assert list(alone.runs) == ours


def test_what_is_done_is_not_touched(made: tuple[Path, ExperimentRecord]) -> None:
    folder, record = made

    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}

    before = files()
    assert run_in(folder, SMALL) == record and files() == before


def test_the_model_is_loaded_once_for_traces_and_once_for_replays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []
    load = loading._load_name
    monkeypatch.setattr(loading, "_load_name", lambda name, how: (loads.append(how), load(name, how))[1])
    run_in(tmp_path, with_(steps=("trace", "replay", "closed-loop")))
    assert len(loads) == 1, "both load the same"
    from kvscope.core.options import ModelSource

    loading.load(ModelSource("demo"))
    loading.load(ModelSource("demo"))
    assert len(loads) == 3, "outside an experiment nothing is kept"


def test_progress_goes_from_nothing_to_all(tmp_path: Path) -> None:
    plan, seen = plan_in(tmp_path, with_(tasks=SMALL.tasks[:1])), []
    run_here(plan, lambda share, title: seen.append((share, title)))
    shares = [share for share, _ in seen]
    assert shares[0] == 0 and shares == sorted(shares) and shares[-1] == pytest.approx(1)
    assert list(dict.fromkeys(title for _, title in seen)) == [
        "trace of demo, needle:wording=notes 100",
        "replay of demo, needle:wording=notes 100, full prefill",
    ]


def test_an_interrupted_experiment_goes_on(made: tuple[Path, ExperimentRecord], tmp_path: Path) -> None:
    _, record = made

    def stop(share: float, title: str) -> None:
        if title.startswith("replay of demo, key-value") and share > 0.9:
            raise KeyboardInterrupt

    plan = plan_in(tmp_path, SMALL)
    with pytest.raises(KeyboardInterrupt):
        run_here(plan, stop)
    first = records(tmp_path)
    assert [one.replay for one in first] == [one.replay for one in records(made[0]) if "needle" in one.replay]
    assert [type(unit) for unit in in_order(plan)] == [ReplayUnit]
    assert EXPERIMENT.text(summarise(plan, run_here(plan))) == EXPERIMENT.text(record)


@pytest.mark.slow
@pytest.mark.parametrize("cells", [0, 1])
def test_a_killed_experiment_goes_on_to_the_same_bytes(
    made: tuple[Path, ExperimentRecord], tmp_path: Path, cells: int
) -> None:
    """Kill it when so many cells are done, then give the same command again."""
    _, record = made
    (tmp_path / "small.yaml").write_text(
        "model: demo\ntasks: ['needle:wording=notes', key-value]\nlengths: 100\nexamples: 2\nmax_new_tokens: 6\n"
        "policies: [h2o, {a2sf: {alpha: 0.7}}, full]\nbudgets: [30%, 60%]\ndevice: cpu\n"
    )
    command = [sys.executable, "-m", "kvscope", "run", "small.yaml", "--quiet"]
    root = str(Path(__file__).parents[2])
    killed = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": root}, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 120
    watched = tmp_path / ("reports/cells" if cells else "traces/cells")
    while len(list(watched.glob("*.json" if cells else "*/trace.json"))) < 1 and killed.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, "it ended before it could be killed"
    assert not (tmp_path / "reports" / "small.json").exists()
    again = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "reports" / "small.json").read_text() == EXPERIMENT.text(record)
    assert not list(tmp_path.rglob("*.incomplete*"))


BROKEN = """
from dataclasses import dataclass
from kvscope import Policy

@dataclass(frozen=True)
class {name}(Policy):
    def observe(self, step, score):
        {line}
"""


def test_a_policy_that_fails_does_not_fail_the_others(made: tuple[Path, ExperimentRecord], tmp_path: Path) -> None:
    """One raises, one returns no numbers; both are named, and h2o has the figures that it has without them."""
    (tmp_path / "a.py").write_text(BROKEN.format(name="Raises", line="return step.nothing"))
    (tmp_path / "b.py").write_text(BROKEN.format(name="Wrong", line="return score * float('nan')"))
    own = (f"{tmp_path / 'a.py'}:Raises", f"{tmp_path / 'b.py'}:Wrong")
    record = run_in(tmp_path, with_(policies=("h2o", *own), tasks=SMALL.tasks[:1]))
    named = {failure.cell.partition(" at ")[0] for failure in record.failed}
    assert len(record.failed) == 2 and all(any(name in one for one in named) for name in ("Raises", "Wrong")), named
    assert any("has no attribute 'nothing'" in failure.what for failure in record.failed)
    ours = [run.metrics for run in record.runs if run.policy == "h2o"]
    theirs = [run.metrics for run in made[1].runs if run.policy == "h2o" and run.task == SMALL.tasks[0]]
    assert ours == theirs and len(ours) == 2


def test_a_budget_that_is_too_small_fails_alone(tmp_path: Path) -> None:
    record = run_in(
        tmp_path, with_(policies=("streaming-llm:sinks=4", "tova"), budgets=("3", "60%"), tasks=SMALL.tasks[:1])
    )
    assert [failure.cell for failure in record.failed] == [
        "streaming-llm at 3: replay of demo, needle:wording=notes 100, full prefill"
    ]
    assert [(run.policy, run.budget) for run in record.runs] == [
        ("streaming-llm", "60%"),
        ("tova", "3"),
        ("tova", "60%"),
    ]


def test_bounds_run_in_the_open_loop_and_readers_need_their_signals(tmp_path: Path) -> None:
    record = run_in(tmp_path, with_(policies=("belady", "quest", "h2o"), budgets=("60%",), tasks=SMALL.tasks[:1]))
    assert "needs keys" in record.failed[0].what and len(record.failed) == 1
    rows = {run.policy: run for run in record.runs}
    assert rows["belady"].clairvoyant and "perplexity" not in rows["belady"].metrics
    assert rows["belady"].mean("retained_mass") > rows["h2o"].mean("retained_mass")
    assert {verdict.best for verdict in record.verdicts} == {("h2o",)}, "bounds are not ranked"
    alone = run_in(tmp_path / "alone", with_(policies=("belady",), budgets=("60%",), tasks=SMALL.tasks[:1]))
    assert alone.failed == () and alone.runs[0].metrics == rows["belady"].metrics


def test_all_policies_are_those_that_can_run(tmp_path: Path) -> None:
    record = run_in(tmp_path, with_(policies=("all",), budgets=("60%",), tasks=SMALL.tasks[:1], steps=("replay",)))
    assert record.failed == () and "quest" in record.skipped and "tova" not in record.skipped
    assert {run.policy for run in record.runs} >= {"tova", "h2o", "belady", "window"}


def test_a_task_that_cannot_be_made_is_named_and_its_replay_too(tmp_path: Path) -> None:
    record = run_in(tmp_path, with_(lengths=(10,), tasks=SMALL.tasks[:1]))
    trace, replay = sorted(record.failed, key=lambda one: one.cell, reverse=True)
    assert "the shortest prompt has" in trace.what
    assert replay.what == "its trace could not be recorded" and record.runs == ()


def test_both_prefills_and_several_models_are_kept_apart(tmp_path: Path) -> None:
    models = (SMALL.models[0], replace(SMALL.models[0], dtype="float64"))
    both = with_(prefill=(Prefill.full, Prefill.stream), policies=("tova",), budgets=("60%",), tasks=SMALL.tasks[:1])
    record = run_in(tmp_path, replace(both, steps=("replay",), models=models))
    assert [(run.model, run.prefill, run.sequences) for run in record.runs] == [
        (model, prefill, 2) for model in ("demo", "demo (dtype=float64)") for prefill in ("full", "stream")
    ]
    assert record.runs[0].mean("retained_mass") != record.runs[1].mean("retained_mass")


def test_a_full_disk_ends_it_and_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, write = plan_in(tmp_path, SMALL), execute.replace_file

    def full(path: Path, content: bytes) -> None:
        if path.suffix == ".json" and "key-value" in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, content)

    monkeypatch.setattr(execute, "replace_file", full)
    with pytest.raises(OSError, match="No space left"):
        run_here(plan)
    monkeypatch.undo()
    assert [one.replay.startswith("demo-needle") for one in records(tmp_path)] == [True]
    assert summarise(plan, run_here(plan)).failed == ()


def test_units_are_plain_data(tmp_path: Path) -> None:
    """Another process can run a unit: it is pickled whole."""
    import pickle

    plan = plan_in(tmp_path, SMALL)
    units = [*plan.traces(), *plan.replays(Done(plan.store))]
    assert {type(unit) for unit in units} == {TraceUnit, ReplayUnit}
    assert pickle.loads(pickle.dumps(units)) == units


def test_prompts_of_files_are_cells_too(tmp_path: Path) -> None:
    lines = [
        {"prompt": "Note: Fred has 317.\nQuestion: what has Fred? Answer: Fred has", "answers": ["317"], "task": "t"}
    ]
    (tmp_path / "notes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "story.txt").write_text("The captain looked at the sea. It was late, and the ship had not come.")
    files = tuple(str(tmp_path / name) for name in ("notes.jsonl", "story.txt"))
    record = run_in(
        tmp_path, with_(tasks=(), prompts=files, steps=("replay", "closed-loop"), policies=("tova",), budgets=("60%",))
    )
    assert [(run.task, run.length, run.sequences) for run in record.runs] == [
        ("t", None, 1),
        ("story.txt", None, 1),
        (None, None, 2),
    ]
