"""The last rows that a policy has observed, for rules over a window of steps."""

from __future__ import annotations

import torch
from torch import Tensor


class History:
    """The last `window` rows of one sequence, ``[..., n]`` each, with ``n`` growing from row to row.

    It is stored in ``step.memory``, which ends with the sequence. A row is zero for keys that are newer. Nothing is
    ever subtracted from a sum of floats, so a key whose rows are all zero has a sum of exactly zero, however long
    the sequence. Rows of bool or integers are summed as integers.

    Parameters
    ----------
    window : int
        Number of rows that are kept, at least one. Memory grows with the rows.

    Example
    -------
    >>> import torch
    >>> memory = {}
    >>> for row in ([1.0], [0.5, 0.5], [0.25, 0.25, 0.5]):
    ...     History.of(memory, "weights", 2).push(torch.tensor(row))
    >>> history = History.of(memory, "weights", 2)
    >>> history.count, history.sum.tolist(), history.rows.tolist()
    (2, [0.75, 0.75, 0.5], [[0.5, 0.5, 0.0], [0.25, 0.25, 0.5]])
    """

    def __init__(self, window: int) -> None:
        assert window >= 1, f"a history of {window} rows"
        self.window = window
        self._pushed = 0
        self._n = 0
        self._buffer = torch.empty(0)
        self._totals: dict[int, _Total] = {}

    @classmethod
    def of(cls, memory: dict[str, object], name: str, window: int) -> History:
        """Return the history `name` of a sequence's memory; at the first step a new one of `window` rows."""
        history = memory.get(name)
        if history is None:
            history = memory[name] = cls(window)
        assert isinstance(history, cls) and history.window == window, f"another history is called {name}"
        return history

    def push(self, row: Tensor) -> None:
        """Add the newest row, ``[..., n]``; it replaces the oldest one once `window` rows are kept."""
        self._grow(row)
        slot = self._pushed % self.window
        place = self._buffer[..., slot, :]
        if self._pushed >= self.window and not row.is_floating_point():
            for total in self._totals.values():
                total.subtract(place)
        for total in self._totals.values():
            if slot == 0 and self._pushed and row.is_floating_point():
                total.begin_lap(self._buffer)
            total.add(row)
        place[..., : self._n] = row  # rows only ever get longer, so this covers the one it replaces
        self._pushed += 1

    @property
    def count(self) -> int:
        """How many rows are kept."""
        return min(self._pushed, self.window)

    @property
    def rows(self) -> Tensor:
        """The rows that are kept, oldest first, ``[..., count, n]``; not to be written to."""
        rows = self._buffer[..., : self.count, : self._n]
        start = self._pushed % self.window
        if self._pushed <= self.window or start == 0:
            return rows
        return torch.cat([rows[..., start:, :], rows[..., :start, :]], -2)

    def with_age(self) -> tuple[Tensor, Tensor]:
        """Return the rows that are kept in any order, ``[..., count, n]``, and how many rows are newer than each.

        The rows are not to be written to; the second tensor is int64 ``[count]``.
        """
        slots = torch.arange(self.count, device=self._buffer.device)
        return self._buffer[..., : self.count, : self._n], (self._pushed - 1 - slots) % self.window

    def newest(self, count: int, run: int) -> Tensor:
        """Return the newest `count` rows of one run in any order, ``[..., count, n]``; not to be written to."""
        rows = self._buffer[run, ..., : self._n]
        if count >= self.count:
            return rows[..., : self.count, :]
        start = (self._pushed - count) % self.window
        if start + count <= self.window:
            return rows[..., start : start + count, :]
        slots = torch.arange(start, start + count, device=rows.device) % self.window
        return rows.index_select(-2, slots)

    @property
    def sum(self) -> Tensor:
        """The sum of the rows that are kept, ``[..., n]``."""
        return self._total(1)

    @property
    def squares(self) -> Tensor:
        """The sum of their squares, ``[..., n]``."""
        return self._total(2)

    def _total(self, power: int) -> Tensor:
        assert self._pushed, "an empty history has no sum"
        done = (self._pushed - 1) % self.window + 1  # rows of this lap around the buffer
        if power not in self._totals:
            self._totals[power] = _Total(power, self._buffer[..., : self.count, :], done)
        return self._totals[power].value(done)[..., : self._n].clone()

    def _grow(self, row: Tensor) -> None:
        """Enlarge the buffer for one more row and all its keys: double the rows, up to the window."""
        if self._pushed == 0:
            self._buffer = row.new_zeros((*row.shape[:-1], 1, row.shape[-1]))
        assert row.shape[-1] >= self._n, f"a row of {row.shape[-1]} keys after one of {self._n}"
        self._n = row.shape[-1]
        slots, keys = self._buffer.shape[-2:]
        if self._pushed == slots < self.window or keys < self._n:
            more = min(2 * slots, self.window) if self._pushed == slots else slots
            wide = keys if keys >= self._n else max(self._n, keys + keys // 2)
            grown = row.new_zeros((*row.shape[:-1], more, wide))
            grown[..., :slots, :keys] = self._buffer
            self._buffer = grown


class _Total:
    """The sum of the kept rows: those of this lap around the buffer, and those of the last lap not yet replaced."""

    def __init__(self, power: int, rows: Tensor, done: int) -> None:
        """Sum `rows`, the kept slots of the buffer, of which the first `done` belong to this lap."""
        self.power = power
        self.now = self._term(rows[..., :done, :]).sum(-2)
        self.rest: Tensor | None = None  # at slot s: the sum of the last lap's rows from s on
        if rows.shape[-2] > done:
            if rows.is_floating_point():
                self.begin_lap(rows, done)
            else:
                self.now += self._term(rows[..., done:, :]).sum(-2)

    def add(self, row: Tensor) -> None:
        self.now = wider(self.now, row.shape[-1])
        self.now[..., : row.shape[-1]] += self._term(row)

    def subtract(self, row: Tensor) -> None:
        self.now = wider(self.now, row.shape[-1])
        self.now[..., : row.shape[-1]] -= self._term(row)

    def begin_lap(self, rows: Tensor, done: int = 0) -> None:
        """Begin a lap: the current one becomes the last."""
        self.rest = self._term(rows).flip(-2).cumsum(-2).flip(-2)
        if done == 0:
            self.now = torch.zeros_like(self.rest[..., 0, :])

    def value(self, done: int) -> Tensor:
        if self.rest is None or done >= self.rest.shape[-2]:
            return self.now
        return self.now + wider(self.rest[..., done, :], self.now.shape[-1])

    def _term(self, rows: Tensor) -> Tensor:
        rows = rows if rows.is_floating_point() else rows.long()
        return rows if self.power == 1 else rows * rows


def wider(row: Tensor, keys: int) -> Tensor:
    """Return the row ``[..., n]`` as ``[..., keys]``, with zeros for the keys that are newer than it."""
    missing = keys - row.shape[-1]
    return row if missing <= 0 else torch.nn.functional.pad(row, (0, missing))
