"""What a cell depends on: what changes its address, what does not, and what is to do again after a change."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from kvscope.core.errors import ResultError, UsageError
from kvscope.core.experiment_records import ExperimentRecord
from kvscope.core.options import Prefill
from kvscope.experiments.cells import Done, Store, model_identity
from kvscope.experiments.experiment import Experiment, ModelEntry
from kvscope.experiments.plan import ExperimentPlan
from kvscope.model.names import demo_folder
from tests.experiments.conftest import SMALL, plan_in, run_in, with_


def traces(plan: ExperimentPlan) -> set[str]:
    return {cell.address for cell in plan.cells}


def keys(plan: ExperimentPlan) -> set[str]:
    return {one.key for requests in plan.requests.values() for one in requests}


@pytest.mark.parametrize(
    "change",
    [
        {"examples": 3},
        {"max_new_tokens": 7},
        {"store": "maps+vectors"},
        {"seeds": (1,)},
        {"lengths": (101,)},
        {"models": (ModelEntry(model="demo", dtype="float64"),)},
    ],
)
def test_a_trace_depends_on_what_is_read_and_stored(tmp_path: Path, change: dict[str, object]) -> None:
    before, after = plan_in(tmp_path, SMALL), plan_in(tmp_path, with_(**change))
    assert not traces(before) & traces(after) and not keys(before) & keys(after)


@pytest.mark.parametrize(
    "change",
    [
        {"policies": ("h2o:recent=3", "tova", "window")},
        {"budgets": ("31%",), "policies": ("h2o", "a2sf:alpha=0.7")},
        {"prefill": (Prefill.stream,)},
        {"metrics": ("retained_mass",)},
        {"accumulate": "float16"},
        {"compress": "step"},
        {"score": "exact"},
    ],
)
def test_a_run_depends_on_its_policy_and_options_and_its_trace_does_not(
    tmp_path: Path, change: dict[str, object]
) -> None:
    before, after = plan_in(tmp_path, SMALL), plan_in(tmp_path, with_(**change))
    assert traces(before) == traces(after) and not keys(before) & keys(after)


@pytest.mark.parametrize("change", [{"name": "other"}, {"steps": ("trace", "replay")}, {"device": "cuda"}])
def test_names_steps_and_devices_change_no_address(tmp_path: Path, change: dict[str, object]) -> None:
    before, after = plan_in(tmp_path, SMALL), plan_in(tmp_path, with_(**change))
    assert traces(before) == traces(after) and keys(before) == keys(after)


def test_the_content_of_files_counts_and_their_place_does_not(tmp_path: Path) -> None:
    prompts, own, hay = (tmp_path / name for name in ("a.txt", "own.py", "hay.txt"))
    code = (
        "from dataclasses import dataclass\nfrom kvscope import Policy\n\n@dataclass(frozen=True)\n"
        "class Mine(Policy):\n    def observe(self, step, score):\n        return step.weights()\n"
    )
    prompts.write_text("One prompt.")
    own.write_text(code)
    hay.write_text("One sentence. " * 20)
    given = with_(prompts=(str(prompts),), policies=(f"{own}:Mine",), haystack=str(hay), steps=("trace", "replay"))
    before = plan_in(tmp_path, given)
    assert keys(plan_in(tmp_path / "elsewhere", given)) == keys(before)
    own.write_text(code + "# changed\n")
    changed = plan_in(tmp_path, given)
    assert traces(changed) == traces(before) and not keys(changed) & keys(before)
    prompts.write_text("Another prompt.")
    assert len(traces(plan_in(tmp_path, given)) & traces(before)) == 2, "those of the tasks"
    hay.write_text("Two sentences. " * 20)
    assert not traces(plan_in(tmp_path, given)) & traces(before)


def test_a_model_is_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(demo_folder(), folder)
    before = model_identity(ModelEntry(model=str(folder)))
    assert model_identity(ModelEntry(model=str(folder))) == before
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 1.0}))
    assert model_identity(ModelEntry(model=str(folder))) != before


def test_only_what_is_missing_is_to_do(made: tuple[Path, ExperimentRecord]) -> None:
    folder, _ = made

    def to_do(experiment: Experiment) -> set[tuple[str, str, str | None]]:
        plan = plan_in(folder, experiment)
        return {
            (unit.cell.texts.task or "", one.label, one.budget)
            for unit in plan.replays(Done(plan.store))
            for one in unit.requests
        }

    tasks = SMALL.tasks
    assert plan_in(folder, SMALL).traces() == [] and to_do(SMALL) == set()
    assert to_do(with_(steps=("trace", "replay"))) == set(), "more than that was done"
    assert to_do(with_(budgets=("30%", "50%"))) == {
        (task, label, "50%") for task in tasks for label in ("h2o", "a2sf(alpha=0.7)")
    }
    assert to_do(with_(policies=("h2o", "tova"))) == {
        (task, "tova", budget) for task in tasks for budget in SMALL.budgets
    }
    longer = plan_in(folder, with_(lengths=(100, 110)))
    assert [unit.cell.texts.length for unit in longer.traces()] == [110, 110]


def test_a_step_that_was_not_done_is_to_do(made: tuple[Path, ExperimentRecord], tmp_path: Path) -> None:
    folder, _ = made
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for file in (tmp_path / "reports" / "cells").glob("*.json"):
        file.unlink()
    plan = plan_in(tmp_path, SMALL)
    assert len(plan.replays(Done(plan.store))) == 2, "a replay without its record is from a run that was killed"


def test_a_record_that_is_damaged_is_refused(made: tuple[Path, ExperimentRecord], tmp_path: Path) -> None:
    shutil.copytree(made[0], tmp_path, dirs_exist_ok=True)
    store = Store.under(tmp_path / "traces", tmp_path / "reports")
    file = next(store.replays.glob("*.json"))
    file.write_text(file.read_text().replace('"seconds": ', '"seconds": 1'))
    with pytest.raises(ResultError, match="is damaged: its checksum differs"):
        Done(store)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"prompts": ("nowhere.txt",)}, "cannot read nowhere.txt"),
        ({"haystack": "nowhere.txt"}, "cannot read nowhere.txt"),
        ({"tasks": ("needle", "needle")}, "twice"),
        ({"lengths": (100, 100)}, "twice"),
    ],
)
def test_a_plan_that_cannot_be_made_is_refused(tmp_path: Path, change: dict[str, object], what: str) -> None:
    with pytest.raises(UsageError, match=what):
        plan_in(tmp_path, with_(**change))


def test_prompts_are_read_before_anything_runs(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "Say it."}\n')
    plan_in(tmp_path, with_(prompts=(str(file),), steps=("trace", "replay", "closed-loop")))
    with pytest.raises(UsageError, match="no right answers"):
        plan_in(tmp_path, with_(prompts=(str(file),)))
    with pytest.raises(UsageError, match="question"):
        plan_in(tmp_path, replace(SMALL, prompts=(str(file),), template="{question}", steps=("trace",)))


def test_a_step_that_is_added_is_done_for_runs_that_lack_it(tmp_path: Path) -> None:
    less = with_(tasks=SMALL.tasks[:1], policies=("tova",), budgets=("60%",), steps=("replay",))
    assert run_in(tmp_path, less).failed == ()
    plan = plan_in(tmp_path, replace(less, steps=("closed-loop",)))
    assert plan.traces() == [] and [len(unit.requests) for unit in plan.replays(Done(plan.store))] == [1]
    more = run_in(tmp_path, replace(less, steps=("closed-loop",)))
    assert "perplexity" in more.metrics and len(more.runs) == 1
    again = plan_in(tmp_path, less)
    assert again.replays(Done(again.store)) == [], "what has more steps has these too"
