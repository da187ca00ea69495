"""When the budget of a simulation is allocated to its layers and heads: before the first step or after the prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from kvscope.engine.allocation import ALLOCATORS, AllocationRequest, Allocator
from kvscope.engine.cache_state import CacheState
from kvscope.policies.base import Step


class BudgetSharing:
    """Calls an allocator at the right time: before the first step, or at the end of the prompt.

    Parameters
    ----------
    allocator : Allocator
        The rule.
    request : AllocationRequest
        The budget to allocate.
    prompt : int
        ``P`` with full prefill; 0 with streaming prefill, where the allocator observes no step.
    whole : list of int
        Layers of the group that hold every key, whatever their share.
    length : int
        ``T``, which is the budget of these.
    """

    def __init__(
        self, allocator: Allocator, request: AllocationRequest, prompt: int, whole: list[int], length: int
    ) -> None:
        self.allocator, self._request, self._prompt = allocator, request, prompt
        self._whole, self._length = whole, length

    @property
    def fixed(self) -> bool:
        """Whether the shares are known before the first step."""
        return self.allocator.when == "start"

    def at_start(self) -> Tensor:
        """Return the shares for the first step, int64 ``[R, L, S]``: uniform if the allocator needs the prompt."""
        return self._opened((self.allocator if self.fixed else ALLOCATORS.get("uniform")()).share(self._request))

    def observe(self, step: Step, state: CacheState) -> None:
        """Let the allocator observe a scored step of the prompt; at the prompt's end, set the budgets of `state`."""
        if self.fixed or step.t >= self._prompt:
            return
        request = self._request
        self.allocator.observe(step, request.memory)
        if step.t == self._prompt - 1:
            n = step.t + 1
            request.score = state.score[..., :n].masked_fill(~state.evictable(n), -torch.inf)
            state.budget = self._opened(self.allocator.share(request).to(torch.int64))
            request.score = None
            request.memory.clear()

    def _opened(self, share: Tensor) -> Tensor:
        """Return the shares ``[R, L, S]`` with room for every key in the layers that hold them all."""
        if self._whole:
            share = share.clone()
            share[:, self._whole] = self._length
        return share
