"""Write tensors to disk in threads while the model runs: copies to the host, and a limit on the bytes that wait."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType

import torch
from torch import Tensor

IN_FLIGHT = 64 * 10**6  # limit on the bytes on the host that wait to be written
THREADS = 4  # most threads that write while the model runs on a device; one while it runs on the CPU
Write = Callable[..., None]  # takes arrays as keyword arguments


@dataclass
class _Job:
    write: Write
    host: dict[str, Tensor]
    copied: torch.cuda.Event | None
    size: int


def threads_for(device: torch.device) -> int:
    """Return how many threads write while a model runs on this device."""
    return 1 if device.type == "cpu" else max(1, min(THREADS, (os.cpu_count() or 1) // 2))


class Pipeline:
    """A context manager whose threads write tensors while the model runs; on exit everything has been written.

    All blocks of one layer are written by the same thread, in the order of the calls of `put`. `put` blocks while the
    limit is reached. An error in a thread is raised by the next call of `put`, or on exit.

    Parameters
    ----------
    threads : int
        Number of threads that write.
    limit : int
        Limit on the bytes that wait; a block above the limit waits alone.
    """

    def __init__(self, threads: int = 1, limit: int = IN_FLIGHT) -> None:
        self._limit, self._waiting = limit, 0
        self._error: BaseException | None = None
        self._room = threading.Condition()
        self._queues: list[SimpleQueue[_Job | None]] = [SimpleQueue() for _ in range(threads)]
        self._threads = [threading.Thread(target=self._work, args=(queue,), daemon=True) for queue in self._queues]
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self.peak = 0  # largest number of bytes that waited at once

    def __enter__(self) -> Pipeline:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._error = self._error or error  # blocks that still wait are not written
        for queue in self._queues:
            queue.put(None)
        for thread in self._threads:
            thread.join()
        if error is None and self._error is not None:
            raise self._error

    def put(self, layer: int, write: Write, tensors: Mapping[str, Tensor]) -> None:
        """Let a thread call ``write(**arrays)`` with copies of the tensors; they must not be modified afterwards.

        Raises
        ------
        BaseException
            The first error of a thread, such as a full disk or a weight that is not finite.
        """
        size = sum(tensor.nbytes for tensor in tensors.values())
        with self._room:
            self._room.wait_for(lambda: self._error or not self._waiting or self._waiting + size <= self._limit)
            if self._error is not None:
                raise self._error
            self._waiting += size
            self.peak = max(self.peak, self._waiting)
        host, copied = self._to_host(tensors)
        self._queues[layer % len(self._queues)].put(_Job(write, host, copied, size))

    def _to_host(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
        """Return copies on the host and, for a CUDA device, the event that marks the copies as complete."""
        device = next(iter(tensors.values())).device
        if device.type != "cuda":
            return {name: tensor.cpu() for name, tensor in tensors.items()}, None
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        host = {}
        with torch.cuda.stream(stream):
            for name, tensor in tensors.items():
                host[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                host[name].copy_(tensor, non_blocking=True)
                tensor.record_stream(stream)  # its memory must not be reused before it is copied
        return host, stream.record_event()

    def _work(self, queue: SimpleQueue[_Job | None]) -> None:
        while (job := queue.get()) is not None:
            try:
                if self._error is None:
                    _write(job)
            except BaseException as error:
                self._error = self._error or error
            size = job.size
            del job  # free its memory before other blocks may use the room
            with self._room:
                self._waiting -= size
                self._room.notify_all()


def _write(job: _Job) -> None:
    if job.copied is not None:
        job.copied.synchronize()
    job.write(**{name: tensor.numpy() for name, tensor in job.host.items()})
