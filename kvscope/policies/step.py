"""The data that a policy observes when one query has attended.

Axes of every tensor, in this order: ``R`` runs (budgets of one policy), ``L`` layers, then heads (``H`` query heads,
``G`` key/value heads, or 1 where one decision holds for the whole layer), then ``n`` keys by position, oldest first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

GroupReduction = Literal["mean", "max", "sum"]


@dataclass
class Step:
    """The data that a policy observes after query `t` has attended.

    A policy that is not part of kvscope gets copies of all tensors: other policies share the originals.

    Attributes
    ----------
    t : int
        Position of the query; keys ``0..t`` exist, so ``n = t + 1``.
    prompt, length : int
        ``P`` and ``T``.
    sequence : int
        Number of the sequence.
    kv_heads : int
        ``G``; 1 if the plan, not the policy, makes one decision for all heads of the layer.
    layers : Tensor
        int64 ``[L]``, the numbers of the layers.
    places : tuple of int
        Index of each of them among the layers that share a budget, which are the layers of the model with attention.
    n_layers : int
        Number of layers that share a budget.
    budget : Tensor
        int64 ``[R, L, S]``: number of keys that each deciding head may hold.
    budgets : list of int
        ``B`` of each of the ``R`` runs; the mean of `budget`.
    compresses : bool
        Whether keys are evicted at the end of this step.
    most_visible : int
        The largest number of keys that a head may see. Like `exceeds` it follows from the budgets, so a policy need not
        wait for a GPU to count its keys. If a sliding window removes keys, it can be too large.
    exceeds : bool
        Whether a head may hold more keys than its budget.
    one_by_one : bool
        Whether runs of different sizes are computed faster one by one, as on a CPU, than padded to one size, as on a
        GPU. Decisions must not depend on it.
    visible : Tensor
        bool ``[R, L, S, n]``: the keys that the query sees (``V_t``). ``S`` is ``G``, or 1 with layer scope.
    signals : dict of str to Tensor
        The signals in the policy's `needs`, each with a leading axis of ``R`` or 1: ``value_l1``, ``value_l2``,
        ``key_l2``: ``[., L, G, n]``; ``keys``, ``values``: ``[., L, G, n, D]`` as cached; ``queries``: ``[., L, H, D]``
        of the current query, ``mean_query``: ``[., L, D]``, its mean over query heads; ``rotary``: ``[., L, 4, D]``,
        see `kvscope.policies.rotation`; ``full_weights``:
        ``[., L, H, n]``, the full-cache row; ``selection``: bool ``[., L, G, n]``, the keys that the model's own index
        lets the query see; ``schedule``: ``[R, L, S, n]``, the step after which the optimal schedule
        evicts each key; ``token_kinds``: ``[., L, G, n]``, 2 for special tokens, 1 for punctuation, 0 for others;
        ``gate:FILE``: ``[., L, G, n]``, by how much the gate of each key exceeds its threshold;
        ``filter:FILE``: ``[., L, G, n]``, the product of each key with the filter of its head; ``scorer:FILE``:
        ``[., L, G, n]``, the score of each key.
    live : Tensor or None
        float ``[R, L, H, n]``, the live row: attention over the visible keys, summing to one. None unless needed.
    memory : dict of str to anything
        What the policy stores between the steps of one sequence, apart from its scores.
    draw : callable
        ``draw(seed)`` returns one uniform number in [0, 1) for key `t`, ``[L, S]``; it depends only on the seed, the
        sequence, the layer, the head and the position.
    draw_row : callable
        ``draw_row(seed)`` returns one such number for every query head and key at this step, ``[L, H, n]``.
    rounded : callable
        ``rounded(score)`` returns scores in the precision in which the run accumulates; the engine rounds what a policy
        returns, and a policy rounds scores that it stores itself.
    """

    t: int
    prompt: int
    length: int
    sequence: int
    kv_heads: int
    layers: Tensor
    places: tuple[int, ...]
    n_layers: int
    budget: Tensor
    budgets: list[int]
    compresses: bool
    most_visible: int
    exceeds: bool
    one_by_one: bool
    visible: Tensor
    signals: dict[str, Tensor]
    live: Tensor | None
    memory: dict[str, Any]
    draw: Callable[[int], Tensor]
    draw_row: Callable[[int], Tensor]
    rounded: Callable[[Tensor], Tensor]

    def weights(self, group: GroupReduction = "mean") -> Tensor:
        """Return the live row per key/value head, ``[R, L, G, n]``; `group` reduces its query heads to one."""
        return self.grouped(self._live(), group)

    def head_weights(self) -> Tensor:
        """Return the live row of every query head, ``[R, L, H, n]``."""
        return self._live()

    def visible_to_heads(self) -> Tensor:
        """Return the keys that each query head sees, bool ``[R, L, H, n]``."""
        return self.visible.repeat_interleave(self._live().shape[2] // self.visible.shape[2], 2)

    def layer_weights(self) -> Tensor:
        """Return the live row averaged over all query heads of the layer, ``[R, L, 1, n]``."""
        live = self._live()
        return compute_once_if_shared(live, lambda rows: rows.mean(2, keepdim=True, dtype=torch.float64).to(rows.dtype))

    def grouped(self, rows: Tensor, group: GroupReduction = "mean") -> Tensor:
        """Return rows of query heads ``[., L, H, n]`` as rows of key/value heads ``[., L, G, n]``."""

        def reduced(rows: Tensor) -> Tensor:
            grouped = rows.reshape(*rows.shape[:2], self.kv_heads, -1, rows.shape[-1])
            if group == "max":
                return grouped.amax(3)
            exact = torch.float64
            return (grouped.mean(3, dtype=exact) if group == "mean" else grouped.sum(3, dtype=exact)).to(rows.dtype)

        return compute_once_if_shared(rows, reduced)

    def _live(self) -> Tensor:
        assert self.live is not None, "the policy reads weights without naming them in `needs`"
        return self.live


def compute_once_if_shared(rows: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
    """Return ``make(rows)`` for rows ``[R, ...]``, computed once if all runs share them, as before any eviction."""
    if len(rows) > 1 and rows.stride(0) == 0:
        return make(rows[:1]).expand(len(rows), *[-1] * (rows.ndim - 1))
    return make(rows)
