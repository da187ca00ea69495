"""Rows of attention and signals as a decoder computes them, from the vectors of a call and those in the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from kvscope.engine.signal_axes import VECTORS
from kvscope.model.attention_hook import Call


def weights(call: Call, queries: Tensor, keys: Tensor, hidden: Tensor) -> Tensor:
    """Return the weights of queries on keys, for the query heads of each key/value head.

    Computed in float32 or better, with scaling, soft cap and learned sink.

    Parameters
    ----------
    call : Call
        The call of the layer.
    queries : Tensor
        ``[G, Q, ., D]``, or ``[G, Q, D]`` for one query.
    keys : Tensor
        ``[G, 1, n, D]`` or ``[G, n, D]``.
    hidden : Tensor
        bool, which keys get no weight.
    """
    logits = queries.to(call.exact) @ keys.to(call.exact).transpose(-1, -2) * call.scaling
    if call.softcap is not None:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    logits = logits.masked_fill(hidden, -torch.inf)
    if call.sinks is None:
        return torch.softmax(logits, -1)
    sink = call.sinks.to(logits.dtype).view(len(logits), -1, *[1] * (logits.ndim - 2))  # [G, Q, 1] or [G, Q, 1, 1]
    return torch.softmax(torch.cat([logits, sink.expand(*logits.shape[:-1], 1)], -1), -1)[..., :-1]


def beyond(start: int, stop: int, call: Call, device: torch.device) -> Tensor:
    """Return which of the first `stop` keys the queries `start` to `stop` - 1 of a prompt do not see, bool."""
    query, key = torch.arange(start, stop, device=device)[:, None], torch.arange(stop, device=device)
    hidden = key > query
    if call.chunk is not None:
        hidden = hidden | (key < query // call.chunk * call.chunk)
    return hidden if call.sliding_window is None else hidden | (key <= query - call.sliding_window)


def signal(name: str, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Return a signal of new tokens from queries ``[H, q, D]``, keys and values ``[G, q, D]``, without a layer axis."""
    if name == "mean_query":
        return queries.mean(0)
    if name in VECTORS:
        return {"queries": queries, "keys": keys, "values": values}[name]
    vectors, order = {"value_l1": (values, 1), "value_l2": (values, 2), "key_l2": (keys, 2)}[name]
    norm: Tensor = vectors.norm(p=order, dim=-1)
    return norm
