"""Exact transportation: every key goes to one slot, every slot takes as many keys as it has room, at the least cost.

Slots follow each other in time and their prices change smoothly along it, which is what makes this faster than a
general assignment: the prices of a few merged slots, then of more, are good first guesses of all of them, and from a
good guess only short paths are left to find. Prices come with every answer and prove it: no assignment costs less than
they add up to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MERGED = (4, 16, 64, 256, 1024)  # numbers of slots of the problems that are solved first
HEAT = 0.2  # of soft choices, in steps of price from one slot to the next
SWEEPS = 5
WIDTH = 8.0  # in heats: a slot that is dearer than that by a key's best one gets less than a thousandth of it
TIE = 1e-14  # masses that count as equal, so that a path stops at a key without a slot: rounding is of that size


@dataclass(frozen=True)
class Matching:
    """An assignment and its proof.

    Attributes
    ----------
    slot : int ``[T]``
        Slot of each key.
    cost : float
        What it costs.
    slot_price : float64 ``[m]``
    key_price : float64 ``[T]``
        ``slot_price[s] + key_price[k] <= cost[s, k]`` for every pair, with equality where `k` goes to `s`, up to
        rounding.
    bound : float
        What the prices add up to, each slot's as often as it has room: no assignment costs less.
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
        Of key ``k`` in slot ``s``; infinite where it cannot go, which is in no slot after one where it can. Slots are
        in the order of time, so that neighbours are alike, and the last stands apart; any other order takes longer.
    room : int64 ``[m]``
        How many keys each slot takes, at least one; their sum is ``T``.

    Raises
    ------
    ValueError
        If there is no assignment, or the room is not that of ``T`` keys.
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
    """Return the problem with all slots but the last merged into `size`, and the slot in the middle of each.

    A key that can go to some slots of a merged one can go there: what is cheap to feasible stays feasible.
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
    """Return slot prices at which keys that choose softly among nearby slots fill each of them better (Sinkhorn)."""
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
        of_slot += np.log(room / np.maximum(filled, room / 20))  # an empty slot gets cheaper, but not at once
    return price + heat * of_slot


def _improve(cost: Floats, room: Ints, price: Floats) -> tuple[Ints, Floats]:
    """Return the slot of each key and the prices of the keys, from a guess of the prices of the slots.

    Keys take the slot that is cheapest for them while there is room, the first come; then each empty place is filled
    along the shortest path of moves. As in Jonker and Volgenant (1987), with slots for more than one key.
    """
    slots, keys = cost.shape
    excess = cost - price[:, None]
    choice = excess.argmin(0)
    key_price = excess[choice, np.arange(keys)]
    order = choice.argsort(kind="stable")
    wanted = choice[order]
    taken = np.arange(keys) - np.searchsorted(wanted, wanted) < room[wanted]
    slot = np.full(keys, -1)
    slot[order[taken]] = wanted[taken]
    empty = room - np.bincount(wanted[taken], minlength=slots)
    wide = room > 1
    for start in np.repeat(np.arange(slots), empty):
        _fill(cost, slot, key_price, wide, int(start))
    return slot, key_price


def _fill(cost: Floats, slot: Ints, key_price: Floats, wide: NDArray[np.bool_], start: int) -> None:
    """Fill one empty place of the slot `start`: move keys along the cheapest path from one without a slot (Dijkstra).

    Distances are reduced costs. A slot is reached through the first of its keys, its gate; the others are then no
    nearer than that.
    """
    open_price = key_price + np.where(slot < 0, TIE, 0)  # -inf once the slot of a key has been reached
    distance = cost[start] - open_price  # inf from then on
    step = np.empty_like(distance)
    reached, gates, offsets = [start], [-1], [0.0]
    settled: list[tuple[Any, float]] = []
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
        raise ValueError("some keys have no slot to go to")
    for members, near in settled:
        key_price[members] += near - end
    _move(cost, slot, np.array(reached), gates, np.array(offsets), key)


def _move(cost: Floats, slot: Ints, reached: Ints, gates: list[int], offsets: Floats, key: int) -> None:
    """Give `key` to the slot from which it was reached, the gate of that slot to the one before it, and so on."""
    before = len(reached)
    while True:
        place = int((offsets[:before] + cost[reached[:before], key]).argmin())
        slot[key] = reached[place]
        if place == 0:
            return
        key, before = gates[place], place
