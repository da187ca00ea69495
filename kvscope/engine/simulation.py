"""The caches that one policy would keep, simulated over attention rows.

Tensors carry ``R`` runs (budgets), ``L`` layers, ``S`` deciding heads (``G`` key/value heads, or 1 where the layer
decides as one) and key positions. The same simulation serves recorded rows (open loop) and rows that are computed as it
goes (closed loop).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kvscope.core.errors import ReplayError
from kvscope.core.options import Prefill
from kvscope.core.residency import ResidencyIntervals
from kvscope.engine.allocation import ALLOCATORS, AllocationRequest, Allocator
from kvscope.engine.budget_sharing import BudgetSharing
from kvscope.engine.cache_state import CacheState
from kvscope.engine.numba_stepper import NumbaStepper
from kvscope.engine.plan import EvictionPlan, protection
from kvscope.engine.rows import Block, Shape
from kvscope.engine.signal_axes import with_run_axis
from kvscope.engine.sparse_reader import SparseReader
from kvscope.engine.stepper import StepInputs, Stepper
from kvscope.engine.torch_stepper import TorchStepper
from kvscope.kernels import available, triton_available
from kvscope.policies.base import Policy, Step, recurrence_of


class CacheSimulation:
    """The caches of one policy under several budgets, over a group of layers of one sequence.

    Parameters
    ----------
    policy : Policy or EvictionPlan
        What scores the keys; a plan says when it evicts and how its budget is shared out, a bare policy goes as
        published.
    budgets : sequence of int
        ``B`` of each run, in keys per key/value head.
    shape : Shape
        Sizes.
    prefill : {"full", "stream"}
        Whether the prompt's rows see everything and the choice is made once at its end, or eviction starts when the
        cache first exceeds the budget.
    signals : mapping of str to Tensor
        What the policy needs beside the weights: norms ``[L, G, T]``, ``keys`` and ``values`` ``[L, G, T, D]``,
        ``queries`` ``[L, H, T, D]``, ``mean_query`` ``[L, T, D]``; with a leading axis ``R`` where runs differ.
    missing_mass : Tensor or None
        ``[L, H, T]``: what a learned sink takes from each row; the live row is divided by kept mass plus this.
    allocator : Allocator or None
        What shares out the budget; by default that of the plan.
    device : torch.device or str
        Where the state is.
    dtype : torch.dtype
        Of scores.

    Attributes
    ----------
    state : CacheState
        Which keys are held, their scores, when keys were evicted, and what each head may hold.
    inputs : StepInputs
        The arguments, completed.
    stepper : Stepper
        What steps blocks of rows: a kernel where there is one for the policy, torch otherwise.

    Notes
    -----
    Nothing is checked here: `kvscope.engine.feasible` has said that plan, budgets and prefill go together.
    """

    def __init__(
        self,
        policy: Policy | EvictionPlan,
        budgets: Sequence[int],
        shape: Shape,
        prefill: Prefill = Prefill.full,
        signals: Mapping[str, Tensor] | None = None,
        *,
        missing_mass: Tensor | None = None,
        allocator: Allocator | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        plan = policy if isinstance(policy, EvictionPlan) else EvictionPlan.published(policy)
        given = {name: with_run_axis(name, value) for name, value in (signals or {}).items()}
        self.inputs = StepInputs(plan, list(budgets), shape, prefill, given, missing_mass)
        protected = torch.tensor([protection(plan.policy, budget, shape.prompt) for budget in budgets], device=device)
        sharing = _sharing(self.inputs, protected, allocator)
        self.state = CacheState.empty(shape, sharing.at_start(), protected, device, dtype)
        self._reader = SparseReader(plan.policy, self.state, self.inputs.first_eviction) if self._reads else None
        self._torch = TorchStepper(self.inputs, self.state, sharing, self._reader)
        self.stepper = choose_stepper(self._torch, self.inputs, self.state, sharing)

    @property
    def plan(self) -> EvictionPlan:
        """The policy, and how it is run."""
        return self.inputs.plan

    @property
    def shape(self) -> Shape:
        """Sizes."""
        return self.inputs.shape

    @property
    def budgets(self) -> list[int]:
        """``B`` of each run."""
        return self.inputs.budgets

    def block(self, block: Block) -> None:
        """Let all queries of a block attend, be scored and evict, in order of their position."""
        self.stepper.step_block(block)

    def step(self, t: int, row: Tensor) -> None:
        """Let query `t`, whose full row is ``[L, H, t + 1]``, attend, be scored and evict; steps come in order."""
        self._torch.step(t, row)

    def see(self, t: int) -> Step:
        """Return what query `t` sees: the first half of a step, before its row is known."""
        return self._torch.see(t)

    def attend(self, step: Step, row: Tensor) -> None:
        """Score and evict, now that the row is known: the second half of a step.

        Parameters
        ----------
        step : Step
            From `see`.
        row : Tensor
            Full-cache attention of the query, ``[L, H, t + 1]``; a leading ``R`` axis if it differs between runs.
        """
        self._torch.attend(step, row)

    def visible(self, start: int, stop: int) -> Tensor:
        """Return ``V_t`` for steps `start` to `stop` - 1, bool ``[R, L, G, stop - start, stop]``.

        Only steps that have been made can be asked for, and of a sparse reader only those not `release`d.
        """
        source = self.state.visible if self._reader is None else self._reader.log.masks
        return self._per_kv_head(source(start, stop))

    def held(self, start: int, stop: int) -> Tensor:
        """Return ``R_t`` for steps `start` to `stop` - 1, bool ``[R, L, G, stop - start, stop]``."""
        return self._per_kv_head(self.state.held(start, stop))

    def release(self, stop: int) -> None:
        """Forget what is needed only to tell what steps before `stop` saw."""
        if self._reader is not None:
            self._reader.log.forget_before(stop)

    def residency(self, run: int, layer: int) -> ResidencyIntervals:
        """Return when keys were held in one run and one layer of the group; of a sparse reader, when they were read."""
        if self._reader is not None:
            return self._reader.log.residency(run, layer, self.shape.kv_heads)
        leave = self.state.leave[run, layer].expand(self.shape.kv_heads, -1)
        return ResidencyIntervals.from_eviction_steps(leave.cpu().numpy())

    def check(self) -> None:
        """Raise ReplayError if what was done is not a result: nothing evicted, too much held, or a score of NaN."""
        state, length, label, traits = self.state, self.shape.length, self.plan.policy.label, self.plan.policy.traits
        if bool(state.nan_scores):
            raise ReplayError(
                f"{label} gave scores that are not numbers",
                "Check the policy, and the trace: kvscope info TRACE --verify",
            )
        if not traits.bounded or traits.phase == "none":
            return
        reach = torch.tensor(self.shape.reach(), device=state.leave.device)
        in_cache = torch.minimum(reach, state.length_at_eviction)  # [L]: without eviction
        for run, budget in enumerate(self.budgets):
            evicted = state.evictions[run] > 0  # [L, S]
            exceeded = in_cache[:, None] > state.budget[run]
            if not traits.reads and bool((exceeded & ~evicted).any()):  # a reader may well read all it has
                raise ReplayError(
                    f"{label} at {budget} keys evicted nothing from {length} tokens",
                    "A replay that changes nothing is no result: check the policy.",
                )
            if budget >= length and bool(evicted.any()):
                raise ReplayError(
                    f"{label} at {budget} keys evicted although {length} tokens fit",
                    "A budget of the whole sequence must equal the full cache: check the policy.",
                )

    @property
    def _reads(self) -> bool:
        return self.plan.policy.traits.reads

    def _per_kv_head(self, mask: Tensor) -> Tensor:
        return mask.expand(-1, -1, self.shape.kv_heads, -1, -1)


def choose_stepper(fallback: TorchStepper, inputs: StepInputs, state: CacheState, sharing: BudgetSharing) -> Stepper:
    """Return what steps blocks of rows fastest and makes the same decisions as `fallback`."""
    plan, traits = inputs.plan, inputs.plan.policy.traits
    plain = traits.bounded and not traits.reads and plan.accumulate is None and sharing.fixed
    rule = recurrence_of(plan.policy) if plain else None
    if rule is None:
        return fallback
    device = state.leave.device.type
    if device == "cpu" and available():
        return NumbaStepper(inputs, state, rule)
    if device == "cuda" and triton_available():
        from kvscope.engine.triton_stepper import TritonStepper  # loads triton, which only a GPU needs

        return TritonStepper(inputs, state, rule)
    return fallback


def _sharing(inputs: StepInputs, protected: Tensor, allocator: Allocator | None) -> BudgetSharing:
    shape, plan = inputs.shape, inputs.plan
    device = protected.device
    request = AllocationRequest(
        budget=torch.tensor(inputs.budgets, device=device),
        fixed=protected.sum(1),
        layers=torch.tensor(shape.layers, dtype=torch.int64, device=device),
        n_layers=shape.n_layers or len(shape.layers),
        heads=1 if plan.policy.traits.scope == "layer" else shape.kv_heads,
        prompt=shape.prompt if inputs.prefill == "full" else shape.length,
    )
    prompt = shape.prompt if inputs.prefill == "full" else 0
    return BudgetSharing(allocator or ALLOCATORS.get(plan.allocate)(), request, prompt)
