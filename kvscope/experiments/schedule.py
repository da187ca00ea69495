"""Which unit goes to which worker next: dependencies, loaded models, retries. How workers run is up to a `Pool`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvscope.core.experiment_records import Failure
from kvscope.experiments.cells import TraceCell
from kvscope.experiments.execute import UnitResult
from kvscope.experiments.experiment import ModelEntry
from kvscope.experiments.plan import ReplayUnit, TraceUnit, Unit
from kvscope.experiments.run import Update, without_trace
from kvscope.experiments.workload import weight

RETRIES = 2  # of a unit whose worker died


@dataclass(frozen=True)
class Ended:
    """A unit that a worker no longer works on.

    Attributes
    ----------
    worker : str
        The worker.
    result : UnitResult or None
        What became of the unit; None if the worker died.
    why : str
        Why the worker died.
    """

    worker: str
    result: UnitResult | None
    why: str = ""


class Pool(Protocol):
    """Workers, each of which makes one unit at a time. One that died is replaced by another with a new name."""

    def idle(self) -> Sequence[str]:
        """Return the workers that can take a unit."""

    def start(self, worker: str, unit: Unit) -> None:
        """Let an idle worker make a unit."""

    def wait(self) -> Sequence[Ended]:
        """Return what ended, after a while at most, so that progress can be shown."""

    def shares(self) -> Mapping[str, float]:
        """Return how much of its unit each busy worker has done, from 0 to 1."""


class Schedule:
    """The units of a plan, and where each of them is.

    A replay waits for its trace. A worker gets units of the model that it has loaded as long as there are any, and
    otherwise those of the model that the fewest workers have. Of one model traces come first, because replays wait for
    them, and then what takes longest, so that no long unit is left to the end.

    Parameters
    ----------
    units : sequence of TraceUnit or ReplayUnit
        What is to be made.

    Attributes
    ----------
    result : UnitResult
        What became of the units that have ended.
    """

    def __init__(self, units: Sequence[Unit]) -> None:
        self.result = UnitResult()
        self._weights = {id(unit): weight(unit) for unit in units}
        self._total = sum(self._weights.values()) or 1.0
        self._ended = 0.0
        self._waiting = sorted(units, key=lambda unit: (isinstance(unit, ReplayUnit), -self._weights[id(unit)]))
        self._running: dict[str, Unit] = {}
        self._models: dict[str, ModelEntry] = {}
        self._deaths: Counter[int] = Counter()

    @property
    def finished(self) -> bool:
        """Whether every unit has ended."""
        return not self._waiting and not self._running

    def next(self, worker: str) -> Unit | None:
        """Return the unit that an idle worker is to make now; None if it has to wait for others."""
        traces = {unit.cell for unit in self._unmade() if isinstance(unit, TraceUnit)}
        ready = [unit for unit in self._waiting if isinstance(unit, TraceUnit) or unit.cell not in traces]
        if not ready:
            return None
        own, others = self._models.get(worker), Counter(self._models.values())
        unit = min(ready, key=lambda one: (one.cell.model != own, others[one.cell.model]))  # of equal ones the first
        self._waiting = [one for one in self._waiting if one is not unit]
        self._running[worker] = unit
        self._models[worker] = unit.cell.model
        return unit

    def made(self, worker: str, result: UnitResult) -> None:
        """Take what became of the unit of a worker; a replay whose trace failed is a failure too."""
        unit = self._running.pop(worker)
        self._end(unit, result)

    def lost(self, worker: str, why: str) -> Unit:
        """Return the unit of a worker that died: another one gets it, unless that has happened too often."""
        unit = self._running.pop(worker)
        self._models.pop(worker)
        self._deaths[id(unit)] += 1
        if self._deaths[id(unit)] <= RETRIES:
            self._waiting.insert(0, unit)
        else:
            failure = Failure(
                unit.title,
                f"{RETRIES + 1} workers died while they made it: {why}",
                "Look for the reason in the logs of Ray; often memory does not suffice.",
            )
            self._end(unit, UnitResult([failure]))
        return unit

    def share(self, shares: Mapping[str, float]) -> float:
        """Return the share of all work that is done, from that of each running unit."""
        running = sum(
            self._weights[id(unit)] * min(shares.get(worker, 0.0), 1.0) for worker, unit in self._running.items()
        )
        return (self._ended + running) / self._total

    def title(self) -> str:
        """Return what is being made."""
        units = list(self._running.values())
        more = f" and {len(units) - 1} more" if len(units) > 1 else ""
        return f"{units[0].title}{more}" if units else "waiting for workers"

    def _unmade(self) -> list[Unit]:
        return [*self._waiting, *self._running.values()]

    def _end(self, unit: Unit, result: UnitResult) -> None:
        self._ended += self._weights[id(unit)]
        self.result.add(result)
        if isinstance(unit, TraceUnit) and result.failed:
            self._give_up(unit.cell)

    def _give_up(self, cell: TraceCell) -> None:
        """End the replays of a trace that could not be recorded."""
        hopeless = [unit for unit in self._waiting if isinstance(unit, ReplayUnit) and unit.cell == cell]
        self._waiting = [unit for unit in self._waiting if unit not in hopeless]
        for unit in hopeless:
            self._end(unit, UnitResult([without_trace(unit)]))


def work_off(
    units: Sequence[Unit], pool: Pool, update: Update | None = None, warn: Callable[[str], None] | None = None
) -> UnitResult:
    """Let the workers of a pool make units, and return what failed.

    Parameters
    ----------
    units : sequence of TraceUnit or ReplayUnit
        What is to be made.
    pool : Pool
        The workers.
    update : callable, optional
        Called with the share of the work that is done, and what is being made.
    warn : callable, optional
        Called with a line for each worker that died.
    """
    schedule = Schedule(units)
    while not schedule.finished:
        for worker in pool.idle():
            unit = schedule.next(worker)
            if unit is not None:
                pool.start(worker, unit)
        for ended in pool.wait():
            if ended.result is not None:
                schedule.made(ended.worker, ended.result)
                continue
            unit = schedule.lost(ended.worker, ended.why)
            if warn is not None:
                warn(f"a worker died while it made the {unit.title}: {ended.why}")
        if update is not None:
            update(schedule.share(pool.shares()), schedule.title())
    return schedule.result
