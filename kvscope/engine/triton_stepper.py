"""The stepper that uses the Triton kernel: on a GPU, for policies whose score is a recurrence."""

from __future__ import annotations

from bisect import bisect_left

import torch

from kvscope.engine.cache_state import CacheState
from kvscope.engine.constants import constant
from kvscope.engine.fixed_scores import fixed_scores
from kvscope.engine.rows import Block
from kvscope.engine.signal_axes import with_run_axis
from kvscope.engine.stepper import StepInputs
from kvscope.kernels.step_block_triton import MOST_KEYS, TritonState, step_block
from kvscope.policies.recurrence import Recurrence


class TritonStepper:
    """Steps through each block of rows in one kernel launch, with the same decisions as `TorchStepper`.

    Parameters
    ----------
    inputs : StepInputs
        Plan, sizes and signals.
    state : CacheState
        Changed in place. Its budgets must not change between blocks.
    rule : Recurrence
        How the policy's score is computed.
    most_keys : int
        Number of keys up to which the kernel holds the state of a cache in registers.
    """

    def __init__(self, inputs: StepInputs, state: CacheState, rule: Recurrence, *, most_keys: int = MOST_KEYS) -> None:
        self._inputs, self._state, self._rule, self._most_keys = inputs, state, rule, most_keys
        device = state.leave.device
        self._decay = torch.full((1,), rule.decay, dtype=state.score.dtype, device=device)
        self._evicting = evicting = inputs.evicting_steps
        self._evicts = torch.zeros(inputs.shape.length, dtype=torch.uint8, device=device)
        self._evicts[evicting.start : evicting.stop : evicting.step] = 1
        newest_alone = rule.weights != "none" and rule.decay == 0 and rule.scale is None and not any(state.windows)
        # at the first step that evicts, the end of a prompt, many keys may go
        self._one_by_one = evicting.start + 1 if newest_alone and evicting.step == 1 else None
        self._tensors = TritonState(
            alive=state.alive,
            score=state.score,
            leave=state.leave,
            n_alive=state.n_alive,
            evictions=state.evictions,
            budget=state.budget.contiguous(),
            sinks=state.sinks,
            recent=state.recent,
            windows=constant(state.windows, device),
        )

    def step_block(self, block: Block) -> None:
        """Step through all queries of a block in order: each attends, then keys are scored and evicted."""
        inputs, rows = self._inputs, block.rows.detach()
        stop = block.start + rows.shape[-2]
        missing = inputs.missing_mass
        bad = step_block(
            self._rule.weights,
            self._decay,
            self._tensors,
            rows if rows.ndim == 5 else rows[None],
            block.start,
            self._evicts[block.start : stop],
            missing=None if missing is None else with_run_axis("missing", missing).detach(),
            scale=None if self._rule.scale is None else inputs.signals[self._rule.scale].detach(),
            fixed=fixed_scores(self._rule, inputs, self._state, block.start, stop),
            one_by_one=self._one_by_one,
            most_keys=self._most_keys,
        )
        self._state.nan_scores |= (bad != 0).any()
        done = bisect_left(self._evicting, stop)  # evicting steps before `stop`
        if done and self._evicting[done - 1] >= block.start:
            self._state.length_at_eviction.fill_(self._evicting[done - 1] + 1)
