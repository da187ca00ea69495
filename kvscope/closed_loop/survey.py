"""Budget allocation that depends on all layers, computed before the closed loop, which steps layers one by one.

With full prefill the prompt's rows are those of the full cache in every run. So one pass over the prompt gives an
allocator all that it observes, and the pass that evicts uses the resulting allocation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from kvscope.closed_loop.forward import logits_of, require_whole, rows_of, simulation_of
from kvscope.closed_loop.pass_shape import PassShape, RunBatch
from kvscope.closed_loop.passage import Passage
from kvscope.core.model_types import CausalModel
from kvscope.engine.allocation import ALLOCATORS, AllocationRequest
from kvscope.engine.rows import Block
from kvscope.engine.survey import Given, Recording, shares
from kvscope.model.attention_hook import Call, Kernel, replace_attention


def surveyed(model: CausalModel, passage: Passage, batch: RunBatch, text: PassShape) -> RunBatch:
    """Return a batch with an allocator for each layer, from one pass over the prompt of a passage."""
    ids = passage.ids.to(model.get_input_embeddings().weight.device)
    return replace(batch, allocators=surveyed_shares(model, ids, batch, text, passage.beside(text.prompt)))


def surveyed_shares(
    model: CausalModel, ids: Tensor, batch: RunBatch, text: PassShape, beside: Mapping[str, Tensor]
) -> dict[int, Given]:
    """Return the allocator of each layer, from one pass over the prompt, the start of ids ``[T]``.

    `beside` is what the model reads of the images of the prompt.
    """
    prompt = replace(text, length=text.prompt)
    requests: dict[int, AllocationRequest] = {}

    def answer(call: Call, kernel: Kernel) -> Tensor:
        require_whole(call, prompt)
        if call.layer in prompt.deciding(batch.plan):
            requests[call.layer] = _request_of(rows_of(call, 0, 1), batch, prompt)
        return kernel()

    with replace_attention(model, answer, inputs=batch.plan.reads_inputs):
        logits_of(model, ids[None, : text.prompt], slice(-1, None), beside)
    found = shares(ALLOCATORS.get(batch.plan.allocate)(), list(requests.values()))
    return {layer: Given(share) for layer, share in zip(requests, found, strict=True)}


def _request_of(call: Call, batch: RunBatch, prompt: PassShape) -> AllocationRequest:
    """Return the request that an allocator would get at the end of the prompt for the layer of `call`."""
    recording = Recording(ALLOCATORS.get(batch.plan.allocate)())
    recorded = replace(batch, allocators={call.layer: recording})
    simulation = simulation_of(_repeated(call, len(batch.budgets)), recorded, prompt)
    rows = call.rows(0, prompt.length)
    simulation.block(Block(rows[:, None], 0))
    assert recording.request is not None, "called at the end of the prompt"
    return recording.request


def _repeated(call: Call, runs: int) -> Call:
    """Return a call whose single batch row is repeated for each run."""

    def repeat(tensor: Tensor) -> Tensor:
        return tensor.expand(runs, *tensor.shape[1:])

    return replace(call, query=repeat(call.query), key=repeat(call.key), value=repeat(call.value))
