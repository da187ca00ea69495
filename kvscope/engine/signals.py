"""The signals that policies and metrics read from a trace, in addition to its attention rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvscope.core.errors import TraceError, UsageError
from kvscope.engine.allocation import ALLOCATORS
from kvscope.engine.plan import FILTER, GATE, SCORER, EvictionPlan
from kvscope.gates.filters import load_filters
from kvscope.gates.module import load_gate
from kvscope.gates.scorers import load_scorers
from kvscope.metrics import METRICS, Metric
from kvscope.metrics.base import RECORDED
from kvscope.trace.derive import Floats
from kvscope.trace.layer_records import RotaryRecord
from kvscope.trace.reader import Trace
from kvscope.trace.shared_caches import caches_of
from kvscope.trace.signals import remedy
from kvscope.trace.token_kinds import token_kinds

ROWS = frozenset({"weights", "full_weights", "schedule", "selection"})  # computed from the rows, which every trace has


def rotary_signal(record: RotaryRecord) -> Floats:
    """Return a rotary embedding as a signal, ``[4, D]``: frequencies, partners, signs of the sine, factors."""
    partners, places = np.array(record.partners), np.arange(len(record.partners))
    signs, factors = np.sign(places - partners), np.where(partners == places, 1, record.scale)
    return np.stack([np.array(record.frequencies), partners, signs, factors])


# name -> (name in the trace, function that reads one layer)
_READ: dict[str, tuple[str, Callable[[Trace, int, int], Floats]]] = {
    "value_l1": ("value_l1", lambda trace, sequence, layer: trace.value_norms(sequence, layer, "l1")),
    "value_l2": ("value_l2", lambda trace, sequence, layer: trace.value_norms(sequence, layer, "l2")),
    "reconstruction": (
        "reconstruction",
        lambda trace, sequence, layer: trace.key_numbers("reconstruction", sequence, layer),
    ),
    "value_out_l1": ("value_out_l1", lambda trace, sequence, layer: trace.key_numbers("value_out_l1", sequence, layer)),
    "key_l2": ("key_l2", lambda trace, sequence, layer: trace.key_norms(sequence, layer)),
    "mean_query": ("queries", lambda trace, sequence, layer: trace.mean_queries(sequence, layer)),
    "queries": ("vectors:queries", lambda trace, sequence, layer: trace.vectors(sequence, layer, "queries")),
    "keys": ("vectors:keys", lambda trace, sequence, layer: trace.vectors(sequence, layer, "keys")),
    "token_kinds": ("token_kinds", lambda trace, sequence, layer: _kinds(trace, sequence, layer)),
    "rotary": ("rotary", lambda trace, _, layer: rotary_signal(trace.header.rotary_of(layer))),
    "values": ("vectors:values", lambda trace, sequence, layer: trace.vectors(sequence, layer, "values")),
}


def require(trace: Trace, plan: EvictionPlan) -> None:
    """Raise an error if the plan needs something that the trace does not have.

    Raises
    ------
    UsageError
        For a signal that no trace has, or a gate that was trained for another model.
    TraceError
        If the trace lacks a signal (the message names the flag that records it); if it lacks rows, or heads of a layer
        and the plan decides from all heads together.
    """
    _require_recorded(trace, plan)
    if "selection" in plan.needs and not trace.header.indexed:
        raise TraceError(
            f"{plan.policy.label} needs a model that selects the keys it reads, but the model of {trace.path} has no "
            f"index",
            "Use another policy; deepseek_v32 and glm_moe_dsa are models with an index.",
        )
    for name in plan.gates:
        sizes = _sizes_for(trace, plan, "a gate")  # first: what the trace lacks needs no file
        load_gate(name).require(name, **sizes)
    for name in plan.scorers:
        sizes = _sizes_for(trace, plan, "scorers")
        load_scorers(name).require(name, **sizes)
    for name in plan.filters:
        _require_filters(trace, plan, name)
    for name in sorted(plan.needs - ROWS):
        if name.startswith((GATE, FILTER, SCORER)):
            continue
        if name not in _READ:
            raise UsageError(
                f"{plan.policy.label} needs a signal called {name!r}, which no trace has",
                f"Use one of the known signals: {', '.join((*sorted(ROWS), *_READ))}.",
            )
        stored, _ = _READ[name]
        if stored not in trace.stored:
            raise TraceError(
                f"{plan.policy.label} needs {name}, which {trace.path} does not hold", remedy(trace.header, stored)
            )


def measurable(trace: Trace, names: Sequence[str] | None = None) -> tuple[list[Metric], dict[str, str]]:
    """Return the metrics that can be computed on a trace, and for each skipped metric the reason.

    Parameters
    ----------
    trace : Trace
        Recorded attention.
    names : sequence of str, optional
        Names of metrics. By default all metrics are selected, and those that need a missing signal are skipped.

    Raises
    ------
    UsageError
        For an unknown name.
    TraceError
        If the trace lacks a signal that a named metric needs.
    """
    chosen, skipped = [], {}
    for metric in [METRICS.get(name) for name in dict.fromkeys(names or METRICS.names())]:
        lacking = [name for name in sorted(metric.needs & RECORDED) if _READ[name][0] not in trace.stored]
        if not lacking:
            chosen.append(metric)
            continue
        todo = remedy(trace.header, _READ[lacking[0]][0])
        if names:
            raise TraceError(f"{metric.name} needs {lacking[0]}, which {trace.path} does not hold", todo)
        skipped[metric.name] = f"it needs {lacking[0]}, which the trace does not hold. {todo}"
    return chosen, skipped


def load_signal(trace: Trace, name: str, sequence: int, layers: list[int]) -> Tensor:
    """Return a signal of some layers.

    Norms and gates are ``[L, G, T]``, vectors ``[L, heads, T, D]``, ``mean_query`` ``[L, T, D]``, ``rotary``
    ``[L, 4, D]``.
    """
    if name.startswith(GATE):
        return _margins(trace, name.removeprefix(GATE), sequence, layers)
    if name.startswith(FILTER):
        return _projections(trace, name.removeprefix(FILTER), sequence, layers)
    if name.startswith(SCORER):
        return _scores(trace, name.removeprefix(SCORER), sequence, layers)
    _, read = _READ[name]
    return torch.from_numpy(np.stack([read(trace, sequence, layer) for layer in layers]))


def _kinds(trace: Trace, sequence: int, layer: int) -> Floats:
    """Return the classes of tokens, which are those of every head, ``[G, T]``."""
    kinds = token_kinds(trace, sequence)
    return np.broadcast_to(kinds, (trace.heads_of(layer).kv_heads, len(kinds)))


def _require_recorded(trace: Trace, plan: EvictionPlan) -> None:
    """Raise TraceError if some rows were not recorded, or some heads and the plan decides from all heads together."""
    header = trace.header
    if header.query_stride > 1:
        raise TraceError(
            f"{trace.path} holds every {header.query_stride}th row of attention, but policies need every row",
            "Record it again without --query-stride to replay it.",
        )
    absent = caches_of(header).keys() - set(header.layers)
    if absent:
        every = ",".join(map(str, sorted({*header.layers, *absent})))
        raise TraceError(
            f"{trace.path} lacks layers {', '.join(map(str, sorted(absent)))}, whose caches other layers read",
            f"Record it again with --layers {every}",
        )
    across = plan.looks_across or ALLOCATORS.get(plan.allocate).spans == "heads"
    if header.head_numbers and (across or (plan.decides == "layer" and plan.needs & ROWS)):
        raise TraceError(
            f"{plan.label} decides from all heads of a layer, and {trace.path} holds {trace.heads} of {header.n_heads}",
            "Record it again without --heads, or replay policies that decide per key/value head.",
        )


def _sizes_for(trace: Trace, plan: EvictionPlan, what: str) -> dict[str, Any]:
    """Return the sizes and weights of the model of a trace with which a gate, or scorers, must agree."""
    if "hidden" not in trace.stored:
        raise TraceError(
            f"{plan.policy.label} needs layer inputs, which {trace.path} does not hold", remedy(trace.header, "hidden")
        )
    header = trace.header
    if len({header.heads_of(layer).kv_heads for layer in trace.layers}) > 1:
        raise TraceError(
            f"{plan.policy.label} uses {what} for equally many heads in every layer, and the layers of {trace.path} "
            "differ in their heads",
            f"Replay policies without {what}.",
        )
    return {
        "layers": header.n_layers,
        "hidden": trace.hidden(0, trace.layers[0]).shape[-1],
        "kv_heads": header.kv_heads,
        "weights": header.model.weights or (),
    }


def _require_filters(trace: Trace, plan: EvictionPlan, name: str) -> None:
    header = trace.header
    if "vectors:keys" not in trace.stored:
        raise TraceError(
            f"{plan.policy.label} needs keys, which {trace.path} does not hold", remedy(header, "vectors:keys")
        )
    if header.layer_heads or header.head_numbers:
        raise TraceError(
            f"{plan.policy.label} uses filters, which are for the same heads of every layer, and {trace.path} has not",
            "Record all heads of a model whose layers have equally many, or replay policies without filters.",
        )
    sizes = {"layers": header.n_layers, "kv_heads": header.kv_heads, "size": header.head_dim}
    load_filters(name).require(name, **sizes, weights=header.model.weights or ())


def _projections(trace: Trace, name: str, sequence: int, layers: list[int]) -> Tensor:
    """Return the products of keys and filters, ``[L, G, T]``, in float64 and rounded at the end, as gates."""
    filters = load_filters(name)
    keys = ((layer, torch.from_numpy(trace.vectors(sequence, layer, "keys"))) for layer in layers)
    return torch.stack([filters.projections(layer, own).float() for layer, own in keys])


@torch.no_grad()
def _margins(trace: Trace, name: str, sequence: int, layers: list[int]) -> Tensor:
    """Return by how much gates exceed their thresholds, ``[L, G, T]``, computed from recorded layer inputs.

    Computed in float64 and rounded at the end, so that the order of summation does not change a gate's decision.
    """
    gate, prompt = load_gate(name), trace.sequences[sequence].prompt
    inputs = ((layer, torch.from_numpy(trace.hidden(sequence, layer))[None].double()) for layer in layers)
    return torch.cat([gate.margins(layer, hidden, prompt).float() for layer, hidden in inputs])


@torch.no_grad()
def _scores(trace: Trace, name: str, sequence: int, layers: list[int]) -> Tensor:
    """Return the scores of scorers, ``[L, G, T]``, from recorded layer inputs, in float64 and rounded at the end."""
    scorers = load_scorers(name)
    inputs = ((layer, torch.from_numpy(trace.hidden(sequence, layer)).double()) for layer in layers)
    return torch.stack([scorers.scores(layer, hidden).float() for layer, hidden in inputs])
