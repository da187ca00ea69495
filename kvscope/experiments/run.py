"""Run an experiment on this machine, and summarise it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from kvscope.core.experiment_records import EXPERIMENT, NO_TRACE, ExperimentRecord, Failure
from kvscope.core.json_records import plain
from kvscope.core.output import replace_file, require_free
from kvscope.core.progress import Progress
from kvscope.core.version import __version__
from kvscope.experiments.cells import Done
from kvscope.experiments.execute import UnitResult, run_unit
from kvscope.experiments.plan import ExperimentPlan, ReplayUnit, Unit
from kvscope.experiments.workload import weight
from kvscope.kernels.device import torch_device
from kvscope.model.kept import keep_loaded
from kvscope.results.experiment import pool

Update = Callable[[float, str], None]  # share of the whole that is done, and what is being done


def run_here(plan: ExperimentPlan, update: Update | None = None) -> UnitResult:
    """Make every cell that is not done, one after the other, and return what failed.

    All traces of a model are recorded before its replays, so that it is loaded once for both.

    Parameters
    ----------
    plan : ExperimentPlan
        The plan.
    update : callable, optional
        Called with the share of the work that is done, and what is being done.

    Raises
    ------
    UsageError
        If the device cannot be used.
    KvscopeError, OSError, Exception
        As `run_unit`. Finished cells stay.
    """
    torch_device(plan.device)
    result = UnitResult()
    units = in_order(plan)
    total = sum(map(weight, units)) or 1.0
    before = 0.0
    with keep_loaded():
        for unit in units:
            if isinstance(unit, ReplayUnit) and not unit.cell.done:
                result.failed.append(without_trace(unit))
            else:
                result.add(run_unit(unit, _progress(update, before, weight(unit), total, unit.title)))
            before += weight(unit)
    return result


def in_order(plan: ExperimentPlan) -> list[Unit]:
    """Return what is to be made: for each model its traces, then its replays."""
    traces, replays = plan.traces(), plan.replays(Done(plan.store))
    return [
        unit
        for model in plan.experiment.models
        for units in (traces, replays)
        for unit in units
        if unit.cell.model == model
    ]


def without_trace(unit: ReplayUnit) -> Failure:
    """Return the failure of a replay whose trace could not be recorded."""
    return Failure(unit.title, NO_TRACE, "See the failure of the trace.")


def summarise(plan: ExperimentPlan, result: UnitResult) -> ExperimentRecord:
    """Return the summary of everything of a plan that is done.

    The same results give the same summary, wherever and in which order they were made.
    """
    found = list(plan.results(Done(plan.store)))
    pooled = pool(found)
    return ExperimentRecord(
        name=plan.experiment.name,
        spec=plain(plan.experiment),
        versions={"kvscope": __version__},
        metrics=pooled.metrics,
        runs=pooled.runs,
        verdicts=pooled.verdicts,
        replays=tuple(dict.fromkeys(record.replay for record, _ in found)),
        failed=tuple(sorted(result.failed, key=lambda one: one.cell)),
        skipped=dict(sorted(result.skipped.items())),
    )


def require_output(summary: Path, pages: Sequence[Path], *, force: bool) -> None:
    """Raise an error if the summary would replace a file that is not an experiment's.

    Raises
    ------
    OutputExists
        If there is a page without a summary beside it, and `force` is off.
    ResultError
        If there is another kind of file.
    """
    if force:
        return
    if summary.exists():
        EXPERIMENT.read(summary, ExperimentRecord, example="Name another with -o.")
        return
    for page in pages:
        require_free(page, force=False)


def write_summary(record: ExperimentRecord, file: Path) -> None:
    """Write a summary in place of an older one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, EXPERIMENT.text(record).encode())


def _progress(update: Update | None, before: float, own: float, total: float, title: str) -> Progress | None:
    if update is None:
        return None
    update(before / total, title)
    return lambda share: update((before + own * min(share, 1.0)) / total, title)
