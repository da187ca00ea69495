"""The stepper that works row by row in torch: for every policy, on every device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvscope.engine.budget_sharing import BudgetSharing
from kvscope.engine.cache_state import CacheState
from kvscope.engine.draw import Draws
from kvscope.engine.eviction import Evictor
from kvscope.engine.occupancy import Occupancy
from kvscope.engine.rows import Block, renormalise
from kvscope.engine.signal_axes import up_to
from kvscope.engine.sparse_reader import SparseReader
from kvscope.engine.stepper import StepInputs
from kvscope.engine.threads import few_threads
from kvscope.kernels import device as devices
from kvscope.policies.base import Step
from kvscope.policies.own import observe_of


class TorchStepper:
    """Lets a policy observe and score every step. The two halves of a step, `see` and `attend`, can be called singly.

    Parameters
    ----------
    inputs : StepInputs
        Plan, sizes and signals.
    state : CacheState
        Changed in place.
    sharing : BudgetSharing
        Allocates the budget.
    reader : SparseReader or None
        For a policy that reads only some of the keys it holds.

    Attributes
    ----------
    occupancy : Occupancy
        Bounds on the number of keys in the caches.
    """

    def __init__(
        self, inputs: StepInputs, state: CacheState, sharing: BudgetSharing, reader: SparseReader | None
    ) -> None:
        self._inputs, self._state, self._sharing, self._reader = inputs, state, sharing, reader
        self._policy, self._needs = inputs.plan.policy, inputs.plan.needs
        self._observe = observe_of(self._policy)
        traits = self._policy.traits  # stored here because the property computes them at every access
        self.occupancy = Occupancy(state, traits.counted and not traits.reads)
        self._clairvoyant, self._evictor = traits.clairvoyant, Evictor(state, traits.counted, self.occupancy)
        self._heads = state.score.shape[2]
        self._layers = torch.tensor(inputs.shape.layers, dtype=torch.int64, device=state.score.device)
        self._one_by_one = devices.on_cpu(state.score.device)
        self._draws = Draws(inputs.shape.sequence, self._layers, inputs.shape.length)
        self._memory: dict[str, Any] = {}  # what the policy stores between steps

    def step_block(self, block: Block) -> None:
        """Step through all queries of a block in order: each attends, then keys are scored and evicted."""
        largest = self._state.score.numel() * self._inputs.shape.heads // self._heads
        with few_threads(largest):
            for t in range(block.start, block.start + block.rows.shape[-2]):
                complete = t <= self._inputs.first_eviction
                self.step(t, block.row(t), block.normalised_row(t) if complete else None)

    def step(self, t: int, row: Tensor, normalised: Tensor | None = None) -> None:
        """Step through query `t`: it attends, then keys are scored and evicted; the arguments are those of `attend`."""
        row = row if row.ndim == 4 else row[None]
        step = self.see(t, row if self._clairvoyant or "selection" in self._needs else None)
        self.attend(step, row, normalised)

    def see(self, t: int, row: Tensor | None = None) -> Step:
        """Return the step of query `t` with its visible keys.

        `row` is its full row. Clairvoyant policies are shown it, those that need ``selection`` where it has weight.
        """
        inputs, shape, state = self._inputs, self._inputs.shape, self._state
        state.append(t)
        self.occupancy.append()
        step = Step(
            t=t,
            prompt=shape.prompt,
            length=shape.length,
            sequence=shape.sequence,
            kv_heads=shape.kv_heads if inputs.plan.scope is None else 1,  # as if all query heads were one group
            layers=self._layers,
            places=shape.places or shape.layers,
            n_layers=shape.n_layers or len(shape.layers),
            budget=state.budget,
            budgets=inputs.budgets,
            compresses=inputs.evicts_after(t),
            most_visible=self.occupancy.most,
            exceeds=self.occupancy.surplus > 0,
            one_by_one=self._one_by_one,
            visible=state.alive.narrow(-1, 0, t + 1),
            signals={name: up_to(name, signal, t) for name, signal in inputs.signals.items()},
            live=None,
            memory=self._memory,
            draw=lambda seed: self._draws.of_key(seed, self._heads, t),
            draw_row=lambda seed: self._draws.of_row(seed, shape.heads, t),
            # code in half precision sums the prompt's rows in one operation and rounds once, so it is not rounded here
            rounded=lambda score: score if t < inputs.first_eviction else self._rounded(score),
        )
        if row is not None and "selection" in self._needs:
            step.signals["selection"] = step.grouped(row, "max") > 0
        if row is not None and self._clairvoyant:
            step.signals["full_weights"] = row
        return step if self._reader is None else self._reader.read(step)

    def attend(self, step: Step, row: Tensor, normalised: Tensor | None = None) -> None:
        """Complete a step with its row: score keys, then evict.

        Parameters
        ----------
        step : Step
            Returned by `see`.
        row : Tensor
            Full-cache attention of the query, ``[L, H, t + 1]``; with a leading axis ``R`` if runs differ.
        normalised : Tensor, optional
            The live row, if nothing has been evicted yet and the caller has computed it.
        """
        row = row if row.ndim == 4 else row[None]
        if "weights" in self._needs:
            runs = len(self._inputs.budgets)
            live = self._live_row(step, row) if normalised is None else normalised.expand(runs, -1, -1, -1)
            step.live = self._rounded(live)
        if "full_weights" in self._needs:
            step.signals["full_weights"] = row
        score = self._state.score.narrow(-1, 0, step.t + 1)
        score.copy_(step.rounded(self._observe(step, score)))
        self._sharing.observe(step, self._state)
        if step.compresses and self._reader is None:
            self._evictor.evict(step.t)

    def _live_row(self, step: Step, row: Tensor) -> Tensor:
        """Return the row on the visible keys, divided by its sum, ``[R, L, H, n]``."""
        missing, total_heads, n = self._inputs.missing_mass, self._inputs.shape.heads, step.t + 1
        missing = None if missing is None else missing.narrow(-1, step.t, 1)
        runs, layers, heads, _ = self._state.alive.shape
        kept = row.view(-1, layers, heads, total_heads // heads, n) * step.visible.unsqueeze(3)
        if len(kept) < runs:
            kept = kept.expand(runs, -1, -1, -1, -1)
        return renormalise(kept.reshape(runs, layers, total_heads, n), missing)

    def _rounded(self, values: Tensor) -> Tensor:
        precision = self._inputs.plan.accumulate
        return values if precision is None else values.to(precision).to(values.dtype)
