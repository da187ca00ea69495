"""Budgets that are allocated by comparing layers, where layers differ in their heads and are not stepped together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvscope.core.options import Prefill
from kvscope.engine.allocation import ALLOCATORS, AllocationRequest, Allocator
from kvscope.engine.layers import RecordedLayers, cache_groups, owners_first
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.rows import Block
from kvscope.engine.signals import ROWS
from kvscope.engine.simulation import CacheSimulation
from kvscope.engine.survey import Given, Recording, shares
from kvscope.trace.reader import TokenSequence, Trace

BLOCK_BYTES = 256 * 2**20  # limit for the rows of the prompt that are read at a time

Key = tuple[EvictionPlan, tuple[int, ...], int]  # plan, budgets, sequence


@dataclass
class Survey:
    """Lets an allocator observe the prompt in all layers before any group of layers is stepped.

    Attributes
    ----------
    trace : Trace
        Recorded attention.
    prefill : Prefill
        What happens during the prompt.
    device : torch.device
        The device to compute on.
    """

    trace: Trace
    prefill: Prefill
    device: torch.device
    _found: dict[Key, dict[int, Tensor]] = field(
        default_factory=dict, init=False
    )  # of the last plan and sequence: by layer

    def allocator(
        self, plan: EvictionPlan, keys: Sequence[int], sequence: TokenSequence, layers: Sequence[int]
    ) -> Allocator | None:
        """Return the allocator of some layers; None where the plan's own decides from what it observes in these."""
        groups = cache_groups(self.trace)
        if not plan.looks_across or len(groups) == 1:
            return None
        key = (plan, tuple(keys), sequence.index)
        if key not in self._found:
            self._found = {known: of for known, of in self._found.items() if known[2] == sequence.index}
            self._found[key] = self._shares(plan, keys, sequence, groups)
        return Given(torch.cat([self._found[key][layer] for layer in layers], 1))

    def _shares(
        self,
        plan: EvictionPlan,
        keys: Sequence[int],
        sequence: TokenSequence,
        groups: Sequence[Sequence[Sequence[int]]],
    ) -> dict[int, Tensor]:
        """Return the keys of each layer and head, int64 ``[R, 1, S]`` by layer."""
        own, reads = ALLOCATORS.get(plan.allocate), plan.policy.traits.reads
        deciding = [
            owners_first(self.trace, caches if reads else [[readers[0]] for readers in caches]) for caches in groups
        ]
        requests = [self._request(plan, keys, sequence, layers, own()) for layers in deciding]
        found = zip(deciding, shares(own(), requests), strict=True)
        return {layer: share[:, place : place + 1] for of, share in found for place, layer in enumerate(of)}

    def _request(
        self,
        plan: EvictionPlan,
        keys: Sequence[int],
        sequence: TokenSequence,
        layers: Sequence[int],
        allocator: Allocator,
    ) -> AllocationRequest:
        """Return what is known of some layers at the end of the prompt."""
        source, recording = RecordedLayers(self.trace, sequence, layers, self.device), Recording(allocator)
        signals = {name: source.signal(name) for name in sorted(plan.needs - ROWS)}
        simulation = CacheSimulation(
            plan,
            keys,
            source.shape if plan.policy.traits.reads else source.caches,
            self.prefill,
            signals,
            missing_mass=source.missing,
            allocator=recording,
            device=self.device,
        )
        steps = max(1, BLOCK_BYTES // (4 * len(layers) * source.shape.heads * sequence.length))
        for start in range(0, sequence.prompt, steps):
            stop = min(start + steps, sequence.prompt)
            rows = source.rows(start, stop)
            missing = None if source.missing is None else source.missing[..., start:stop]
            simulation.block(Block(rows, start, missing))
        assert recording.request is not None, "called at the end of the prompt"
        return recording.request
