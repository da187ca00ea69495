"""When keys were in the cache: the residency intervals of one run, sequence and layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]
Whole = NDArray[np.int64]

NEVER = 2**31 - 1  # eviction step, in an int32 tensor of one step per key, of a key that is held to the end


@dataclass(frozen=True)
class Absences:
    """Times during which a key that was held before was not in the cache, one for each element of ``[N]``.

    Attributes
    ----------
    head, key : array
        Key/value head and position of the key, int64.
    start, until : array
        First step after which the key is not held, and the step after which it is held again: ``T`` if it never is.
    """

    head: Whole
    key: Whole
    start: Whole
    until: Whole


@dataclass(frozen=True)
class ResidencyIntervals:
    """Every interval in which a key was in the cache: held after step ``t`` exactly when ``enter <= t < leave``.

    A sparse reader holds every key; its intervals are those in which keys were read.

    Attributes
    ----------
    kv_head, key : array
        Key/value head and position of the key, int32 ``[N]``.
    enter, leave : array
        First step after which the key is held, and first step after which it no longer is: ``T`` where it is held to
        the end.
    heads, length : int
        ``G`` and ``T``.
    """

    kv_head: Ints
    key: Ints
    enter: Ints
    leave: Ints
    heads: int
    length: int

    @classmethod
    def of(
        cls,
        *,
        kv_head: NDArray[np.integer],
        key: NDArray[np.integer],
        enter: NDArray[np.integer],
        leave: NDArray[np.integer],
        heads: int,
        length: int,
    ) -> ResidencyIntervals:
        """Return intervals from columns as they are stored, where a negative ``leave`` means held to the end."""
        head, key, enter, leave = (np.asarray(column).astype(np.int32) for column in (kv_head, key, enter, leave))
        return cls(head, key, enter, np.where(leave < 0, np.int32(length), leave), heads, length)

    @classmethod
    def from_eviction_steps(cls, leave: NDArray[np.integer]) -> ResidencyIntervals:
        """Return the intervals of keys that enter at their position and leave once, at ``[G, T]`` steps or `NEVER`."""
        heads, length = leave.shape
        key = np.tile(np.arange(length, dtype=np.int32), heads)
        head = np.repeat(np.arange(heads, dtype=np.int32), length)
        return cls(head, key, key, np.minimum(leave, length).reshape(-1).astype(np.int32), heads, length)

    @property
    def stored_leave(self) -> Ints:
        """``leave`` as it is stored, int32 ``[N]``: -1 where the key is held to the end."""
        return np.where(self.leave >= self.length, np.int32(-1), self.leave)

    @property
    def eviction_steps(self) -> Ints:
        """Step at which each interval ends, int32 ``[N]``; `NEVER` where the key is held to the end."""
        return np.where(self.leave >= self.length, np.int32(NEVER), self.leave)

    @property
    def bytes(self) -> int:
        """Size in memory."""
        return sum(column.nbytes for column in (self.kv_head, self.key, self.enter, self.leave))

    @cached_property
    def ordered(self) -> ResidencyIntervals:
        """The same intervals sorted by head, key and step."""
        order = np.lexsort((self.enter, self.key, self.kv_head))
        columns = (self.kv_head[order], self.key[order], self.enter[order], self.leave[order])
        return ResidencyIntervals(*columns, self.heads, self.length)

    @cached_property
    def one_per_key(self) -> bool:
        """Whether the intervals are one for each key of each head, in that order, each from the key's position on."""
        key = np.arange(self.heads * self.length) % self.length
        return len(self.key) == len(key) and np.array_equal(self.key, key) and np.array_equal(self.enter, key)

    @cached_property
    def cell(self) -> Whole:
        """Number of the key among all keys of all heads, int64 ``[N]``."""
        return self.kv_head.astype(np.int64) * self.length + self.key

    def held(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Return ``R_t`` for steps `start` to `stop` - 1, bool ``[G, stop - start, T]``."""
        here = (self.enter < stop) & (self.leave > start)
        head, key = self.kv_head[here], self.key[here]
        change = np.zeros((self.heads, stop - start + 1, self.length), np.int8)
        np.add.at(change, (head, np.maximum(self.enter[here], start) - start, key), 1)
        np.add.at(change, (head, np.minimum(self.leave[here], stop) - start, key), -1)
        held: NDArray[np.bool_] = change[:, :-1].cumsum(1, dtype=np.int8) > 0
        return held

    def visible(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Return ``V_t`` for steps `start` to `stop` - 1, bool ``[G, stop - start, T]``: ``R_{t-1}`` and key ``t``."""
        visible = self.held(start - 1, stop - 1)
        visible[:, np.arange(stop - start), np.arange(start, stop)] = True
        return visible

    def held_tokens(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return how many of the tokens `start` to `stop` - 1 each head holds after each step, ``[G, T]``."""
        inside = (self.key >= start) & (self.key < stop)
        head, enter, leave = (column[inside] for column in (self.kv_head, self.enter, self.leave))
        change = np.zeros((self.heads, self.length + 1), np.int64)
        np.add.at(change, (head, enter), 1)
        np.add.at(change, (head, leave), -1)
        held: NDArray[np.int64] = change[:, :-1].cumsum(1)
        return held

    def held_after(self, step: int) -> NDArray[np.bool_]:
        """Return which keys are held after one step, bool ``[G * T]``."""
        there = (self.enter <= step) & (step < self.leave)
        if self.one_per_key:
            return there
        mask = np.zeros(self.heads * self.length, bool)
        mask[self.cell[there]] = True
        return mask

    def holding_heads(self, steps: Whole) -> Whole:
        """Return how many heads hold each key after each of the rising `steps`, int64 ``[S, T]``."""
        size = (len(steps) + 1, self.length)
        change = np.zeros(size[0] * size[1], np.int64)
        for when, sign in ((self.enter, 1), (self.leave, -1)):
            place = np.searchsorted(steps, when) * self.length + self.key
            change += sign * np.bincount(place, minlength=len(change))
        return np.asarray(change.reshape(size)[:-1].cumsum(0))

    def absences(self) -> Absences:
        """Return the times after an interval in which a key is not held, sorted by head, key and step."""
        rows = self.ordered
        last = np.append(rows.cell[1:] != rows.cell[:-1], True)
        until = np.where(last, rows.length, np.append(rows.enter[1:], 0))
        away = rows.leave < until
        return Absences(*(each[away].astype(np.int64) for each in (rows.kv_head, rows.key, rows.leave, until)))
