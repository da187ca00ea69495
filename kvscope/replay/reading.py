"""The blocks of rows of a replay, read in order and ahead of the work on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import TracebackType

import torch

from kvscope.engine.layers import row_loader
from kvscope.engine.read_ahead import ReadAhead, Reading, reading_threads
from kvscope.engine.row_loading import HostBlock
from kvscope.trace.reader import TokenSequence, Trace


@dataclass(frozen=True)
class GroupSpec:
    """A sequence, the numbers of the layers of a group, and the number of steps in a block."""

    sequence: TokenSequence
    layers: list[int]
    steps: int

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Start and stop of each block."""
        length = self.sequence.length
        return [(start, min(start + self.steps, length)) for start in range(0, length, self.steps)]


class BlockReader:
    """Reads the blocks of all groups, each time those of one group, and meanwhile the next; a context manager.

    A group can be read again, as where memory did not suffice for all runs at once. From then on nothing is read
    beyond the end of a group, because the next one to read is not known.

    Parameters
    ----------
    trace : Trace
        Recorded attention.
    groups : sequence of GroupSpec
        In the order in which they are worked on.
    device : torch.device
        The device to compute on.
    """

    def __init__(self, trace: Trace, groups: Sequence[GroupSpec], device: torch.device) -> None:
        self._trace, self._groups, self._device = trace, groups, device
        self._open = ExitStack()
        self._ahead = self._reading(groups)
        self._next: int | None = 0  # the group that `_ahead` is at the beginning of
        self._repeated = False

    def __enter__(self) -> BlockReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def blocks(self, number: int) -> Iterator[HostBlock]:
        """Yield the blocks of group `number`, from its first; raises as `RowLoader.read`."""
        if self._next != number:
            self._repeated = self._repeated or self._next is None or self._next > number
            self._open.close()
            self._ahead = self._reading(self._groups[number : number + 1 if self._repeated else None])
        self._next = None
        for _ in self._groups[number].ranges:
            yield next(self._ahead)
        self._next = number + 1 if not self._repeated else None

    def _reading(self, groups: Sequence[GroupSpec]) -> ReadAhead[HostBlock]:
        return self._open.enter_context(ReadAhead(self._readings(groups), reading_threads(self._device)))

    def _readings(self, groups: Sequence[GroupSpec]) -> Iterator[Reading[HostBlock]]:
        for group in groups:
            loader = row_loader(self._trace, group.sequence.index, group.layers, self._device)
            for start, stop in group.ranges:
                yield Reading(loader.bytes(start, stop), partial(loader.read, start, stop))
