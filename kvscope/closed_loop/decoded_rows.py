"""Rows of attention and signals as a decoder computes them, from the vectors of a call and those in the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from kvscope.closed_loop.model_signals import ModelSignals
from kvscope.core.errors import ModelError
from kvscope.core.model_types import CausalModel
from kvscope.engine.plan import FILTER
from kvscope.engine.signal_axes import VECTORS
from kvscope.gates.filters import load_filters
from kvscope.model.attention_hook import Call
from kvscope.model.short_cache import ShortLayer


def weights(call: Call, queries: Tensor, keys: Tensor, hidden: Tensor, heads: int) -> Tensor:
    """Return the weights of queries on keys, for the query heads of each key/value head.

    Computed in float32 or better, with scaling, soft cap and learned sink.

    Parameters
    ----------
    call : Call
        The call of the layer.
    queries : Tensor
        ``[G, Q, b, D]``, or ``[R, G, Q, D]`` for one query of each entry of a batch.
    keys : Tensor
        ``[G, 1, n, D]`` or ``[R, G, n, D]``.
    hidden : Tensor
        bool, which keys get no weight.
    heads : int
        Axis of the ``G`` key/value heads in `queries`: 0 or 1.
    """
    logits = queries.to(call.exact) @ keys.to(call.exact).transpose(-1, -2) * call.scaling
    if call.softcap is not None:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    logits = logits.masked_fill(hidden, -torch.inf)
    if call.sinks is None:
        return torch.softmax(logits, -1)
    after = logits.ndim - heads - 2  # axes after those of the heads
    sink = call.sinks.to(logits.dtype).view(logits.shape[heads], -1, *[1] * after)  # [G, Q, 1] or [G, Q, 1, 1]
    return torch.softmax(torch.cat([logits, sink.expand(*logits.shape[:-1], 1)], -1), -1)[..., :-1]


def beyond(start: int, stop: int, call: Call, device: torch.device) -> Tensor:
    """Return which of the first `stop` keys the queries `start` to `stop` - 1 of a prompt do not see, bool."""
    query, key = torch.arange(start, stop, device=device)[:, None], torch.arange(stop, device=device)
    hidden = key > query
    if call.chunk is not None:
        hidden = hidden | (key < query // call.chunk * call.chunk)
    return hidden if call.sliding_window is None else hidden | (key <= query - call.sliding_window)


def signal(name: str, queries: Tensor, keys: Tensor, values: Tensor, given: ModelSignals, layer: int) -> Tensor:
    """Return a signal of new tokens of a layer, without a layer axis; `given` has what depends on the model.

    Queries are ``[R, H, q, D]``, keys and values ``[R, G, q, D]``.
    """
    if name == "mean_query":
        return queries.mean(1)
    if name in VECTORS:
        return {"queries": queries, "keys": keys, "values": values}[name]
    if name.startswith(FILTER):
        return load_filters(name.removeprefix(FILTER)).projections(layer, keys).to(keys.dtype)
    if name == "value_out_l1":
        return given.value_out_l1(layer, values)
    vectors, order = {"value_l1": (values, 1), "value_l2": (values, 2), "key_l2": (keys, 2)}[name]
    norm: Tensor = vectors.norm(p=order, dim=-1)
    return norm


def at_cache_position(layer: ShortLayer, query: Tensor, position: Tensor) -> Tensor:
    """Return the newest queries, ``[R, G, Q, D]``, rotated to `position` of each head, ``[R, G]``."""
    assert layer.rotary is not None
    original = torch.full((1,), layer.seen - 1, device=query.device)
    plain = layer.rotary.off(query.flatten(0, 2)[None, :, None], original)  # [1, R * H, 1, D]
    of_heads = plain.view_as(query).flatten(0, 1).transpose(0, 1)[None]  # [1, Q, R * G, D]
    return layer.rotary.on(of_heads, position.flatten())[0].transpose(0, 1).reshape(query.shape)


def exact_dtype(model: CausalModel) -> torch.dtype:
    """Return the precision of rows and scores: float32, or that of the model if it is higher."""
    return torch.promote_types(model.dtype, torch.float32)


def attends_elsewhere(model: CausalModel, call: Call) -> ModelError:
    """Return the error for a layer that attends to something else than its cache."""
    return ModelError(
        f"layer {call.layer} of {type(model).__name__} does not attend to the keys and values it caches",
        "Replay its trace in the open loop: kvscope replay without --perplexity.",
    )
