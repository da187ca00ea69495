"""The best that any policy could do: schedules of evictions made with the rows to come in hand.

From the step at which the cache is full one key leaves for good at every step, so a schedule gives every key a step at
which it leaves. A key that leaves after step ``t`` loses the attention it would still have got, and the schedule that
loses least is an assignment problem, which `matching.match` solves with a proof.

A layer whose model itself forgets keys fits in: a forgotten key gets no more attention, so that its leaving costs
nothing, and the step at which it goes by itself is the one that the schedule has for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvscope.bounds.matching import match
from kvscope.core.options import Prefill
from kvscope.engine.rows import Shape
from kvscope.policies.base import Scope

Floats = NDArray[np.float64]
Read = Callable[[int, int, int], Tensor]  # layer, by its position in the group; start; stop -> [H, stop - start, n]

STEPS = 64  # rows that are read at a time
BYTES = 512 * 2**20  # of the weights that are held at a time


@dataclass(frozen=True)
class Schedules:
    """The best schedule of every head under every budget.

    Attributes
    ----------
    leaves : Tensor
        float32 ``[R, L, S, T]``: step after which a key leaves; the length of the sequence for keys that stay.
    lost : float64 ``[R]``
        Mass that goes to keys which are gone, summed over steps, heads and layers.
    least : float64 ``[R]``
        What no schedule can lose less than; the two differ by rounding.
    """

    leaves: Tensor
    lost: Floats
    least: Floats


def schedules(read: Read, shape: Shape, budgets: Sequence[int], prefill: Prefill, scope: Scope) -> Schedules:
    """Return the schedules that retain most of the full rows' mass over the scored steps.

    The weight of a key is its share of the row, averaged over the query heads that share a decision: those of a
    key/value head, or with ``scope="layer"`` all of them.

    Parameters
    ----------
    read : callable
        ``read(position, start, stop)`` gives full rows of the layer at `position` in `shape`, ``[H, stop - start, n]``
        with `n` at least `stop`.
    budgets : sequence of int
        ``B`` of each run.
    """
    heads = 1 if scope == "layer" else shape.kv_heads
    prompt = shape.prompt if prefill == "full" else 1
    full = [max(prompt - 1, budget) for budget in budgets]  # step after which the first key leaves
    leaves = torch.full((len(budgets), len(shape.layers), heads, shape.length), float(shape.length))
    lost, least = np.zeros(len(budgets)), np.zeros(len(budgets))
    first = min(full) + 1
    together = max(1, BYTES // (8 * shape.length * max(1, shape.length - first)))
    for layer in range(len(shape.layers)):
        for start in range(0, heads, together):
            some = range(start, min(start + together, heads))
            weights = _weights(read, shape, layer, first, heads, some)
            for run, budget in enumerate(budgets):
                for head, own in zip(some, weights, strict=True):
                    best, of_best, proven = schedule(own[full[run] + 1 - first :], budget)
                    leaves[run, layer, head] = torch.from_numpy(best)
                    lost[run] += of_best
                    least[run] += proven
    return Schedules(leaves, lost, least)


def schedule(weights: Floats, budget: int) -> tuple[Floats, float, float]:
    """Return when each key of one head leaves, the mass that this loses, and the least that any schedule loses.

    Parameters
    ----------
    weights : float64 ``[n, T]``
        Rows of the last `n` steps, those after the first eviction; ``n`` is 0 if no row sees an eviction.
    budget : int
        ``B``: keys that are left after each eviction.

    Returns
    -------
    leaves : float64 ``[T]``
        Step after which a key leaves, ``T`` where it stays.
    lost, least : float
        Equal up to rounding.
    """
    count, length = weights.shape
    if count == 0:
        return np.full(length, float(length)), 0.0, 0.0
    first = length - 1 - count  # the step of the first eviction; the slots are the steps from there, and the end
    cost = np.zeros((count + 1, length))
    np.cumsum(weights[::-1], axis=0, out=cost[-2::-1])  # what a key still gets after each step
    key, step = np.arange(length), np.arange(first, length - 1)[:, None]
    cost[:-1][key > step] = np.inf
    room = np.ones(count + 1, dtype=np.int64)
    room[0], room[-1] = first + 1 - budget, budget + 1
    best = match(cost, room)
    return np.where(best.slot < count, first + best.slot, length).astype(np.float64), best.cost, best.bound


def _weights(read: Read, shape: Shape, layer: int, first: int, heads: int, some: range) -> Floats:
    """Return what a key's presence is worth in each row from `first` on, ``[S, n, T]`` for the heads `some`."""
    length = shape.length
    window = shape.windows[layer] if shape.windows else None
    weights = np.zeros((len(some), max(0, length - first), length))
    for start in range(first, length, STEPS):
        stop = min(start + STEPS, length)
        rows = read(layer, start, stop)[..., :stop].cpu().double()
        share = rows / rows.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        grouped = share.view(heads, -1, stop - start, stop).mean(1)[some.start : some.stop]
        age = torch.arange(start, stop)[:, None] - torch.arange(stop)
        reached = (age > 0) & (age < (length if window is None else window))  # a query sees its own key in any case
        weights[:, start - first : stop - first, :stop] = (grouped * reached).numpy()
    return weights
