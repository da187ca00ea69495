"""Which unit goes where: models that are loaded, traces that replays wait for, workers that die. No Ray is needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from kvscope.core.experiment_records import Failure
from kvscope.core.options import Prefill
from kvscope.experiments.cells import Store, Texts, TraceCell
from kvscope.experiments.execute import UnitResult
from kvscope.experiments.experiment import Experiment, ModelEntry
from kvscope.experiments.plan import ReplayUnit, RunRequest, TraceUnit, Unit
from kvscope.experiments.schedule import RETRIES, Ended, Schedule, work_off

STORE = Store(Path("traces"), Path("reports"))
BROKEN = Failure("a", "wrong", "correct it")


def experiment(models: Sequence[str]) -> Experiment:
    return Experiment(
        name="some",
        models=tuple(ModelEntry(model=name) for name in models),
        tasks=("needle",),
        lengths=(64,),
        policies=("h2o",),
    )


def units_of(lengths: Mapping[str, Sequence[int]], *, traced: bool = False) -> list[Unit]:
    """Return a trace of each length for each model, and a replay of each; only the replays of traces that are there."""
    owner = experiment(list(lengths))
    request = RunRequest("h2o", "h2o", "20%", "0" * 64, False)
    traces: list[Unit] = []
    replays: list[Unit] = []
    for model in owner.models:
        for length in lengths[model.model]:
            texts = Texts(f"needle {length}", "needle", length)
            cell = TraceCell(model, texts, f"{model.model}{length}", Path(f"traces/{model.model}-{length}"))
            traces.append(TraceUnit(owner, cell, "cpu"))
            replays.append(ReplayUnit(owner, cell, Prefill.full, (request,), STORE, "cpu"))
    return replays if traced else traces + replays


def name(unit: Unit | None) -> str | None:
    if unit is None:
        return None
    return f"{'trace' if isinstance(unit, TraceUnit) else 'replay'} {unit.cell.address}"


class Workers:
    """A pool in which every unit takes one call of `wait`, and what happens to a unit is as the test says.

    `fate` gets the name of a unit and how often it was started: it returns what becomes of it, or None if its worker
    dies.
    """

    def __init__(self, count: int, fate: Callable[[str, int], UnitResult | None]) -> None:
        self.fate = fate
        self.started: list[tuple[str, str]] = []
        self._idle = [f"worker {number}" for number in range(count)]
        self._busy: dict[str, str] = {}
        self._number = count

    def idle(self) -> Sequence[str]:
        return tuple(self._idle)

    def start(self, worker: str, unit: Unit) -> None:
        self._idle.remove(worker)
        made = name(unit)
        assert made is not None
        self._busy[worker] = made
        self.started.append((worker, made))

    def wait(self) -> Sequence[Ended]:
        assert self._busy, "nothing runs: the experiment would wait for ever"
        worker, unit = next(iter(self._busy.items()))
        del self._busy[worker]
        result = self.fate(unit, sum(made == unit for _, made in self.started))
        if result is None:
            self._idle.append(f"worker {self._number}")
            self._number += 1
            return [Ended(worker, None, "killed")]
        self._idle.append(worker)
        return [Ended(worker, result)]

    def shares(self) -> Mapping[str, float]:
        return dict.fromkeys(self._busy, 0.5)


def fine(unit: str, attempt: int) -> UnitResult:
    return UnitResult()


@pytest.mark.parametrize("count", [1, 2, 3, 10])
def test_every_unit_is_made_once_and_replays_after_their_traces(count: int) -> None:
    units = units_of({"a": (64, 128, 256), "b": (64, 128)})
    pool = Workers(count, fine)
    assert work_off(units, pool) == UnitResult()
    made = [unit for _, unit in pool.started]
    assert sorted(made) == sorted(str(name(unit)) for unit in units)
    ends: list[str] = []
    for unit in made:  # units end in the order in which they start
        if unit.startswith("replay"):
            assert unit.replace("replay", "trace") in ends or count > 1
        ends.append(unit)


def test_a_replay_is_not_ready_before_its_trace() -> None:
    schedule = Schedule(units_of({"a": (64, 128)}))
    assert [name(schedule.next(f"w{number}")) for number in range(3)] == ["trace a128", "trace a64", None]
    schedule.made("w1", UnitResult())
    assert name(schedule.next("w1")) == "replay a64" and schedule.next("w2") is None
    schedule.made("w0", UnitResult())
    assert name(schedule.next("w2")) == "replay a128" and schedule.next("w0") is None
    assert not schedule.finished
    schedule.made("w1", UnitResult())
    schedule.made("w2", UnitResult())
    assert schedule.finished


def test_replays_of_traces_that_are_there_start_at_once() -> None:
    schedule = Schedule(units_of({"a": (64, 128)}, traced=True))
    assert [name(schedule.next(f"w{number}")) for number in range(2)] == ["replay a128", "replay a64"]


def test_a_worker_keeps_to_its_model_and_then_takes_what_fewest_have() -> None:
    pool = Workers(2, fine)
    work_off(units_of({"a": (64, 128, 256), "b": (64, 128, 256)}), pool)
    of = {worker: [unit.split()[1][0] for who, unit in pool.started if who == worker] for worker, _ in pool.started}
    assert of == {"worker 0": ["a"] * 6, "worker 1": ["b"] * 6}, "each loads one model"
    pool = Workers(2, fine)
    work_off(units_of({"a": (64,), "b": (64, 128, 256, 512)}), pool)
    loads = [unit.split()[1][0] for who, unit in pool.started if who == dict(map(reversed, pool.started))["trace a64"]]
    assert "".join(loads).startswith("aab"), "helps with the other model when its own is done"


def test_a_trace_that_failed_has_no_replays_and_the_others_have() -> None:
    pool = Workers(2, lambda unit, _: UnitResult([BROKEN] if unit == "trace a64" else []))
    result = work_off(units_of({"a": (64, 128)}), pool)
    assert ("replay a64" not in dict(pool.started).values()) and len(pool.started) == 3
    assert result.failed == [
        BROKEN,
        Failure(
            "replay of a, needle 64, full prefill", "its trace could not be recorded", "See the failure of the trace."
        ),
    ]


def test_the_unit_of_a_worker_that_died_goes_to_another() -> None:
    lines: list[str] = []
    pool = Workers(2, lambda unit, attempt: None if (unit, attempt) == ("replay a64", 1) else UnitResult())
    assert work_off(units_of({"a": (64, 128)}), pool, None, lines.append) == UnitResult()
    first, second = (worker for worker, unit in pool.started if unit == "replay a64")
    assert first != second and len(pool.started) == 5
    assert lines == ["a worker died while it made the replay of a, needle 64, full prefill: killed"]


@pytest.mark.parametrize("kind", ["trace", "replay"])
def test_a_unit_whose_workers_die_is_a_failure_in_the_end(kind: str) -> None:
    pool = Workers(2, lambda unit, _: None if unit == f"{kind} a64" else UnitResult())
    result = work_off(units_of({"a": (64, 128), "b": (64,)}), pool)
    assert sum(unit == f"{kind} a64" for _, unit in pool.started) == 1 + RETRIES
    assert {unit for _, unit in pool.started} >= {"trace a128", "replay a128", "trace b64", "replay b64"}
    first = result.failed[0]
    assert first.cell.startswith(f"{kind} of a, needle 64")
    assert (first.what, len(result.failed)) == (
        "3 workers died while they made it: killed",
        2 if kind == "trace" else 1,
    )


def test_results_are_added_up() -> None:
    made = {"replay a64": UnitResult([BROKEN], {"x": "no"}, ["r1"]), "replay a128": UnitResult([], {"y": "no"}, ["r2"])}
    result = work_off(units_of({"a": (64, 128)}), Workers(2, lambda unit, _: made.get(unit, UnitResult())))
    assert (result.failed, result.skipped, sorted(result.replays)) == ([BROKEN], {"x": "no", "y": "no"}, ["r1", "r2"])


def test_progress_rises_to_one_and_names_what_is_made() -> None:
    seen: list[tuple[float, str]] = []
    work_off(units_of({"a": (64, 65, 66)}), Workers(3, fine), lambda share, title: seen.append((share, title)))
    shares = [share for share, _ in seen]
    assert shares == sorted(shares) and 0 < shares[0] < 0.5 and shares[-1] == pytest.approx(1)
    assert seen[0][1] == "trace of a, needle 65 and 1 more" and seen[-1][1] == "waiting for workers"
