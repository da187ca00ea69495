"""Signals that a trace gives to policies, beside its rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from kvscope.errors import TraceError, UsageError
from kvscope.replay.plan import Plan
from kvscope.trace.derive import Floats
from kvscope.trace.reader import HOW, Trace

ROWS = frozenset({"weights", "full_weights"})  # every trace gives them
# name -> (what the trace calls it, how to read one layer)
_READ: dict[str, tuple[str, Callable[[Trace, int, int], Floats]]] = {
    "value_l1": ("value_l1", lambda trace, sequence, layer: trace.value_norms(sequence, layer, "l1")),
    "value_l2": ("value_l2", lambda trace, sequence, layer: trace.value_norms(sequence, layer, "l2")),
    "key_l2": ("key_l2", lambda trace, sequence, layer: trace.key_norms(sequence, layer)),
    "mean_query": ("queries", lambda trace, sequence, layer: trace.mean_queries(sequence, layer)),
    "queries": ("vectors:queries", lambda trace, sequence, layer: trace.vectors(sequence, layer, "queries")),
    "keys": ("vectors:keys", lambda trace, sequence, layer: trace.vectors(sequence, layer, "keys")),
    "values": ("vectors:values", lambda trace, sequence, layer: trace.vectors(sequence, layer, "values")),
}


def require(trace: Trace, plan: Plan) -> None:
    """Raise where the plan needs what the trace does not hold.

    Raises
    ------
    UsageError
        For a signal that no trace holds.
    TraceError
        If this one does not; the message names the flag that records it.
    """
    for name in sorted(plan.needs - ROWS):
        if name not in _READ:
            raise UsageError(
                f"{plan.policy.label} needs a signal called {name!r}, which no trace holds",
                f"Signals: {', '.join((*sorted(ROWS), *_READ))}.",
            )
        stored, _ = _READ[name]
        if stored not in trace.stored:
            raise TraceError(f"{plan.policy.label} needs {name}, which {trace.path} does not hold", HOW[stored])


def load(trace: Trace, name: str, sequence: int, layers: list[int]) -> Tensor:
    """Return a signal: norms ``[L, G, T]``, vectors ``[L, heads, T, D]``; ``mean_query`` ``[L, T, D]``."""
    _, read = _READ[name]
    return torch.from_numpy(np.stack([read(trace, sequence, layer) for layer in layers]))
