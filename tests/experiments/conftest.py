"""A small experiment with the bundled model, run once, and the tools to run others."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kvscope.core.experiment_records import ExperimentRecord
from kvscope.experiments.cells import Store
from kvscope.experiments.experiment import Experiment, ModelEntry
from kvscope.experiments.plan import ExperimentPlan, make_plan
from kvscope.experiments.run import run_here, summarise

SMALL = Experiment(
    name="small",
    models=(ModelEntry(model="demo"),),
    tasks=("needle:wording=notes", "key-value"),
    lengths=(100,),
    examples=2,
    max_new_tokens=6,
    policies=("h2o", "a2sf:alpha=0.7", "full"),
    budgets=("30%", "60%"),
    device="cpu",
)
Make = Callable[[Experiment], ExperimentRecord]


def plan_in(folder: Path, experiment: Experiment) -> ExperimentPlan:
    return make_plan(experiment, Store.under(folder / "traces", folder / "reports"), "cpu")


def run_in(folder: Path, experiment: Experiment) -> ExperimentRecord:
    plan = plan_in(folder, experiment)
    return summarise(plan, run_here(plan))


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExperimentRecord]:
    """The folder and the summary of the small experiment; it is not to be changed."""
    folder = tmp_path_factory.mktemp("experiment")
    return folder, run_in(folder, SMALL)


def with_(**changes: object) -> Experiment:
    """Return the small experiment with other values."""
    return replace(SMALL, **changes)  # type: ignore[arg-type]
