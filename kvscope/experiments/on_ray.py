"""Run an experiment on a Ray cluster: one worker for each GPU, or for as many CPUs as this process has threads.

Ray is imported inside of functions: nothing else needs it.
"""

from __future__ import annotations

import os
import secrets
import socket
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from kvscope.core.errors import KvscopeError, UsageError
from kvscope.core.records import RUN_FILE
from kvscope.core.registry import nearest
from kvscope.experiments.cells import Store
from kvscope.experiments.execute import UnitResult
from kvscope.experiments.plan import ExperimentPlan, TraceUnit, Unit
from kvscope.experiments.run import Update, in_order
from kvscope.experiments.schedule import Ended, work_off
from kvscope.experiments.worker import Surroundings, Worker, await_file
from kvscope.kernels.device import thread_count

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

AUTO, LOCAL = "auto", "local"  # a cluster that runs on this machine, and one that is started for the command
LOOK = 0.5  # seconds between two looks at progress
STOP = 20.0  # seconds that interrupted workers have to remove what is unfinished
START = 600.0  # seconds that workers may take to start, while nothing else is done
STARTS = 3  # workers that may fail to start one after the other
DEAD = "The actor is dead because "  # before the reason in Ray's messages
STORED = 80_000_000  # bytes of Ray's own memory in a cluster that is started here: nothing large is passed through it


@dataclass(frozen=True)
class Slots:
    """How many workers a cluster has room for, and what each of them takes."""

    count: int
    cpus: int
    gpus: int


def run_on_ray(
    plan: ExperimentPlan,
    address: str | None = None,
    update: Update | None = None,
    warn: Callable[[str], None] | None = None,
) -> UnitResult:
    """Make every cell that is not done, on the workers of a Ray cluster, and return what failed.

    The current folder must be there on every machine of the cluster, with the same files.

    Parameters
    ----------
    plan : ExperimentPlan
        The plan.
    address : str, optional
        ``auto`` for the cluster of this machine, ``local`` for one that is started and ended here, or ``HOST:PORT``.
        By default that of ``RAY_ADDRESS``, else the cluster of this machine, else one that is started.
    update : callable, optional
        Called with the share of the work that is done, and what is being made.
    warn : callable, optional
        Called with a line for each worker that died.

    Raises
    ------
    UsageError
        If Ray is not installed, the address is none, or the device cannot be one of a cluster.
    KvscopeError, OSError, Exception
        If there is no cluster, no worker can start or see the current folder; and as `run_unit`. Finished cells stay.
    """
    ray = _ray()
    units = in_order(plan)
    if not units:
        return UnitResult()
    if update is not None:
        update(0.0, "starting Ray")
    with _connected(ray, address), _markers(plan.store) as markers:
        slots = slots_of([node["Resources"] for node in ray.nodes() if node["Alive"]], thread_count(), plan.device)
        pool = RayPool(ray, Surroundings(str(Path.cwd()), markers), slots, min(slots.count, _most_at_once(units)))
        with pool.closed_at_end():
            result = work_off(units, pool, update, warn)
    _await_results(plan.store, result)
    return result


def _ray() -> ModuleType:
    try:
        return import_module("ray")
    except ImportError as error:
        raise UsageError(
            f"an experiment on Ray needs the package {error.name}", "Install it: pip install 'kvscope[ray]'"
        ) from error


def _most_at_once(units: Sequence[Unit]) -> int:
    """Return how many units can be made at the same time at most."""
    traces = sum(isinstance(unit, TraceUnit) for unit in units)
    return max(traces, len(units) - traces)


def slots_of(nodes: Sequence[Mapping[str, float]], threads: int, device: str) -> Slots:
    """Return the room for workers on machines with so many ``CPU`` and ``GPU``.

    A worker on CPUs has as many of them as this process has threads, because sums of other numbers of threads differ in
    their last digits; if no machine has that many, as many as the largest machine has.

    Raises
    ------
    UsageError
        If the device is a numbered one, or there is none.
    """
    if device.startswith("cuda:"):
        raise UsageError(f"Ray chooses the GPUs: device {device!r} names one", "Write --device cuda, or auto.")
    gpu_nodes = [node for node in nodes if node.get("GPU", 0) >= 1]
    if device == "cuda" and not gpu_nodes:
        raise UsageError("the Ray cluster has no GPU", "Write --device cpu, or start Ray on machines with GPUs.")
    if gpu_nodes and device in ("auto", "cuda"):
        cpus = min(threads, *(int(node.get("CPU", 0) // node["GPU"]) for node in gpu_nodes))
        return Slots(sum(int(node["GPU"]) for node in gpu_nodes), cpus, 1)
    sizes = [int(node.get("CPU", 0)) for node in nodes]
    cpus = min(threads, max(sizes, default=0))
    if cpus == 0:
        raise UsageError("the Ray cluster has no CPU", "Start Ray on machines with CPUs: ray start --num-cpus 4")
    return Slots(sum(size // cpus for size in sizes), cpus, 0)


@contextmanager
def _connected(ray: ModuleType, address: str | None) -> Iterator[None]:
    """Connect to a cluster, or start one, which ends with the block; a connection that is there is used and kept."""
    if ray.is_initialized():
        yield
        return
    address = require_address(address or os.environ.get("RAY_ADDRESS"))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to anyone
    try:
        try:
            _connect(ray, address or AUTO)
        except ConnectionError:
            if address is not None:
                raise
            _connect(ray, LOCAL)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        where = "on this machine" if address in (None, AUTO, LOCAL) else f"at {address}"
        reason = str(error).strip().splitlines()[0]
        raise KvscopeError(
            f"no Ray cluster {where}: {reason}",
            "Start one: ray start --head. One with a token needs RAY_AUTH_MODE=token here.",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def require_address(address: str | None) -> str | None:
    """Return an address of a cluster; raises UsageError if it is neither ``auto``, ``local`` nor ``HOST:PORT``."""
    if address is None or address in (AUTO, LOCAL):
        return address
    if address.startswith("ray://"):
        raise UsageError(
            f"{address} is for clients outside of a cluster, and kvscope runs inside",
            "Run it on a machine of the cluster, with ray: auto",
        )
    if not address.rpartition(":")[0] or not address.rpartition(":")[2].isdigit():
        raise UsageError(f"{address!r} is no address of a Ray cluster", _known_address(address))
    return address


def _known_address(address: str) -> str:
    return f"{nearest(address, [AUTO, LOCAL])} Or write HOST:PORT"


def _connect(ray: ModuleType, address: str) -> None:
    """Connect to a cluster, or start one; raises OSError if none answers: Ray itself would try for many minutes."""
    answers = _noted() if address == AUTO else address
    if answers is not None and answers != LOCAL:
        host, _, port = answers.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    own = {"include_dashboard": False, "object_store_memory": STORED} if address == LOCAL else {}
    default = os.environ.pop("RAY_ADDRESS", None)  # Ray prefers it to what it is told
    try:
        ray.init(address=address, log_to_driver=False, logging_level="error", **own)
    finally:
        if default is not None:
            os.environ["RAY_ADDRESS"] = default


def _noted() -> str | None:
    """Return the address that Ray noted when a cluster was last started here; it may have ended since."""
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    file = Path(folder) / "ray" / "ray_current_cluster"
    return file.read_text(encoding="utf-8").strip() or None if file.is_file() else None


@contextmanager
def _markers(store: Store) -> Iterator[dict[str, str]]:
    """Yield a file in each folder of a store and its content, by which workers see that they have the same folders."""
    with ExitStack() as files:
        markers = {}
        for folder in (store.traces, store.replays):
            folder.mkdir(parents=True, exist_ok=True)
            content = secrets.token_hex()
            marker = files.enter_context(
                tempfile.NamedTemporaryFile("w", dir=folder, prefix=".seen-by-workers-", encoding="utf-8")
            )
            marker.write(content)
            marker.flush()
            markers[marker.name] = content
        yield markers


def _await_results(store: Store, result: UnitResult) -> None:
    """Wait until every replay that a worker wrote can be seen here: network file systems may take a while."""
    for name in result.replays:
        for file in (store.replays / name / RUN_FILE, store.record_file(name)):
            if not await_file(file):
                raise KvscopeError(
                    f"{file}, which a worker wrote, is not there", "Check the file system, then run the command again."
                )


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
