"""Progress of long work, as the share that is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Progress = Callable[[float], None]  # called with the share that is done, 0 to 1

_WEIGHTS: ContextVar[Progress | None] = ContextVar("weights", default=None)


def part_of(progress: Progress | None, start: float, stop: float, total: float = 1.0) -> Progress | None:
    """Return a progress callback for the part of the work from `start` to `stop`, out of `total`."""
    return None if progress is None else lambda share: progress((start * (1 - share) + stop * share) / total)


@contextmanager
def weights_shown(progress: Progress) -> Iterator[None]:
    """Call `progress` with the share of the weights that are loaded, for each model that the block loads.

    The block may load none, and nothing that loads models is imported.
    """
    before = _WEIGHTS.set(progress)
    try:
        yield
    finally:
        _WEIGHTS.reset(before)


def weights_progress() -> Progress | None:
    """Return the callback of `weights_shown`; None outside of such a block."""
    return _WEIGHTS.get()
