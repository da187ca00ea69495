"""How many layers are replayed together, and what that takes of memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvscope.engine.plan import EvictionPlan
from kvscope.engine.signals import ROWS
from kvscope.trace.reader import TokenSequence, Trace

GROUP_BYTES = 2**30  # that a group of layers may take; one layer may take more
BLOCK_STEPS = 64
BLOCK_BYTES = 256 * 2**20  # of one tensor of rows for all budgets of a policy
OF_KEY = 9  # bytes of a key that a run keeps: whether it is alive, its score, when it left
OF_ROWS = 28  # bytes of a weight in a block: the row, what it is divided into, and what earlier rows say of its key
OF_MASKS = 6  # bytes of a weight in a block and a run: visible, held, and the heaviest keys


@dataclass(frozen=True)
class Footprint:
    """What a replay has in memory at once.

    Attributes
    ----------
    layers : int
        Layers that are stepped together.
    steps : int
        Steps of a block of rows.
    bytes : int
        About how many, beside the program itself.
    """

    layers: int
    steps: int
    bytes: int


def footprint(trace: Trace, sequence: TokenSequence, plans: Sequence[EvictionPlan], metrics: int) -> Footprint:
    """Return the footprint of runs over one sequence.

    Parameters
    ----------
    trace : Trace
        What is replayed.
    sequence : Sequence
        Of the trace.
    plans : sequence of EvictionPlan
        The plan of each run, so one for every policy and budget.
    metrics : int
        Number of metrics.
    """
    length, heads = sequence.length, trace.heads
    most = max(plans.count(plan) for plan in dict.fromkeys(plans))
    across = any(plan.looks_across for plan in plans)
    kept = len(plans) * length * (trace.kv_heads * OF_KEY + heads * 4 * metrics)
    vectors = {name for plan in plans for name in plan.needs - ROWS}
    kept += len(vectors) * heads * length * trace.header.head_dim * 4

    def steps(layers: int) -> int:
        return max(1, min(BLOCK_STEPS, BLOCK_BYTES // (most * layers * heads * length * 4)))

    def whole(layers: int) -> int:
        return layers * (kept + steps(layers) * heads * length * (OF_ROWS + most * OF_MASKS))

    layers = len(trace.layers)
    while not across and layers > 1 and (whole(layers) > GROUP_BYTES or steps(layers) < BLOCK_STEPS):
        layers -= 1
    return Footprint(layers, steps(layers), whole(layers))
