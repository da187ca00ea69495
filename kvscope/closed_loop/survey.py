"""Budget allocation that depends on all layers, computed before the closed loop, which steps layers one by one.

With full prefill the prompt's rows are those of the full cache in every run. So one pass over the prompt gives an
allocator all that it observes, and the pass that evicts uses the resulting allocation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvscope.closed_loop.forward import PassShape, RunBatch, logits_of, require_whole, rows_of, simulation_of
from kvscope.closed_loop.passage import Passage
from kvscope.core.model_types import CausalModel
from kvscope.engine.allocation import ALLOCATORS, AllocationRequest, Allocator
from kvscope.engine.rows import Block
from kvscope.model.attention_hook import Call, Kernel, replace_attention
from kvscope.policies.base import Step


class Given(Allocator):
    """Allocates, at the end of the prompt, shares that were computed beforehand."""

    when = "prompt"

    def __init__(self, share: Tensor) -> None:
        self._share = share

    def share(self, request: AllocationRequest) -> Tensor:
        return self._share.to(request.budget.device)


class _Recording(Allocator):
    """Observes one layer for another allocator, and records the request that this one decides from."""

    when = "prompt"

    def __init__(self, allocator: Allocator) -> None:
        self._allocator = allocator
        self.request: AllocationRequest | None = None

    def observe(self, step: Step, memory: dict[str, Tensor]) -> None:
        self._allocator.observe(step, memory)

    def share(self, request: AllocationRequest) -> Tensor:
        self.request = replace(request, memory=dict(request.memory))  # a copy, since the caller clears the original
        return request.budget[:, None, None].expand(-1, 1, request.heads).clone()


def surveyed(model: CausalModel, passage: Passage, batch: RunBatch, text: PassShape) -> RunBatch:
    """Return a batch with an allocator for each layer, from one pass over the prompt of a passage."""
    prompt = replace(text, length=text.prompt)
    requests: dict[int, AllocationRequest] = {}

    def answer(call: Call, kernel: Kernel) -> Tensor:
        require_whole(call, prompt)
        requests[call.layer] = _request_of(rows_of(call, 0, 1), batch, prompt)
        return kernel()

    with replace_attention(model, answer):
        ids = passage.ids[None, : text.prompt].to(model.get_input_embeddings().weight.device)
        logits_of(model, ids, slice(-1, None), passage.beside(text.prompt))
    merged = _merged(list(requests.values()))
    share = ALLOCATORS.get(batch.plan.allocate)().share(merged)  # [R, L, S]
    allocators = {layer: Given(share[:, place : place + 1]) for place, layer in enumerate(requests)}
    return replace(batch, allocators=allocators)


def _request_of(call: Call, batch: RunBatch, prompt: PassShape) -> AllocationRequest:
    """Return the request that an allocator would get at the end of the prompt for the layer of `call`."""
    recording = _Recording(ALLOCATORS.get(batch.plan.allocate)())
    recorded = replace(batch, allocators={call.layer: recording})
    simulation = simulation_of(_repeated(call, len(batch.budgets)), recorded, prompt)
    rows = call.rows(0, prompt.length)
    simulation.block(Block(rows[:, None], 0))
    assert recording.request is not None, "called at the end of the prompt"
    return recording.request


def _merged(layers: Sequence[AllocationRequest]) -> AllocationRequest:
    """Return the request for all layers, merged from those of single layers."""
    device = layers[0].budget.device

    def joined(parts: Sequence[Tensor], axis: int) -> Tensor:
        return torch.cat([part.to(device) for part in parts], axis)

    memory = {name: joined([one.memory[name] for one in layers], 1) for name in layers[0].memory}
    scores = [one.score for one in layers if one.score is not None]
    return replace(
        layers[0],
        layers=joined([one.layers for one in layers], 0),
        n_layers=len(layers),
        score=joined(scores, 1) if scores else None,
        memory=memory,
    )


def _repeated(call: Call, runs: int) -> Call:
    """Return a call whose single batch row is repeated for each run."""

    def repeat(tensor: Tensor) -> Tensor:
        return tensor.expand(runs, *tensor.shape[1:])

    return replace(call, query=repeat(call.query), key=repeat(call.key), value=repeat(call.value))
