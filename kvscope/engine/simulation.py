"""The caches that one policy would keep, simulated over attention rows.

The axes of tensors are ``R`` runs (budgets), ``L`` layers, ``S`` deciding heads (``G`` key/value heads, or 1 where one
decision holds for the whole layer) and key positions. The open loop gives a simulation recorded rows, the closed loop
gives it rows as the model computes them.
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
from kvscope.engine.constants import constant
from kvscope.engine.numba_stepper import NumbaStepper
from kvscope.engine.occupancy import Occupancy
from kvscope.engine.plan import EvictionPlan, protection
from kvscope.engine.rows import Shape
from kvscope.engine.signal_axes import with_run_axis
from kvscope.engine.sparse_reader import SparseReader
from kvscope.engine.stepper import AppendingStepper, StepInputs, Stepper
from kvscope.engine.torch_stepper import TorchStepper
from kvscope.kernels import available, triton_available
from kvscope.policies.base import Policy, Step, recurrence_of
from kvscope.policies.own import is_own
from kvscope.policies.recurrence import Recurrence


class CacheSimulation:
    """The caches of one policy under several budgets, over a group of layers of one sequence.

    Parameters
    ----------
    policy : Policy or EvictionPlan
        Scores the keys. A plan also says when to evict and how to allocate the budget; a policy alone gets its
        published plan.
    budgets : sequence of int
        ``B`` of each run, in keys per key/value head.
    shape : Shape
        Sizes.
    prefill : {"full", "stream"}
        With ``full`` every prompt query sees all earlier keys, and keys are first evicted at the end of the prompt.
        With ``stream`` eviction starts when the cache first exceeds the budget.
    signals : mapping of str to Tensor
        What the policy needs in addition to the weights: norms ``[L, G, T]``, ``keys`` and ``values``
        ``[L, G, T, D]``, ``queries`` ``[L, H, T, D]``, ``mean_query`` ``[L, T, D]``; with a leading axis ``R`` if runs
        differ.
    missing_mass : Tensor or None
        ``[L, H, T]``: attention mass of each row on a learned sink. The live row is divided by the retained mass plus
        this.
    allocator : Allocator or None
        Allocates the budget; by default the allocator that the plan names.
    device : torch.device or str
        Device of the state.
    dtype : torch.dtype
        Type of the scores.

    Attributes
    ----------
    state : CacheState
        Which keys are held, their scores, when keys were evicted, and how many keys each head may hold.
    inputs : StepInputs
        The arguments, with defaults filled in.
    stepper : Stepper
        Steps through blocks of rows: the compiled kernel if there is one for the policy, otherwise torch.
    block : callable
        Steps through all queries of a `Block` in order: each attends, then keys are scored and evicted.

    Notes
    -----
    Arguments are not checked here: `kvscope.engine.feasible` checks plan, budgets and prefill when a job is compiled.
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
        protected = constant(tuple(protection(plan.policy, budget, shape.prompt) for budget in budgets), device)
        sharing = _sharing(self.inputs, protected, allocator)
        self.state = CacheState.empty(shape, sharing.at_start(), protected, device, dtype)
        self._reader = SparseReader(plan.policy, self.state, self.inputs.first_eviction) if self._reads else None
        self._torch = TorchStepper(self.inputs, self.state, sharing, self._reader)
        self.stepper = choose_stepper(self._torch, self.inputs, self.state, sharing)
        self.block = self.stepper.step_block

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

    @property
    def occupancy(self) -> Occupancy:
        """Bounds on the number of keys in the caches, counted by `step`, `see` and `attend`; blocks may not count."""
        return self._torch.occupancy

    def step(self, t: int, row: Tensor) -> None:
        """Step through query `t` with full row ``[L, H, t + 1]``: it attends, then keys are scored and evicted."""
        self._torch.step(t, row)

    def see(self, t: int) -> Step:
        """Return the step of query `t` with its visible keys; its row is not known yet. `attend` completes the step."""
        return self._torch.see(t)

    def attend(self, step: Step, row: Tensor) -> None:
        """Complete a step with its row: score keys, then evict.

        Parameters
        ----------
        step : Step
            Returned by `see`.
        row : Tensor
            Full-cache attention of the query, ``[L, H, t + 1]``; with a leading axis ``R`` if runs differ.
        """
        self._torch.attend(step, row)

    def visible(self, start: int, stop: int) -> Tensor:
        """Return ``V_t`` for steps `start` to `stop` - 1, bool ``[R, L, G, stop - start, stop]``.

        The steps must be complete. Those of a sparse reader must not have been released with `release`.
        """
        source = self.state.visible if self._reader is None else self._reader.log.masks
        return self._per_kv_head(source(start, stop))

    def held(self, start: int, stop: int) -> Tensor:
        """Return ``R_t`` for steps `start` to `stop` - 1, bool ``[R, L, G, stop - start, stop]``."""
        return self._per_kv_head(self.state.held(start, stop))

    def release(self, stop: int) -> None:
        """Free the memory that only `visible` needs, for steps before `stop`."""
        if self._reader is not None:
            self._reader.log.forget_before(stop)

    def residency(self, run: int, layer: int) -> ResidencyIntervals:
        """Return when keys were held in one run and layer of the group; for a sparse reader, when they were read."""
        if self._reader is not None:
            return self._reader.log.residency(run, layer, self.shape.kv_heads)
        leave = self.state.leave[run, layer].expand(self.shape.kv_heads, -1)
        return ResidencyIntervals.from_eviction_steps(leave.cpu().numpy())

    def check(self) -> None:
        """Raise ReplayError if the run is invalid.

        Scores must not be NaN. A policy with a budget must evict where a cache exceeds it, and must not evict where the
        whole sequence fits.
        """
        length, label, traits = self.shape.length, self.plan.policy.label, self.plan.policy.traits
        nan_scores, *of_runs = self._findings().tolist()  # the only wait for the device
        if nan_scores:
            raise ReplayError(
                f"{label} gave scores that are not numbers",
                "Check the policy, and the trace with: kvscope info TRACE --verify",
            )
        if not traits.counted or traits.phase == "none":
            return
        for budget, idle, active in zip(self.budgets, of_runs[::2], of_runs[1::2], strict=True):
            if not traits.reads and idle:  # a sparse reader may read every key
                raise ReplayError(
                    f"{label} at {budget} keys evicted nothing from {length} tokens",
                    "Check the policy: a cache larger than its budget must be reduced.",
                )
            if budget >= length and active:
                raise ReplayError(
                    f"{label} at {budget} keys evicted although {length} tokens fit",
                    "Check the policy: with a budget of the whole sequence nothing may be evicted.",
                )

    def _findings(self) -> Tensor:
        """Return whether a score was NaN, and for each run whether a head exceeded its budget and evicted nothing,
        and whether a head evicted: bool ``[1 + 2 R]``.
        """
        state = self.state
        last = (state.length_at_eviction - 1).clamp(min=0)
        in_cache = self.shape.seen(last[None])[:, 0]  # [L]: without eviction
        evicted = state.evictions > 0  # [R, L, S]
        idle = (in_cache[:, None] > state.budget) & ~evicted
        of_runs = torch.stack([idle.flatten(1).any(1), evicted.flatten(1).any(1)], 1)  # [R, 2]
        return torch.cat([state.nan_scores[None], of_runs.flatten()])

    @property
    def _reads(self) -> bool:
        return self.plan.policy.traits.reads

    def _per_kv_head(self, mask: Tensor) -> Tensor:
        return mask.expand(-1, -1, self.shape.kv_heads, -1, -1)


def choose_stepper(fallback: TorchStepper, inputs: StepInputs, state: CacheState, sharing: BudgetSharing) -> Stepper:
    """Return the fastest stepper that makes the same decisions as `fallback`."""
    plan, traits = inputs.plan, inputs.plan.policy.traits
    if traits.phase == "none" and not traits.reads and not is_own(plan.policy):  # an own one is called and checked
        return AppendingStepper(state)
    rule = kernel_rule(inputs, sharing)
    if rule is None or any(state.chunks):
        return fallback
    device = state.leave.device.type
    if device == "cpu" and available():
        return NumbaStepper(inputs, state, rule)
    if device == "cuda" and triton_available():
        from kvscope.engine.triton_stepper import TritonStepper  # loads triton, which only a GPU needs

        return TritonStepper(inputs, state, rule)
    return fallback


def kernel_rule(inputs: StepInputs, sharing: BudgetSharing) -> Recurrence | None:
    """Return the rule by which a kernel can step a plan, or None if it can only be stepped in torch."""
    plan, traits = inputs.plan, inputs.plan.policy.traits
    supported = traits.counted and not traits.reads and plan.accumulate is None and sharing.fixed
    return recurrence_of(plan.policy) if supported else None


def _sharing(inputs: StepInputs, protected: Tensor, allocator: Allocator | None) -> BudgetSharing:
    shape, plan = inputs.shape, inputs.plan
    device = protected.device
    request = AllocationRequest(
        budget=constant(tuple(inputs.budgets), device),
        fixed=protected.sum(1),
        layers=constant(tuple(shape.places or shape.layers), device),
        n_layers=shape.n_layers or len(shape.layers),
        heads=1 if plan.decides == "layer" else shape.kv_heads,
        prompt=shape.prompt if inputs.prefill == "full" else shape.length,
        kv_heads_of=constant(shape.kv_heads_of, device) if shape.kv_heads_of else None,
    )
    prompt = shape.prompt if inputs.prefill == "full" else 0
    whole = [index for index, place in enumerate(shape.places or shape.layers) if plan.policy.whole(place)]
    return BudgetSharing(allocator or ALLOCATORS.get(plan.allocate)(), request, prompt, whole, shape.length)
