"""The runs and sizes of one pass of the closed loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvscope.closed_loop.model_signals import ModelSignals
from kvscope.core.cache_scheme import CacheScheme
from kvscope.core.merge_scheme import MergeScheme
from kvscope.core.options import Prefill
from kvscope.engine.allocation import Allocator
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.rows import own_counts


@dataclass(frozen=True)
class RunBatch:
    """Runs of one plan that are computed together.

    Attributes
    ----------
    plan : EvictionPlan
        The policy, and how it is run.
    budgets : list of int
        ``B`` of each run.
    allocators : mapping of int to Allocator
        For each layer the allocator of its budget, if the allocation had to be computed beforehand (see `survey`).
    cache : CacheScheme or None
        How the caches of all of them are quantised.
    merge : MergeScheme or None
        How all of them merge what they evict.
    """

    plan: EvictionPlan
    budgets: list[int]
    allocators: Mapping[int, Allocator] = field(default_factory=dict)
    cache: CacheScheme | None = None
    merge: MergeScheme | None = None


@dataclass(frozen=True)
class PassShape:
    """Sizes of a pass: ``P``, ``T``, the sequence's number, the layers with attention, the prefill, and each ``G``.

    ``kv_heads_of`` is empty where all layers have equally many; ``shared`` are readers of earlier layers' caches,
    ``model`` what policies read of the model's parameters.
    """

    prompt: int
    length: int
    sequence: int
    layers: tuple[int, ...]
    prefill: Prefill
    kv_heads_of: tuple[int, ...] = ()
    shared: Mapping[int, int] = field(default_factory=dict)
    model: ModelSignals = field(default_factory=ModelSignals)

    def deciding(self, plan: EvictionPlan) -> tuple[int, ...]:
        """Return the layers that decide: those that own a cache; of a sparse reader, which evicts nothing, all."""
        reads = plan.policy.traits.reads
        return tuple(layer for layer in self.layers if reads or layer not in self.shared)

    def deciding_heads(self, plan: EvictionPlan) -> tuple[int, ...]:
        """Return ``G`` of each layer that decides, where these differ; otherwise nothing."""
        if not self.kv_heads_of:
            return ()
        of = dict(zip(self.layers, self.kv_heads_of, strict=True))
        return own_counts(of[layer] for layer in self.deciding(plan))
