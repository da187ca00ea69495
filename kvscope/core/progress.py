"""Progress of long work, as the share that is done."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[float], None]  # called with the share that is done, 0 to 1


def part_of(progress: Progress | None, start: float, stop: float, total: float = 1.0) -> Progress | None:
    """Return a progress callback for the part of the work from `start` to `stop`, out of `total`."""
    return None if progress is None else lambda share: progress((start * (1 - share) + stop * share) / total)
