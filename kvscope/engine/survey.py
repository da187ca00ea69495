"""Budget allocation that depends on all layers, where these are not stepped together: decided before keys are evicted.

With full prefill the prompt's rows are those of the full cache in every run. So the prompt gives an allocator all that
it observes, layer by layer or those with the same heads together, and later simulations use the resulting allocation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvscope.engine.allocation import AllocationRequest, Allocator
from kvscope.policies.base import Step


class Given(Allocator):
    """Allocates, at the end of the prompt, shares that were computed beforehand."""

    when = "prompt"

    def __init__(self, share: Tensor) -> None:
        self._share = share

    @classmethod
    def joined(cls, layers: Sequence[Given]) -> Given:
        """Return the allocator of several layers from those of each."""
        return cls(torch.cat([one._share for one in layers], 1))

    def share(self, request: AllocationRequest) -> Tensor:
        return self._share.to(request.budget.device)


class Recording(Allocator):
    """Observes some layers for another allocator, and records the request that this one decides from.

    Attributes
    ----------
    request : AllocationRequest or None
        What is known at the end of the prompt.
    """

    when = "prompt"

    def __init__(self, allocator: Allocator) -> None:
        self._allocator = allocator
        self.request: AllocationRequest | None = None

    def observe(self, step: Step, memory: dict[str, Tensor]) -> None:
        self._allocator.observe(step, memory)

    def share(self, request: AllocationRequest) -> Tensor:
        self.request = replace(request, memory=dict(request.memory))  # a copy, since the caller clears the original
        return request.budget[:, None, None].expand(-1, len(request.layers), request.heads).clone()


def shares(allocator: Allocator, requests: Sequence[AllocationRequest]) -> list[Tensor]:
    """Return the keys of the layers of each request, int64 ``[R, L, S]``, decided from all of them together."""
    merged = _merged(allocator, requests)
    whole = {heads: allocator.share(replace(merged, heads=heads)) for heads in {one.heads for one in requests}}
    ends = torch.tensor([len(one.layers) for one in requests]).cumsum(0).tolist()
    return [whole[one.heads][:, end - len(one.layers) : end] for one, end in zip(requests, ends, strict=True)]


def _merged(allocator: Allocator, parts: Sequence[AllocationRequest]) -> AllocationRequest:
    """Return the request for the layers of all parts; without scores where these differ in their heads."""
    device = parts[0].budget.device

    def joined(tensors: Sequence[Tensor], axis: int) -> Tensor:
        return torch.cat([tensor.to(device) for tensor in tensors], axis)

    differ = [one.kv_heads_of.to(device)[one.layers.to(device)] for one in parts if one.kv_heads_of is not None]
    sizes = {(name, *value.shape[2:]) for one in parts for name, value in one.memory.items()}
    same = len(sizes) == len(parts[0].memory)
    memories = [one.memory if same else allocator.condensed(one.memory) for one in parts]
    scores = [one.score for one in parts if one.score is not None and not differ]
    return replace(
        parts[0],
        layers=joined([one.layers for one in parts], 0),
        n_layers=sum(len(one.layers) for one in parts),
        score=joined(scores, 1) if scores else None,
        memory={name: joined([memory[name] for memory in memories], 1) for name in memories[0]},
        kv_heads_of=joined(differ, 0) if differ else None,
    )
