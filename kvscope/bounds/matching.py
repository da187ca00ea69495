"""Exact solver of a transportation problem: assign every key to one slot, fill every slot, at the least cost.

Slots are ordered by time and their optimal prices change smoothly with it, so this is faster than a general assignment:
the prices of a few merged slots, then of more, are good initial prices of all slots, and with good initial prices only
short augmenting paths remain. The result includes the prices. They prove that it is optimal: no assignment costs less
than the sum of the prices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MERGED = (4, 16, 64, 256, 1024)  # numbers of slots of the merged problems, solved in this order
HEAT = 0.2  # temperature of the soft assignment, in units of the mean price difference of neighbouring slots
SWEEPS = 5  # Sinkhorn iterations
WIDTH = 8.0  # in temperatures: slots that cost more than this above a key's cheapest slot are ignored (e**-8 < 0.001)
TIE = 1e-14  # rounding error of a mass; distances this close are equal, so that a path ends at a key without a slot


@dataclass(frozen=True)
class Matching:
    """An assignment, with prices that prove it optimal.

    Attributes
    ----------
    slot : int ``[T]``
        Slot of each key.
    cost : float
        Total cost of the assignment.
    slot_price : float64 ``[m]``
    key_price : float64 ``[T]``
        Dual prices: ``slot_price[s] + key_price[k] <= cost[s, k]`` for every pair, with equality up to rounding where
        key ``k`` is assigned to slot ``s``.
    bound : float
        Sum of the prices, each slot price times the slot's room: no assignment costs less.
    """

    slot: Ints
    cost: float
    slot_price: Floats
    key_price: Floats
    bound: float


def match(cost: Floats, room: Ints) -> Matching:
    """Return the cheapest assignment of keys to slots.

    Parameters
    ----------
    cost : float64 ``[m, T]``
        Cost of key ``k`` in slot ``s``; infinite if the assignment is not allowed. The slots that are not allowed for a
        key come before those that are. Slots are ordered by time, so that neighbouring slots have similar costs; the
        last slot is separate and is not merged. Any other order gives the same result but takes longer.
    room : int64 ``[m]``
        Number of keys that each slot takes, at least one; the sum is ``T``.

    Raises
    ------
    ValueError
        If there is no assignment, or the sum of `room` is not ``T``.
    """
    slots, keys = cost.shape
    if room.sum() != keys or (room < 1).any():
        raise ValueError(f"slots with room for {room.sum()} keys cannot take {keys}")
    price, at = np.zeros(1), np.array([slots - 1])
    for size in (*(size for size in MERGED if 2 * size < slots), slots - 1):
        merged, total, middle = _merge(cost, room, size) if size < slots - 1 else (cost, room, np.arange(slots))
        price = _smooth(merged, total, np.interp(middle, at, price))
        slot, key_price = _improve(merged, total, price)
        price, at = (merged - key_price).min(1), middle
    found = float(cost[slot, np.arange(keys)].sum())
    return Matching(slot, found, price, key_price, float(price @ room + key_price.sum()))


def _merge(cost: Floats, room: Ints, size: int) -> tuple[Floats, Ints, Ints]:
    """Return the costs and room with all slots but the last merged into `size`, and the middle slot of each.

    A key may be assigned to a merged slot if it may be assigned to one of its slots, so a feasible problem remains
    feasible.
    """
    last = len(cost) - 1
    edges = np.linspace(0, last, size + 1).astype(np.int64)
    first, end = np.append(edges[:-1], last), np.append(edges[1:] - 1, last)
    middle = (first + end) // 2
    return (
        np.where(np.isinf(cost[middle]), cost[end], cost[middle]),
        np.add.reduceat(room, first),
        middle,
    )


def _smooth(cost: Floats, room: Ints, price: Floats) -> Floats:
    """Return improved slot prices: a few Sinkhorn iterations of a soft assignment to the cheapest slots."""
    heat = HEAT * float(np.ptp(price)) / len(price)
    if heat == 0:
        return price
    excess = cost - price[:, None]
    excess -= excess.min(0)
    slot, key = np.nonzero(excess < WIDTH * heat)
    start = -excess[slot, key] / heat
    of_slot, of_key = np.zeros(len(price)), np.zeros(cost.shape[1])
    for _ in range(SWEEPS):
        weight = np.exp(np.clip(start + of_slot[slot] + of_key[key], -50, 50))
        total = np.bincount(key, weight, len(of_key))
        of_key -= np.log(total)
        filled = np.bincount(slot, weight / total[key], len(of_slot))
        of_slot += np.log(room / np.maximum(filled, room / 20))  # limits the change for an empty slot
    return price + heat * of_slot


def _improve(cost: Floats, room: Ints, price: Floats) -> tuple[Ints, Floats]:
    """Return the slot of each key and the prices of the keys, from initial prices of the slots.

    Each key gets its cheapest slot while that has room, in order of position. Then each empty place is filled along the
    shortest augmenting path, as in Jonker and Volgenant (1987), here with slots for more than one key.
    """
    slots, keys = cost.shape
    excess = cost - price[:, None]
    choice = excess.argmin(0)
    key_price = excess[choice, np.arange(keys)]
    order = choice.argsort(kind="stable")
    cheapest = choice[order]
    fits = np.arange(keys) - np.searchsorted(cheapest, cheapest) < room[cheapest]
    slot = np.full(keys, -1)
    slot[order[fits]] = cheapest[fits]
    empty = room - np.bincount(cheapest[fits], minlength=slots)
    wide = room > 1
    for start in np.repeat(np.arange(slots), empty):
        _fill(cost, slot, key_price, wide, int(start))
    return slot, key_price


def _fill(cost: Floats, slot: Ints, key_price: Floats, wide: NDArray[np.bool_], start: int) -> None:
    """Fill one empty place of slot `start` along the cheapest augmenting path to a key without a slot (Dijkstra).

    Distances are reduced costs. A slot is reached through the first of its keys, called its gate; its other keys are
    at least as far away.
    """
    open_price = key_price + np.where(slot < 0, TIE, 0)  # set to -inf when the slot of a key is reached
    distance = cost[start] - open_price  # set to inf at the same time
    step = np.empty_like(distance)
    reached, gates, offsets = [start], [-1], [0.0]
    settled: list[tuple[Ints | int, float]] = []
    key = int(distance.argmin())
    while (through := slot[key]) >= 0 and np.isfinite(distance[key]):
        near, row = distance[key], cost[through]
        offset = near - row[key] + key_price[key]
        members = np.flatnonzero(slot == through) if wide[through] else key
        open_price[members], distance[members] = -np.inf, np.inf
        settled.append((members, near))
        reached.append(through)
        gates.append(key)
        offsets.append(offset)
        np.subtract(row, open_price, out=step)
        step += offset
        np.minimum(distance, step, out=distance)
        key = int(distance.argmin())
    end = distance[key]
    if not np.isfinite(end):
        raise ValueError("some keys have no slot that they may be assigned to")
    for members, near in settled:
        key_price[members] += near - end
    _reassign(cost, slot, np.array(reached), gates, np.array(offsets), key)


def _reassign(cost: Floats, slot: Ints, reached: Ints, gates: list[int], offsets: Floats, key: int) -> None:
    """Assign `key` to the slot that it was reached from, that slot's gate to the slot before it, and so on."""
    before = len(reached)
    while True:
        number = int((offsets[:before] + cost[reached[:before], key]).argmin())
        slot[key] = reached[number]
        if number == 0:
            return
        key, before = gates[number], number
