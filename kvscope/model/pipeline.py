"""Write tensors to disk in threads while the model runs, with a limit on the bytes that wait."""

from __future__ import annotations

import sys
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from kvscope.core.cores import cores
from kvscope.model.copies import Copy, HostCopies

IN_FLIGHT = 64 * 10**6  # limit on the bytes on the host that wait to be written, for up to four threads
BLOCK = IN_FLIGHT // 4  # most bytes of one block, whatever the number of threads: files do not depend on it
# Seconds after which a thread that runs Python lets another one run. The model's thread is soon back at its launches:
# with Python's own 5 ms, it waits longer for the writers than they need.
SWITCH = 0.0002
WAKE = 0.5  # seconds after which a wait begins anew: an interruption that comes just before a wait does not end it
Write = Callable[..., None]  # takes arrays as keyword arguments


@dataclass(frozen=True)
class _Job:
    write: Write
    copy: Copy
    size: int


def threads_for(device: torch.device) -> int:
    """Return how many threads write while a model runs on this device: the cores that it leaves to them, at least 1.

    A model on the CPU takes torch's threads, one on a device the thread that launches its work.
    """
    return max(1, cores() - (torch.get_num_threads() if device.type == "cpu" else 1))


def limit_for(threads: int) -> int:
    """Return the limit on the bytes that wait: room for one block of each thread, at least `IN_FLIGHT`."""
    return max(IN_FLIGHT, threads * BLOCK)


class Pipeline:
    """A context manager whose threads write tensors while the model runs; on exit everything has been written.

    Blocks with the same key are written one after the other, in the order of the calls of `put`; those with other keys
    at the same time, by whichever thread is free. `put` blocks while the limit is reached. An error in a thread is
    raised by the next call of `put`, or on exit; nothing more is written after it.

    Parameters
    ----------
    threads : int
        Number of threads that write.
    limit : int, optional
        Limit on the bytes that wait, of all threads together, by default `limit_for`; a block above it waits alone.
    copies : HostCopies, optional
        Starts the copies to the host.
    """

    def __init__(self, threads: int = 1, limit: int | None = None, copies: HostCopies | None = None) -> None:
        self._limit, self._waiting = limit_for(threads) if limit is None else limit, 0
        self._copies = copies or HostCopies()
        self._error: BaseException | None = None
        self._closed, self._running = False, 0
        lock = threading.Lock()
        self._room, self._work = threading.Condition(lock), threading.Condition(lock)
        self._jobs: defaultdict[Hashable, deque[_Job]] = defaultdict(deque)  # with the job that is being written
        self._ready: deque[Hashable] = deque()  # keys with jobs of which none is being written
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(threads)]
        self.peak = 0  # largest number of bytes that waited at once

    def __enter__(self) -> Pipeline:
        self._interval = sys.getswitchinterval()
        sys.setswitchinterval(min(self._interval, SWITCH))
        for thread in self._threads:
            thread.start()
            self._running += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is not None:
                self._error = self._error or error  # blocks that still wait are not written
            self._wait_for_threads()
        except BaseException as interruption:
            self._error = self._error or interruption  # as above; a file that a thread writes must not be closed
            self._wait_for_threads()
            raise
        finally:
            sys.setswitchinterval(self._interval)
        if error is None and self._error is not None:
            raise self._error

    def _wait_for_threads(self) -> None:
        """Return when all threads have ended; `Thread.join` takes a thread for ended when it was interrupted once."""
        with self._room:
            self._closed = True
            self._work.notify_all()
            while self._running:
                self._room.wait(WAKE)
        for thread in self._threads:
            thread.join()

    def put(self, key: Hashable, write: Write, tensors: Mapping[str, Tensor]) -> None:
        """Let a thread call ``write(**arrays)`` with copies of the tensors; they must not be modified afterwards.

        Parameters
        ----------
        key : hashable
            What `write` writes to, such as a file: never two threads at the same time.
        write : callable
            Writes the arrays.
        tensors : mapping of str to Tensor
            Tensors of one device.

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
        try:
            job = _Job(write, self._copies.start(tensors), size)
        except BaseException:
            self._leave(size)
            raise
        with self._work:
            self._jobs[key].append(job)
            if len(self._jobs[key]) == 1:
                self._ready.append(key)
                self._work.notify()

    def _run(self) -> None:
        try:
            self._write_ready()
        finally:
            with self._room:
                self._running -= 1
                self._room.notify_all()

    def _write_ready(self) -> None:
        """Write the first job of a ready key, until the pipeline is closed and no job is left."""
        while True:
            with self._work:
                self._work.wait_for(lambda: self._ready or (self._closed and not self._jobs))
                if not self._ready:
                    return
                key = self._ready.popleft()
                job = self._jobs[key][0]
            try:
                if self._error is None:
                    job.write(**job.copy.wait())
            except BaseException as error:
                self._error = self._error or error
            size = job.size
            del job
            self._finish(key)
            self._leave(size)

    def _finish(self, key: Hashable) -> None:
        """Remove the job of a key that was written, and with it its memory; make its next one ready."""
        with self._work:
            self._jobs[key].popleft()
            if self._jobs[key]:
                self._ready.append(key)
                self._work.notify()
            else:
                del self._jobs[key]
                if self._closed and not self._jobs:
                    self._work.notify_all()

    def _leave(self, size: int) -> None:
        """Give the room of a block to others."""
        with self._room:
            self._waiting -= size
            self._room.notify_all()
