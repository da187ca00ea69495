"""Budgets that depend on all layers, found before the closed loop goes through them one by one.

With full prefill the prompt's rows are those of the full cache in every run, so one pass over the prompt shows an
allocator all that it may look at, and the pass that evicts gets its answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvscope.closed_loop.forward import PassShape, RunBatch, logits_of, require_whole, rows_of, simulation_of
from kvscope.engine.allocation import ALLOCATORS, AllocationRequest, Allocator
from kvscope.engine.rows import Block
from kvscope.model.attention_hook import Call, Kernel, replace_attention
from kvscope.policies.base import Step


class Given(Allocator):
    """Hands out, at the end of the prompt, what was found beforehand."""

    when = "prompt"

    def __init__(self, share: Tensor) -> None:
        self._share = share

    def share(self, request: AllocationRequest) -> Tensor:
        return self._share.to(request.budget.device)


class _Watching(Allocator):
    """Looks at one layer as another allocator would, and keeps what that one needs to decide."""

    when = "prompt"

    def __init__(self, allocator: Allocator) -> None:
        self._allocator = allocator
        self.request: AllocationRequest | None = None

    def observe(self, step: Step, memory: dict[str, Any]) -> None:
        self._allocator.observe(step, memory)

    def share(self, request: AllocationRequest) -> Tensor:
        self.request = replace(request, memory=dict(request.memory))  # the engine clears its own
        return request.budget[:, None, None].expand(-1, 1, request.heads).clone()


def surveyed(model: Any, ids: Tensor, batch: RunBatch, text: PassShape) -> RunBatch:
    """Return a batch with the share of every layer, found in one pass over the prompt, the first of ids ``[T]``."""
    prompt = replace(text, length=text.prompt)
    found: dict[int, AllocationRequest] = {}

    def answer(call: Call, kernel: Kernel) -> Tensor:
        require_whole(call, prompt)
        found[call.layer] = _watch(rows_of(call, 0, 1), batch, prompt)
        return kernel()

    with replace_attention(model, answer):
        logits_of(model, ids[None, : text.prompt], slice(-1, None))
    merged = _merged(list(found.values()))
    share = ALLOCATORS.get(batch.plan.allocate)().share(merged)  # [R, L, S]
    own = {layer: Given(share[:, place : place + 1]) for place, layer in enumerate(found)}
    return replace(batch, allocators=own)


def _watch(call: Call, batch: RunBatch, prompt: PassShape) -> AllocationRequest:
    watching = _Watching(ALLOCATORS.get(batch.plan.allocate)())
    watched = replace(batch, allocators={call.layer: watching})
    simulation = simulation_of(_repeated(call, len(batch.budgets)), watched, prompt)
    rows = call.rows(0, prompt.length)
    simulation.block(Block(rows[:, None], 0))
    assert watching.request is not None, "asked for at the end of the prompt"
    return watching.request


def _merged(layers: Sequence[AllocationRequest]) -> AllocationRequest:
    """Return the request of all layers from those of single ones."""
    device = layers[0].budget.device

    def joined(parts: Sequence[Tensor], axis: int) -> Tensor:
        return torch.cat([part.to(device) for part in parts], axis)

    memory = {
        name: joined([one.memory[name] for one in layers], 1) if isinstance(value, Tensor) else value
        for name, value in layers[0].memory.items()
    }
    scores = [one.score for one in layers if one.score is not None]
    return replace(
        layers[0],
        layers=joined([one.layers for one in layers], 0),
        n_layers=len(layers),
        score=joined(scores, 1) if scores else None,
        memory=memory,
    )


def _repeated(call: Call, runs: int) -> Call:
    def wide(tensor: Tensor) -> Tensor:
        return tensor.expand(runs, *tensor.shape[1:])

    return replace(call, query=wide(call.query), key=wide(call.key), value=wide(call.value))
