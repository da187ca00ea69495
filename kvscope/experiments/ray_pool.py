"""The workers of a Ray cluster: each is an actor, and is replaced when it dies."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

from kvscope.core.errors import KvscopeError
from kvscope.experiments.plan import Unit
from kvscope.experiments.schedule import Ended
from kvscope.experiments.worker import Surroundings, Worker

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

LOOK = 0.5  # seconds between two looks at progress
STOP = 20.0  # seconds that interrupted workers have to remove what is unfinished
START = 600.0  # seconds that workers may take to start, while nothing else is done
STARTS = 3  # workers that may fail to start one after the other
DEAD = "The actor is dead because "  # before the reason in Ray's messages


@dataclass(frozen=True)
class Slots:
    """How many workers a cluster has room for, and what each of them takes."""

    count: int
    cpus: int
    gpus: int


class RayPool:
    """Workers on a Ray cluster, each in an actor.

    Parameters
    ----------
    ray : module
        Ray, connected.
    needed : Surroundings
        What every worker needs to find.
    slots : Slots
        What each of them takes.
    count : int
        How many there are.
    """

    def __init__(self, ray: ModuleType, needed: Surroundings, slots: Slots, count: int) -> None:
        threads = str(max(slots.cpus, 1))
        self._ray = ray
        self._needed = needed
        self._class = ray.remote(
            num_cpus=slots.cpus,
            num_gpus=slots.gpus,
            concurrency_groups={"control": 1},  # a thread that answers while a unit is made
            runtime_env={"env_vars": {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"}},  # read by torch
        )(Worker)
        self._what = f"{slots.gpus} GPU" if slots.gpus else f"{slots.cpus} CPUs"
        self._actors: dict[str, ActorHandle] = {}
        self._tasks: dict[ObjectRef, str] = {}  # of `start` and `make`
        self._asked: dict[ObjectRef, str] = {}  # of `share`
        self._starting: set[str] = set()
        self._idle: list[str] = []
        self._shares: dict[str, float] = {}
        self._failed = 0  # starts, one after the other
        self._number = 0
        self._latest = time.monotonic()  # when something ended
        for _ in range(count):
            self._add()

    def idle(self) -> Sequence[str]:
        """Return the workers that can take a unit."""
        return tuple(self._idle)

    def start(self, worker: str, unit: Unit) -> None:
        """Let an idle worker make a unit."""
        self._idle.remove(worker)
        self._shares[worker] = 0.0
        self._tasks[self._actors[worker].make.remote(unit)] = worker

    def wait(self) -> Sequence[Ended]:
        """Return the units that ended; errors of a unit that would end a local run are raised."""
        ready, _ = self._ray.wait(list(self._tasks), num_returns=1, timeout=LOOK)
        ended = []
        for task in ready:
            self._latest = time.monotonic()
            worker = self._tasks.pop(task)
            if worker in self._starting:
                self._started(worker, task)
            else:
                ended.append(self._ended(worker, task))
        if set(self._tasks.values()) <= self._starting and not self._idle:
            self._require_recent()
        return ended

    def shares(self) -> Mapping[str, float]:
        """Return how much of its unit each busy worker has done, as of the last time that it answered."""
        answered, _ = (
            self._ray.wait(list(self._asked), num_returns=len(self._asked), timeout=0) if self._asked else ([], 0)
        )
        for question in answered:
            worker = self._asked.pop(question)
            try:
                self._shares[worker] = self._ray.get(question)
            except self._ray.exceptions.RayError:
                self._shares.pop(worker, None)  # it died: `wait` says so
        for worker in set(self._tasks.values()) - self._starting - set(self._asked.values()):
            self._asked[self._actors[worker].share.options(concurrency_group="control").remote()] = worker
        return self._shares

    @contextmanager
    def closed_at_end(self) -> Iterator[None]:
        """End all workers with the block; what they make then is interrupted, and what is unfinished removed."""
        try:
            yield
        finally:
            busy = {task: worker for task, worker in self._tasks.items() if worker not in self._starting}
            for worker in busy.values():
                self._actors[worker].stop.options(concurrency_group="control").remote()
            if busy:
                self._ray.wait(list(busy), num_returns=len(busy), timeout=STOP)
            for actor in self._actors.values():
                self._ray.kill(actor)

    def _add(self) -> None:
        self._number += 1
        worker = f"worker {self._number}"
        self._actors[worker] = self._class.remote()
        self._starting.add(worker)
        self._tasks[self._actors[worker].start.remote(self._needed)] = worker

    def _replace(self, worker: str) -> None:
        """Have another worker in place of one that died, or that cannot be reached."""
        self._shares.pop(worker, None)
        self._ray.kill(self._actors.pop(worker))
        self._add()

    def _started(self, worker: str, task: ObjectRef) -> None:
        """Take a new worker; raises KvscopeError if it lacks something, or several could not start."""
        self._starting.remove(worker)
        try:
            missing = self._ray.get(task)
        except self._ray.exceptions.RayError as error:
            self._failed += 1
            if self._failed >= STARTS:
                raise KvscopeError(
                    f"workers of the Ray cluster cannot start: {_reason(error)}",
                    "Install kvscope in the Python of every machine, of the same version.",
                ) from error
            self._replace(worker)
            return
        if missing is not None:
            raise missing
        self._failed = 0
        self._idle.append(worker)

    def _ended(self, worker: str, task: ObjectRef) -> Ended:
        errors = self._ray.exceptions
        try:
            result = self._ray.get(task)
        except errors.RayTaskError as error:
            if isinstance(error.cause, KvscopeError | OSError):  # as a full disk
                raise error.cause from error
            raise
        except errors.RayError as error:
            self._replace(worker)
            return Ended(worker, None, _reason(error))
        self._idle.append(worker)
        return Ended(worker, result)

    def _require_recent(self) -> None:
        """Raise KvscopeError if no worker has started for so long that none will."""
        if time.monotonic() - self._latest > START:
            raise KvscopeError(
                f"no worker of the Ray cluster started in {START:.0f} s: each takes {self._what}",
                "See what is free: ray status",
            )


def _reason(error: BaseException) -> str:
    """Return in a line why Ray lost a worker, without what it says of its own objects."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    dead = [line for line in lines if line.startswith(DEAD)]
    text = dead[0].removeprefix(DEAD) if dead else (lines or [type(error).__name__])[-1]
    return textwrap.shorten(text, 160, placeholder=" ...")
