"""How long an experiment takes: short examples of each model are traced and replayed, and their time is scaled."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kvscope.core.errors import KvscopeError
from kvscope.experiments.cells import Store
from kvscope.experiments.execute import model_source, run_unit
from kvscope.experiments.experiment import Experiment
from kvscope.experiments.plan import ExperimentPlan, ReplayUnit, TraceUnit, Unit, make_plan
from kvscope.experiments.workload import lengths_of
from kvscope.model.kept import keep_loaded
from kvscope.model.loading import load
from kvscope.model.prompt_files import read_prompts

FEW, MORE = 1, 3  # examples of the two measurements


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


@dataclass(frozen=True)
class _Rate:
    """Seconds that any unit of a kind takes, and seconds for each of its steps."""

    each: float
    step: float

    @classmethod
    def of(cls, few: tuple[float, float], more: tuple[float, float]) -> _Rate:
        """Return the rate from steps and seconds of two measurements; of nothing it is nothing."""
        if not more[0]:
            return cls(0.0, 0.0)
        step = max((more[1] - few[1]) / max(more[0] - few[0], 1), 0.0) or more[1] / more[0]
        return cls(max(few[1] - step * few[0], 0.0), step)

    def seconds(self, steps: float) -> float:
        return self.each + self.step * steps


def estimate(plan: ExperimentPlan, units: Sequence[Unit]) -> Estimate:
    """Return how long units take, from examples that are traced and replayed for each model, in a temporary folder.

    The examples have the shortest length of the experiment, and its first policy and budgets; time is taken to grow
    with tokens and runs. For long texts that is too little, because attention grows with the square of the length.
    """
    seconds = 0.0
    for model in dict.fromkeys(unit.cell.model for unit in units):
        try:
            with keep_loaded():
                trace, replay = _measured(replace(plan.experiment, models=(model,)), plan.device)
        except KvscopeError as error:
            return Estimate(None, error.what)
        for unit in units:
            if unit.cell.model == model:
                rate = trace if isinstance(unit, TraceUnit) else replay
                seconds += rate.seconds(_steps(unit))
    return Estimate(seconds, "from a few short examples of each model")


def _steps(unit: Unit) -> float:
    """Return what a unit's time is taken to grow with: tokens, and for a replay tokens of all runs."""
    tokens = sum(lengths_of(unit.experiment, unit.cell))
    return float(tokens if isinstance(unit, TraceUnit) else tokens * len(unit.requests))


def _measured(experiment: Experiment, device: str) -> tuple[_Rate, _Rate]:
    """Return how long traces and replays take."""
    with tempfile.TemporaryDirectory() as folder:
        small, large = (_pilot(experiment, Path(folder), count) for count in (FEW, MORE))
        _timed(small, Path(folder) / "first", device)  # loads and compiles what the others find ready
        few, more = (_timed(one, Path(folder) / str(n), device) for n, one in enumerate((small, large)))
    return _Rate.of(few[0], more[0]), _Rate.of(few[1], more[1])


def _pilot(experiment: Experiment, folder: Path, count: int) -> Experiment:
    """Return an experiment with so many short examples, and so many budgets at most."""
    if experiment.tasks:
        pilot = replace(experiment, tasks=experiment.tasks[:1], lengths=(min(experiment.lengths),), prompts=())
    else:
        texts = read_prompts([Path(experiment.prompts[0])], None, experiment.field, experiment.template)
        files = [folder / f"{count}-{number}.txt" for number, _ in enumerate(texts[:count])]
        for file, text in zip(files, texts, strict=False):
            file.write_text(text.text, encoding="utf-8")
        steps = tuple(step for step in experiment.steps if step != "generate")  # these have no answers
        pilot = replace(experiment, prompts=tuple(map(str, files)), field=None, template=None, steps=steps)
    return replace(
        pilot,
        examples=count,
        seeds=experiment.seeds[:1],
        policies=experiment.policies[:1],
        budgets=experiment.budgets[-count:],
        prefill=experiment.prefill[:1],
    )


def _timed(pilot: Experiment, folder: Path, device: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return steps and seconds of the traces of a pilot, and of its replays."""
    plan = make_plan(pilot, Store.under(folder, folder), device)
    traces = plan.traces()
    load(model_source(traces[0]))
    replays = [
        ReplayUnit(pilot, cell, prefill, requests, plan.store, device)
        for (cell, prefill), requests in plan.requests.items()
    ]
    return _time_of(traces), _time_of(replays)


def _time_of(units: Sequence[Unit]) -> tuple[float, float]:
    started = time.perf_counter()
    for unit in units:
        for failure in run_unit(unit).failed:
            raise KvscopeError(failure.what, failure.todo)
    return sum(map(_steps, units)), time.perf_counter() - started
