"""Run an experiment on a Ray cluster: one worker for each GPU, or for as many CPUs as this process has threads.

Ray is imported inside of functions: nothing else needs it.
"""

from __future__ import annotations

import os
import secrets
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType

from kvscope.core.errors import KvscopeError, UsageError
from kvscope.core.records import RUN_FILE
from kvscope.core.registry import nearest
from kvscope.experiments.cells import Store
from kvscope.experiments.execute import UnitResult
from kvscope.experiments.plan import ExperimentPlan, TraceUnit, Unit
from kvscope.experiments.ray_package import load_ray
from kvscope.experiments.ray_pool import RayPool, Slots
from kvscope.experiments.run import Update, in_order
from kvscope.experiments.schedule import work_off
from kvscope.experiments.worker import Surroundings, await_file
from kvscope.kernels.device import thread_count

AUTO, LOCAL = "auto", "local"  # a cluster that runs on this machine, and one that is started for the command
STORED = 80_000_000  # bytes of Ray's own memory in a cluster that is started here: nothing large is passed through it


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
    ray = load_ray()
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
        raise UsageError(f"{address!r} is not an address of a Ray cluster", _known_address(address))
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
