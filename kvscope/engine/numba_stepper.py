"""The stepper that uses the kernel compiled by numba: on a CPU, for policies whose score is a recurrence."""

from __future__ import annotations

import numpy as np

from kvscope.engine.cache_state import CacheState
from kvscope.engine.fixed_scores import fixed_scores
from kvscope.engine.rows import Block
from kvscope.engine.signal_axes import with_run_axis
from kvscope.engine.stepper import StepInputs
from kvscope.kernels.arrays import KernelState
from kvscope.kernels.step_block import step_block
from kvscope.policies.recurrence import Recurrence


class NumbaStepper:
    """Steps through blocks of rows in the compiled kernel, with the same decisions as `TorchStepper`.

    Parameters
    ----------
    inputs : StepInputs
        Plan, sizes and signals.
    state : CacheState
        Changed in place, on the CPU. Its budgets must not change between blocks.
    rule : Recurrence
        How the policy's score is computed.
    """

    def __init__(self, inputs: StepInputs, state: CacheState, rule: Recurrence) -> None:
        self._inputs, self._state, self._rule = inputs, state, rule
        self._arrays = KernelState(  # views of the state's memory
            alive=state.alive.numpy(),
            score=state.score.numpy(),
            leave=state.leave.numpy(),
            n_alive=state.n_alive.numpy(),
            evictions=state.evictions.numpy(),
            budget=state.budget.numpy(),
            sinks=state.sinks.numpy(),
            recent=state.recent.numpy(),
            windows=np.array(state.windows, np.int64),
        )

    def step_block(self, block: Block) -> None:
        """Let all queries of a block attend, be scored and evict, in order of their position."""
        inputs, rows = self._inputs, block.rows
        steps = range(block.start, block.start + rows.shape[-2])
        evicting = inputs.evicting_steps
        evicts = np.array([t in evicting for t in steps])
        missing = inputs.missing_mass
        scale = None if self._rule.scale is None else inputs.signals[self._rule.scale]
        fixed = fixed_scores(self._rule, inputs, self._state, steps.start, steps.stop)
        self._state.nan_scores |= step_block(
            self._rule.weights,
            self._rule.decay,
            self._arrays,
            (rows if rows.ndim == 5 else rows[None]).detach().contiguous().numpy(),
            block.start,
            evicts,
            missing=None if missing is None else with_run_axis("missing", missing).detach().numpy(),
            scale=None if scale is None else scale.detach().contiguous().numpy(),
            fixed=None if fixed is None else fixed.numpy(),
        )
        if evicts.any():
            self._state.length_at_eviction.fill_(steps[int(evicts.nonzero()[0][-1])] + 1)
