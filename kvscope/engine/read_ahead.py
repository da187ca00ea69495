"""Read what is needed next while the current part is worked on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, NamedTuple, TypeVar

import torch

from kvscope.kernels import device as devices

T = TypeVar("T")
LIMIT_BYTES = 256 * 2**20  # limit for what has been requested and not been taken
MOST_THREADS = 8  # decompression of a block takes one thread, so several blocks are read at once


class Reading(NamedTuple, Generic[T]):
    """Something to read: its size in bytes, and the function that reads it."""

    bytes: int
    read: Callable[[], T]


class ReadAhead(Generic[T]):
    """Yields what readings return, in their order, and reads later ones in threads; a context manager.

    An exception of a reading is raised where its result would be yielded. Leaving the context, for whatever reason,
    waits for the readings that have begun and drops the others, so that no thread remains.

    Parameters
    ----------
    readings : iterator of Reading
        Consumed by the thread that takes the results. Readings may run at the same time.
    threads : int
        Number of threads; with 0 everything is read when it is taken, by the thread that takes it.
    limit : int, optional
        Bytes of results that are requested ahead, by default `LIMIT_BYTES`. One result is requested whatever its size.
    """

    def __init__(self, readings: Iterator[Reading[T]], threads: int, limit: int | None = None) -> None:
        self._readings, self._limit = readings, LIMIT_BYTES if limit is None else limit
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="kvscope-read") if threads else None
        self._waiting: deque[tuple[int, Future[T]]] = deque()
        self._postponed: Reading[T] | None = None

    def __enter__(self) -> ReadAhead[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._pool is None:
            return next(self._readings).read()
        self._request(self._pool)
        if not self._waiting:
            raise StopIteration
        _, future = self._waiting.popleft()
        self._request(self._pool)  # before waiting, so that threads have work meanwhile
        return future.result()

    def _request(self, pool: ThreadPoolExecutor) -> None:
        """Request readings in order up to the limit; at least one."""
        while True:
            reading = self._postponed or next(self._readings, None)
            self._postponed = reading
            if reading is None:
                return
            if self._waiting and sum(size for size, _ in self._waiting) + reading.bytes > self._limit:
                return
            self._waiting.append((reading.bytes, pool.submit(reading.read)))
            self._postponed = None


def reading_threads(device: torch.device) -> int:
    """Return how many threads read for work on a device; none for a CPU, whose cores are busy with the work."""
    return 0 if devices.on_cpu(device) else min(MOST_THREADS, torch.get_num_threads())
