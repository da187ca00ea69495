"""How long an experiment takes: one short example of each model is traced and replayed, and its time is scaled."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kvscope.core.errors import KvscopeError
from kvscope.experiments.cells import Store
from kvscope.experiments.execute import model_source, run_unit
from kvscope.experiments.experiment import Experiment
from kvscope.experiments.plan import ExperimentPlan, ReplayUnit, TraceUnit, Unit, make_plan
from kvscope.experiments.workload import lengths_of
from kvscope.model.loading import keep_loaded, load
from kvscope.model.prompt_files import read_prompts


@dataclass(frozen=True)
class Estimate:
    """How long the cells that are not done take.

    Attributes
    ----------
    seconds : float or None
        All of them, one after the other; None where the measurement failed.
    why : str
        What was measured, or why nothing could be.
    """

    seconds: float | None
    why: str


def estimate(plan: ExperimentPlan, units: Sequence[Unit]) -> Estimate:
    """Return how long units take, from one example that is traced and replayed for each model, in a temporary folder.

    The example is the shortest of the experiment, with its first policy and budget; time is taken to grow with tokens
    and runs. For long texts that is too little, because attention grows with the square of the length.
    """
    seconds = 0.0
    for model in dict.fromkeys(unit.cell.model for unit in units):
        own = [unit for unit in units if unit.cell.model == model]
        with tempfile.TemporaryDirectory() as folder, keep_loaded():
            try:
                rates = _measured(replace(plan.experiment, models=(model,)), Path(folder), plan.device)
            except KvscopeError as error:
                return Estimate(None, error.what)
        seconds += sum(_steps(unit) * rates[type(unit)] for unit in own)
    return Estimate(seconds, "from one short example of each model, with the first policy and budget")


def _steps(unit: Unit) -> float:
    """Return what a unit's time is taken to grow with: tokens, and for a replay tokens of all runs."""
    tokens = sum(lengths_of(unit.experiment, unit.cell))
    return float(tokens if isinstance(unit, TraceUnit) else tokens * len(unit.requests))


def _measured(experiment: Experiment, folder: Path, device: str) -> Mapping[type, float]:
    """Return the seconds that one step of a trace and of a replay takes."""
    if experiment.tasks:
        pilot = replace(
            experiment, tasks=experiment.tasks[:1], lengths=(min(experiment.lengths),), examples=1, prompts=()
        )
    else:
        first = read_prompts([Path(experiment.prompts[0])], None, experiment.field, experiment.template)[0]
        file = folder / "prompt.txt"
        file.write_text(first.text, encoding="utf-8")
        pilot = replace(experiment, prompts=(str(file),), field=None, template=None, steps=_without_answers(experiment))
    pilot = replace(
        pilot,
        seeds=experiment.seeds[:1],
        policies=experiment.policies[:1],
        budgets=experiment.budgets[-1:],
        prefill=experiment.prefill[:1],
    )
    plan = make_plan(pilot, Store.under(folder, folder), device)
    rates: dict[type, float] = {}
    (trace,) = plan.traces()
    load(model_source(trace))
    units: list[Unit] = [trace]
    units += [
        ReplayUnit(pilot, cell, prefill, requests, plan.store, device)
        for (cell, prefill), requests in plan.requests.items()
    ]
    for unit in units:
        started = time.perf_counter()
        _require_whole(run_unit(unit))
        rates[type(unit)] = (time.perf_counter() - started) / _steps(unit)
    return rates


def _without_answers(experiment: Experiment) -> tuple[object, ...]:
    return tuple(step for step in experiment.steps if step != "generate")


def _require_whole(result: UnitResult) -> None:
    for failure in result.failed:
        raise KvscopeError(failure.what, failure.todo)
