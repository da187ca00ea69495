"""Budget allocation: how many keys each layer and head may hold. The total always equals that of uniform allocation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from kvscope.core.registry import Registry
from kvscope.policies.base import Step

When = Literal["start", "prompt"]


@dataclass
class AllocationRequest:
    """The budget to allocate, and what an allocator may base its decision on.

    Attributes
    ----------
    budget : Tensor
        int64 ``[R]``: mean number of keys per deciding head.
    fixed : Tensor
        int64 ``[R]``: how many of them each head needs for protected keys; these cannot be given to other heads.
    layers : Tensor
        int64 ``[L]``: places of the simulated layers among those that share the budget.
    n_layers : int
        Layers that share the budget.
    heads : int
        ``S``: deciding heads of a layer.
    kv_heads_of : Tensor or None
        int64 ``[n_layers]``: ``G`` of every layer that shares the budget, where layers differ.
    prompt : int
        ``P``; at the end of the prompt no head can hold more keys than that.
    score : Tensor or None
        float ``[R, L, S, n]`` at the end of the prompt, ``-inf`` where a key is protected or evicted.
    memory : dict of str to Tensor
        What `Allocator.observe` has stored; axis 1 of each tensor is the layer.
    """

    budget: Tensor
    fixed: Tensor
    layers: Tensor
    n_layers: int
    heads: int
    prompt: int
    score: Tensor | None = None
    memory: dict[str, Tensor] = field(default_factory=dict)
    kv_heads_of: Tensor | None = None

    @property
    def free(self) -> Tensor:
        """Keys per head that can be given to other heads, int64 ``[R]``."""
        return self.budget - self.fixed

    @property
    def room(self) -> Tensor:
        """Keys at the end of the prompt that are not protected, int64 ``[R]``."""
        return (self.prompt - self.fixed).clamp(min=0)


class Allocator:
    """Allocates a budget: `share` returns how many keys each layer and head may hold.

    Attributes
    ----------
    name : str
        Set by the decorator.
    when : {"start", "prompt"}
        Whether it decides before the first step, or from what it observed during the prompt.
    spans : {"none", "heads", "layers"}
        Whether it gives keys of one head to other heads of the layer, keys of one layer to other layers, or neither.
    needs : frozenset of str
        Signals that `observe` reads.
    looks_across : bool
        Whether it compares what it observed in different layers, which must then be stepped together.
    paper : str
        Source of the rule.
    """

    name: ClassVar[str] = ""
    when: ClassVar[When] = "start"
    spans: ClassVar[Literal["none", "heads", "layers"]] = "none"
    needs: ClassVar[frozenset[str]] = frozenset()
    looks_across: ClassVar[bool] = False
    paper: ClassVar[str] = ""

    def observe(self, step: Step, memory: dict[str, Tensor]) -> None:
        """Observe a step of the prompt and store in `memory` what `share` needs; by default nothing."""

    def condensed(self, memory: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what `share` needs of a memory, ``[R, L, ...]`` without an axis for heads; needed by `looks_across`.

        Layers with different heads are then joined. By default the memory has no such axis.
        """
        return memory

    def share(self, request: AllocationRequest) -> Tensor:
        """Return the number of keys per run, layer and head, int64 ``[R, L, S]``."""
        raise NotImplementedError(f"{type(self).__name__} does not allocate a budget: define share()")


ALLOCATORS: Registry[type[Allocator]] = Registry("allocation", "kvscope.allocations", "kvscope.engine.allocators")
A = TypeVar("A", bound=Allocator)


def allocator(name: str) -> Callable[[type[A]], type[A]]:
    """Return a decorator that registers an allocator class under `name`."""

    def register(cls: type[A]) -> type[A]:
        cls.name = name
        ALLOCATORS.register(name, cls)
        return cls

    return register


def among_layers(request: AllocationRequest, weights: Tensor, most: Tensor | None = None) -> Tensor:
    """Return the free keys of each layer that shares the budget, in proportion to `weights`, int64 ``[R, N, S]``.

    The heads of a layer get equally many. Where layers have different numbers of heads, a weight is that of a head: a
    layer's keys are in proportion to its weight times its heads. They are divided among its heads, the first of which
    get one more if there is a rest; a layer that decides as one cannot hold a rest, and leaves it.

    Parameters
    ----------
    request : AllocationRequest
        The budget.
    weights : Tensor
        float ``[R, N]``.
    most : Tensor, optional
        int64 ``[R, 1]``: most free keys of a head.
    """
    heads, count = request.kv_heads_of, request.heads
    if heads is None:
        return apportion(request.free * request.n_layers, weights, most)[..., None].expand(-1, -1, count)
    keys = apportion(request.free * heads.sum(), weights * heads, request.room[:, None] * heads)  # [R, N]
    each, rest = (keys // heads)[..., None], (keys % heads)[..., None]
    return each.expand(-1, -1, count) + (torch.arange(count, device=keys.device) < rest if count > 1 else 0)


def apportion(total: Tensor, weights: Tensor, most: Tensor | None = None) -> Tensor:
    """Return whole numbers along the last axis that sum to `total`, in proportion to `weights` (largest remainders).

    If remainders are equal to nine digits, the first one is rounded up.

    Parameters
    ----------
    total : Tensor
        int64 ``[...]``.
    weights : Tensor
        float ``[..., N]``, not negative; they need not sum to `total`, since they are scaled.
    most : Tensor, optional
        int64, broadcast to `weights`: upper limit of each share. The excess goes to the other shares, in proportion to
        their weights.

    Returns
    -------
    Tensor
        int64 ``[..., N]``. If the limits sum to less than `total`, every share is at its limit.
    """
    weights = weights.to(torch.float64).clamp(min=0)
    weights = torch.where(weights.sum(-1, keepdim=True) > 0, weights, torch.ones_like(weights))
    limit = torch.full_like(weights, torch.inf) if most is None else most.expand_as(weights).to(torch.float64)
    total = torch.minimum(total.to(torch.float64), limit.sum(-1))
    share = torch.zeros_like(weights)
    for _ in range(weights.shape[-1]):  # each round fills at least one share to its limit, or ends
        below_limit = share < limit
        weight = torch.where(below_limit, weights, 0)
        weight = torch.where(weight.sum(-1, keepdim=True) > 0, weight, below_limit.to(weight.dtype))
        rest = (total - share.sum(-1))[..., None]
        grown = share + rest * weight / weight.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        if bool((grown <= limit).all()):
            share = grown
            break
        share = torch.minimum(grown, limit)
    floor = (share + 1e-9).floor()
    missing = (total - floor.sum(-1)).round()[..., None]
    remainder = torch.where(floor < limit, ((share - floor) * 1e9).round(), -1e9)
    rank = remainder.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1, stable=True)
    return (floor + (rank < missing)).to(torch.int64)
