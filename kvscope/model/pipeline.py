"""From the device to the disk beside the model: copies to the host, threads that write, and a bound on what waits."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

IN_FLIGHT = 64 * 10**6  # bytes on the host that wait to be written, at most
THREADS = 4  # that write beside a device; beside a model on the CPU one, which takes what the model leaves
Write = Callable[..., None]  # takes arrays by name


@dataclass
class _Job:
    write: Write
    host: dict[str, Tensor]
    copied: torch.cuda.Event | None
    size: int


def threads_for(device: torch.device) -> int:
    """Return how many threads write what a model on this device gives."""
    return 1 if device.type == "cpu" else max(1, min(THREADS, (os.cpu_count() or 1) // 2))


class Pipeline:
    """Has tensors written by threads while the model goes on; a context, at whose end all has been written.

    What belongs to one layer is written by one thread, in the order in which it came. Whoever brings more than may
    wait is held up until there is room. An error of a thread is raised at the next call, or at the end.

    Parameters
    ----------
    threads : int
        Threads that write.
    limit : int
        Bytes that wait at most; something larger waits alone.
    """

    def __init__(self, threads: int = 1, limit: int = IN_FLIGHT) -> None:
        self._limit, self._waiting = limit, 0
        self._error: BaseException | None = None
        self._room = threading.Condition()
        self._queues: list[SimpleQueue[_Job | None]] = [SimpleQueue() for _ in range(threads)]
        self._threads = [threading.Thread(target=self._work, args=(queue,), daemon=True) for queue in self._queues]
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self.peak = 0  # bytes that have waited at most

    def __enter__(self) -> Pipeline:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._error = self._error or error  # what still waits is not written
        for queue in self._queues:
            queue.put(None)
        for thread in self._threads:
            thread.join()
        if error is None and self._error is not None:
            raise self._error

    def put(self, layer: int, write: Write, tensors: Mapping[str, Tensor]) -> None:
        """Have ``write(**arrays)`` called with tensors that nobody changes any more.

        Raises
        ------
        BaseException
            What a thread has met with: a disk that is full, a weight that is no number.
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
        """Return copies on the host, and for those of a CUDA device what happens when they are complete."""
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
                tensor.record_stream(stream)  # its memory is not given to others before the copy is made
        return host, stream.record_event()

    def _work(self, queue: SimpleQueue[_Job | None]) -> None:
        while (job := queue.get()) is not None:
            try:
                if self._error is None:
                    _write(job)
            except BaseException as error:
                self._error = self._error or error
            size = job.size
            del job  # with its memory, before others may take as much
            with self._room:
                self._waiting -= size
                self._room.notify_all()


def _write(job: _Job) -> None:
    if job.copied is not None:
        job.copied.synchronize()
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in job.host.items()}
    job.write(**arrays)
