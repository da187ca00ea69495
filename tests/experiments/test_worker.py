"""A worker in this process: what it refuses to start with, what it makes, and how it stops."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from kvscope.experiments import worker as module
from kvscope.experiments.cells import Done, Store
from kvscope.experiments.execute import UnitResult
from kvscope.experiments.experiment import Experiment, ModelEntry
from kvscope.experiments.plan import TraceUnit, make_plan
from kvscope.experiments.worker import Surroundings, Worker, await_file


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Worker:
    monkeypatch.chdir(tmp_path)  # the worker changes it
    made = Worker()
    monkeypatch.setattr("kvscope.model.kept._SLOTS", [])  # the next test has none
    return made


def surroundings(folder: Path) -> Surroundings:
    (folder / "cells").mkdir()
    (folder / "cells" / "marker").write_text("abc")
    return Surroundings(str(folder), {"cells/marker": "abc"})


def unit_in(folder: Path) -> TraceUnit:
    experiment = Experiment(
        name="some",
        models=(ModelEntry(model="demo"),),
        tasks=("needle:wording=notes",),
        lengths=(100,),
        examples=1,
        max_new_tokens=2,
        steps=("trace",),
    )
    return make_plan(experiment, Store.under(folder / "traces", folder / "reports"), "cpu").traces()[0]


def test_paths_are_relative_to_the_folder_of_the_command(worker: Worker, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    assert worker.start(surroundings(folder)) is None
    assert Path.cwd() == folder


@pytest.mark.parametrize("wrong", ["missing", "another content"])
def test_a_folder_that_is_not_shared_is_refused(worker: Worker, tmp_path: Path, wrong: str) -> None:
    needed = surroundings(tmp_path)
    if wrong == "missing":
        (tmp_path / "cells" / "marker").unlink()
    else:
        (tmp_path / "cells" / "marker").write_text("of this machine")
    error = worker.start(needed)
    assert error is not None and f"cannot read and write {tmp_path / 'cells'}" in error.what
    assert error.todo == "Run the experiment in a folder that all machines share, at the same path on each."


def test_another_version_is_refused(worker: Worker, tmp_path: Path) -> None:
    error = worker.start(replace(surroundings(tmp_path), version="0.0.1"))
    assert error is not None and "and this is 0.0.1" in error.what and "same version" in error.todo


def test_a_trace_that_is_there_is_left(worker: Worker, tmp_path: Path) -> None:
    unit = unit_in(tmp_path)
    assert worker.make(unit) == UnitResult() and unit.cell.done and worker.share() == 1.0
    before = (unit.cell.path / "trace.json").stat().st_mtime_ns
    assert worker.make(unit) == UnitResult()
    assert (unit.cell.path / "trace.json").stat().st_mtime_ns == before


def test_a_stopped_unit_leaves_nothing(worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unit, begun = unit_in(tmp_path), threading.Event()

    def progress(_: float) -> None:
        begun.set()
        time.sleep(0.05)

    monkeypatch.setattr(worker, "_progress", progress)
    results: list[UnitResult | None] = []
    thread = threading.Thread(target=lambda: results.append(worker.make(unit)))
    thread.start()
    assert begun.wait(60)
    worker.stop()
    thread.join(30)
    assert results == [None] and not unit.cell.done
    assert list(unit.cell.path.parent.glob("*.incomplete")) == []
    worker.stop()  # nothing is made: nothing happens
    assert worker.make(unit) == UnitResult() and unit.cell.done


def test_a_late_file_is_waited_for(tmp_path: Path) -> None:
    file = tmp_path / "late"
    timer = threading.Timer(0.5, lambda: file.write_text("here"))
    timer.start()
    assert await_file(file, 20) and not await_file(tmp_path / "never", 0.3)
    timer.join()


def test_a_replay_waits_for_a_trace_that_another_machine_wrote(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []
    monkeypatch.setattr(module, "await_file", lambda file: seen.append(file) or True)
    unit = unit_in(tmp_path)
    plan = make_plan(
        replace(unit.experiment, steps=("trace", "replay"), policies=("h2o",)),
        Store.under(tmp_path / "traces", tmp_path / "reports"),
        "cpu",
    )
    assert worker.make(unit) == UnitResult() and seen == []
    (replay,) = plan.replays(Done(plan.store))
    result = worker.make(replay)
    assert seen == [unit.cell.path / "trace.json"]
    assert (
        result is not None and result.failed == [] and (plan.store.replays / result.replays[0] / "run.json").is_file()
    )
