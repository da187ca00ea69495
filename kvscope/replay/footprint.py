"""The number of layers that are replayed together, and the memory that this takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvscope.engine.plan import EvictionPlan
from kvscope.engine.signals import ROWS
from kvscope.trace.reader import TokenSequence, Trace
from kvscope.trace.shared_caches import caches_of

GROUP_BYTES = 2**30  # limit for a group of several layers
BLOCK_STEPS = 64
BLOCK_BYTES = 256 * 2**20  # limit for one tensor of rows for all budgets of a policy
KEY_BYTES = 9  # per key in the state of a run: whether it is in the cache, its score, its eviction step
ROW_BYTES = 28  # per weight in a block: the full row, the live row, and signals derived from earlier rows
MASK_BYTES = 6  # per weight in a block and run: masks of visible, held and heaviest keys


@dataclass(frozen=True)
class Footprint:
    """The working set of a replay.

    Attributes
    ----------
    layers : int
        Number of layers that are stepped together.
    steps : int
        Number of steps in a block of rows.
    bytes : int
        Estimated memory, without the program itself.
    """

    layers: int
    steps: int
    bytes: int


def footprint(trace: Trace, sequence: TokenSequence, plans: Sequence[EvictionPlan], metrics: int) -> Footprint:
    """Return the footprint of runs over one sequence.

    Parameters
    ----------
    trace : Trace
        Recorded attention.
    sequence : TokenSequence
        A sequence of the trace.
    plans : sequence of EvictionPlan
        The plan of each run, so a plan is repeated for each of its budgets.
    metrics : int
        Number of metrics.
    """
    length, heads = sequence.length, trace.heads
    most_budgets = max((plans.count(plan) for plan in dict.fromkeys(plans)), default=1)
    together = any(plan.looks_across for plan in plans)
    vectors = {name for plan in plans for name in plan.needs - ROWS}
    state_bytes = len(plans) * length * (trace.kv_heads * KEY_BYTES + heads * 4 * metrics)
    signal_bytes = len(vectors) * heads * length * trace.header.head_dim * 4

    def block_steps(layers: int) -> int:
        return max(1, min(BLOCK_STEPS, BLOCK_BYTES // (most_budgets * layers * heads * length * 4)))

    def group_bytes(layers: int) -> int:
        block_bytes = block_steps(layers) * heads * length * (ROW_BYTES + most_budgets * MASK_BYTES)
        return layers * (state_bytes + signal_bytes + block_bytes)

    layers = len(trace.layers)
    least = max(map(len, caches_of(trace.header).values()))  # those that read one cache are stepped together
    while not together and layers > least and (group_bytes(layers) > GROUP_BYTES or block_steps(layers) < BLOCK_STEPS):
        layers -= 1
    return Footprint(layers, block_steps(layers), group_bytes(layers))
