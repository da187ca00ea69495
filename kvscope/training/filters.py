"""Q-filters of a model, computed from the queries of its traces."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvscope.core.errors import TraceError
from kvscope.core.version import __version__
from kvscope.gates.filters import FilterFacts, KeyFilters
from kvscope.trace.reader import Trace
from kvscope.trace.signals import missing_signal


@torch.no_grad()
def filters_of(traces: Sequence[Trace]) -> KeyFilters:
    """Return the filters of the model of some traces, from the queries of all their tokens.

    Raises
    ------
    TraceError
        If a trace holds no queries, or not those of all heads and layers; if layers differ in their heads; if traces
        are of different models.
    """
    for trace in traces:
        _require(trace, traces[0])
    header = traces[0].header
    directions = torch.stack([_directions(traces, layer) for layer in header.layers])
    count = sum(sequence.length for trace in traces for sequence in trace.sequences)
    about = {"traces": [trace.identity for trace in traces], "queries": count, "kvscope": __version__}
    weights = next((list(trace.header.model.weights) for trace in traces if trace.header.model.weights), [])
    facts = FilterFacts(header.model.id or "", header.n_layers, header.kv_heads, header.head_dim, weights, about)
    return KeyFilters(facts, directions)


def _directions(traces: Sequence[Trace], layer: int) -> Tensor:
    """Return the filters of one layer, float64 ``[G, D]``.

    The first right singular vector of queries ``[n, D]`` is the first eigenvector of the ``[D, D]`` sums of products.
    """
    own = traces[0].heads_of(layer)
    parts = [
        torch.from_numpy(trace.vectors(sequence.index, layer, "queries")).double()
        for trace in traces
        for sequence in trace.sequences
    ]
    products = sum(part.mT @ part for part in parts)  # [H, D, D]
    assert isinstance(products, Tensor)
    first = torch.linalg.eigh(products).eigenvectors[..., -1]  # [H, D]
    ahead = sum(((part @ first[..., None])[..., 0] > 0).sum(-1) for part in parts)
    count = sum(part.shape[1] for part in parts)
    signed = torch.where(2 * torch.as_tensor(ahead) > count, 1.0, -1.0)[:, None] * first
    mean: Tensor = signed.view(own.kv_heads, -1, signed.shape[-1]).mean(1)
    return mean


def _require(trace: Trace, first: Trace) -> None:
    header = trace.header
    if "vectors:queries" not in trace.stored:
        raise missing_signal(trace.path, header, "vectors:queries")
    if header.layer_heads or header.head_numbers or len(header.layers) != header.n_layers:
        raise TraceError(
            f"{trace.path} does not hold the same heads of every layer of its model, which filters need",
            "Record all layers and heads, of a model whose layers have equally many heads.",
        )
    sizes, others = ((each.n_layers, each.kv_heads, each.head_dim) for each in (header, first.header))
    if sizes != others or header.model.id != first.header.model.id:
        raise TraceError(
            f"{trace.path} is a trace of {header.model.id}, and {first.path} of {first.header.model.id}",
            "Name traces of one model.",
        )
