"""Optimal eviction schedules: the best that any policy could do if it knew all future rows.

Once the cache is full, one key is evicted at every step, so a schedule assigns an eviction step to every key. Evicting
a key after step ``t`` loses the attention mass that it would have received later. Finding the schedule that loses the
least is an assignment problem, which `matching.match` solves together with a proof of optimality.

Sliding-window layers need no special case: a key outside the window gets no attention, so evicting it costs nothing.
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
BYTES = 512 * 2**20  # limit for the weights in memory at a time


@dataclass(frozen=True)
class Schedules:
    """The best schedule of every head under every budget.

    Attributes
    ----------
    leaves : Tensor
        float32 ``[R, L, S, T]``: step after which a key is evicted, ``T`` for keys that are never evicted.
    lost : float64 ``[R]``
        Attention mass on evicted keys, summed over steps, heads and layers.
    least : float64 ``[R]``
        Lower bound of that for any schedule; it equals `lost` up to rounding.
    """

    leaves: Tensor
    lost: Floats
    least: Floats


def schedules(read: Read, shape: Shape, budgets: Sequence[int], prefill: Prefill, scope: Scope) -> Schedules:
    """Return the schedules that retain the most attention mass of the full rows over the scored steps.

    The weight of a key is its share of the row, averaged over the query heads that share a decision: those of a
    key/value head, or with ``scope="layer"`` all heads of the layer.

    Parameters
    ----------
    read : callable
        ``read(position, start, stop)`` returns full rows of the layer at `position` in `shape`,
        ``[H, stop - start, n]`` with `n` at least `stop`.
    shape : Shape
        Sizes.
    budgets : sequence of int
        ``B`` of each run.
    prefill : Prefill
        What happens during the prompt.
    scope : {"kv_head", "layer"}
        Whether each key/value head has its own schedule, or each layer one for all heads.
    """
    heads = 1 if scope == "layer" else shape.kv_heads
    prompt = shape.prompt if prefill == "full" else 1
    full = [max(prompt - 1, budget) for budget in budgets]  # step of the first eviction
    leaves = torch.full((len(budgets), len(shape.layers), heads, shape.length), float(shape.length))
    lost, least = np.zeros(len(budgets)), np.zeros(len(budgets))
    first = min(full) + 1
    together = max(1, BYTES // (8 * shape.length * max(1, shape.length - first)))
    for layer in range(len(shape.layers)):
        for start in range(0, heads, together):
            some = range(start, min(start + together, heads))
            weights = _weights(read, shape, layer, first, heads, some)
            for run, budget in enumerate(budgets):
                for head, head_weights in zip(some, weights, strict=True):
                    best, mass, bound = schedule(head_weights[full[run] + 1 - first :], budget)
                    leaves[run, layer, head] = torch.from_numpy(best)
                    lost[run] += mass
                    least[run] += bound
    return Schedules(leaves, lost, least)


def schedule(weights: Floats, budget: int) -> tuple[Floats, float, float]:
    """Return the eviction step of each key of one head, the mass that this loses, and the least any schedule loses.

    Parameters
    ----------
    weights : float64 ``[n, T]``
        Rows of the `n` steps after the first eviction; ``n`` is 0 if there is no such step.
    budget : int
        ``B``: keys that are held after each eviction.

    Returns
    -------
    leaves : float64 ``[T]``
        Step after which a key is evicted, ``T`` if it never is.
    lost, least : float
        Attention mass; equal up to rounding.
    """
    count, length = weights.shape
    if count == 0:
        return np.full(length, float(length)), 0.0, 0.0
    first = length - 1 - count  # step of the first eviction; slots are the steps from here on, and "never"
    cost = np.zeros((count + 1, length))
    np.cumsum(weights[::-1], axis=0, out=cost[-2::-1])  # attention mass that a key gets after each step
    key, step = np.arange(length), np.arange(first, length - 1)[:, None]
    cost[:-1][key > step] = np.inf
    room = np.ones(count + 1, dtype=np.int64)
    room[0], room[-1] = first + 1 - budget, budget + 1
    best = match(cost, room)
    return np.where(best.slot < count, first + best.slot, length).astype(np.float64), best.cost, best.bound


def _weights(read: Read, shape: Shape, layer: int, first: int, heads: int, some: range) -> Floats:
    """Return the attention mass of each key in the rows from `first` on, ``[S, n, T]`` for the heads `some`."""
    length = shape.length
    window = shape.windows[layer] if shape.windows else None
    weights = np.zeros((len(some), max(0, length - first), length))
    for start in range(first, length, STEPS):
        stop = min(start + STEPS, length)
        rows = read(layer, start, stop)[..., :stop].cpu().double()
        share = rows / rows.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        grouped = share.view(heads, -1, stop - start, stop).mean(1)[some.start : some.stop]
        age = torch.arange(start, stop)[:, None] - torch.arange(stop)
        counted = (age > 0) & (age < (length if window is None else window))  # a query always sees its own key
        weights[:, start - first : stop - first, :stop] = (grouped * counted).numpy()
    return weights
