"""How the budget of a model is shared out among its layers and heads. The total is always that of the uniform share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from kvscope.core.registry import Registry
from kvscope.policies.base import Step

When = Literal["start", "prompt"]


@dataclass
class AllocationRequest:
    """What there is to share out, and what an allocator may look at.

    Attributes
    ----------
    budget : Tensor
        int64 ``[R]``: mean keys per deciding head.
    fixed : Tensor
        int64 ``[R]``: how many of them each head needs for keys that it protects; they are not moved.
    layers : Tensor
        int64 ``[L]``: numbers of the layers at hand.
    n_layers : int
        Layers of the model.
    heads : int
        ``S``: deciding heads of a layer.
    prompt : int
        ``P``; no head can use more than that at the end of the prompt.
    score : Tensor or None
        float ``[R, L, S, n]`` at the end of the prompt, ``-inf`` where a key is protected or gone.
    memory : dict
        What `Allocator.observe` has remembered.
    """

    budget: Tensor
    fixed: Tensor
    layers: Tensor
    n_layers: int
    heads: int
    prompt: int
    score: Tensor | None = None
    memory: dict[str, Any] = field(default_factory=dict)

    @property
    def free(self) -> Tensor:
        """Keys per head that can be moved, int64 ``[R]``."""
        return self.budget - self.fixed

    @property
    def room(self) -> Tensor:
        """Keys that are not protected at the end of the prompt, int64 ``[R]``."""
        return (self.prompt - self.fixed).clamp(min=0)


class Allocator:
    """Shares out a budget: `share` returns how many keys each layer and head may hold.

    Attributes
    ----------
    name : str
        Set by the decorator.
    when : {"start", "prompt"}
        Whether it decides before the first step, or from what it saw of the prompt.
    spans : {"none", "heads", "layers"}
        Among what it moves keys.
    needs : frozenset of str
        Signals that `observe` reads.
    looks_across : bool
        Whether it compares what it saw in different layers, which must then be stepped together.
    paper : str
        Where the rule comes from.
    """

    name: ClassVar[str] = ""
    when: ClassVar[When] = "start"
    spans: ClassVar[Literal["none", "heads", "layers"]] = "none"
    needs: ClassVar[frozenset[str]] = frozenset()
    looks_across: ClassVar[bool] = False
    paper: ClassVar[str] = ""

    def observe(self, step: Step, memory: dict[str, Any]) -> None:
        """Look at a step of the prompt; nothing by default."""

    def share(self, request: AllocationRequest) -> Tensor:
        """Return keys per run, layer and head, int64 ``[R, L, S]``."""
        raise NotImplementedError(f"{type(self).__name__} does not share anything out: define share()")


ALLOCATORS: Registry[type[Allocator]] = Registry("allocation", "kvscope.allocations", "kvscope.engine.allocators")
A = TypeVar("A", bound=Allocator)


def allocator(name: str) -> Callable[[type[A]], type[A]]:
    """Return a decorator that registers an allocator class under `name`."""

    def register(cls: type[A]) -> type[A]:
        cls.name = name
        ALLOCATORS.register(name, cls)
        return cls

    return register


def apportion(total: Tensor, wish: Tensor, most: Tensor | None = None) -> Tensor:
    """Return whole numbers along the last axis that sum to `total` and are nearest to `wish` (largest remainders).

    Of remainders that are equal to nine digits the first is rounded up.

    Parameters
    ----------
    total : Tensor
        int64 ``[...]``.
    wish : Tensor
        float ``[..., N]``, not negative; its sum need not be `total`: it is scaled.
    most : Tensor, optional
        int64, broadcast to `wish`: no share is larger; what does not fit goes to the others by their wish.

    Returns
    -------
    Tensor
        int64 ``[..., N]``. If even `most` everywhere is less than `total`, all are `most`.
    """
    wish = wish.to(torch.float64).clamp(min=0)
    wish = torch.where(wish.sum(-1, keepdim=True) > 0, wish, torch.ones_like(wish))
    limit = torch.full_like(wish, torch.inf) if most is None else most.expand_as(wish).to(torch.float64)
    total = torch.minimum(total.to(torch.float64), limit.sum(-1))
    share = torch.zeros_like(wish)
    for _ in range(wish.shape[-1]):  # each round fills at least one share to its limit, or ends
        open_ = share < limit
        weight = torch.where(open_, wish, 0)
        weight = torch.where(weight.sum(-1, keepdim=True) > 0, weight, open_.to(weight.dtype))
        left = (total - share.sum(-1))[..., None]
        grown = share + left * weight / weight.sum(-1, keepdim=True).clamp(min=torch.finfo(wish.dtype).tiny)
        if bool((grown <= limit).all()):
            share = grown
            break
        share = torch.minimum(grown, limit)
    floor = (share + 1e-9).floor()
    missing = (total - floor.sum(-1)).round()[..., None]
    remainder = torch.where(floor < limit, ((share - floor) * 1e9).round(), -1e9)
    place = remainder.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1, stable=True)
    return (floor + (place < missing)).to(torch.int64)
