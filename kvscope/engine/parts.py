"""Work on several runs at once, and on fewer at a time where memory does not suffice for all."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch

from kvscope.core.memory import is_out_of_memory, out_of_memory

Run = TypeVar("Run")
Result = TypeVar("Result")
MEMORY_ERRORS = (MemoryError, RuntimeError, OSError)  # what `is_out_of_memory` tells apart


class RunParts:
    """Divides runs into parts that fit in memory; a size that was too large is not tried again.

    Attributes
    ----------
    most : int or None
        Most runs of a part; None while all runs have fit.
    """

    def __init__(self) -> None:
        self.most: int | None = None
        self._failed = False

    def results(self, runs: Sequence[Run], work: Callable[[list[Run]], Iterable[Result]]) -> Iterator[Result]:
        """Yield the result of each run, in order, from as few calls of `work` as memory allows.

        Parameters
        ----------
        runs : sequence
            The runs; each is computed on its own, so that how they are divided changes no result.
        work : callable
            Takes some consecutive runs and gives one result for each, in order. Where it runs out of memory, the runs
            whose results it had not given yet are computed again, half as many at a time. It must not write: the
            caller does, with what is yielded, and errors of the caller are not caught here.

        Raises
        ------
        OutOfMemory
            If memory does not suffice for one run.
        """
        waiting = list(runs)
        while waiting:
            part = self.next_part(waiting)
            try:
                for result in work(part):
                    del waiting[0]
                    yield result
            except MEMORY_ERRORS as error:
                self.divide(part, error)

    def next_part(self, waiting: list[Run]) -> list[Run]:
        """Return the first of the runs that wait: as many as fit. After a failure its memory is freed first."""
        if self._failed:
            _release()
            self._failed = False
        return waiting[: self.most or len(waiting)]

    def divide(self, part: Sequence[Run], error: BaseException) -> None:
        """Halve the size of parts after an error in the work on `part`.

        Raises
        ------
        OutOfMemory
            If memory does not suffice for one run. Any other error is raised again.
        """
        if not is_out_of_memory(error):
            raise error
        if len(part) == 1:
            raise out_of_memory(error, " with one run at a time") from error
        self.most, self._failed = len(part) // 2, True


def _release() -> None:
    """Free what failed work held, on the device too; called after its handler, because the traceback holds tensors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
