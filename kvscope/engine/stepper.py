"""The interface of steppers, which take the caches of a simulation through blocks of rows, and their common input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from torch import Tensor

from kvscope.core.options import Prefill
from kvscope.engine.cache_state import CacheState
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.rows import Block, Shape


@dataclass(frozen=True)
class StepInputs:
    """What the steps of a simulation depend on, apart from the state of its caches and the rows.

    Attributes
    ----------
    plan : EvictionPlan
        The policy, and how it is run.
    budgets : list of int
        ``B`` of each run.
    shape : Shape
        Sizes.
    prefill : {"full", "stream"}
        With ``full`` every query of the prompt sees all earlier keys.
    signals : mapping of str to Tensor
        Each with a leading axis of runs, see `kvscope.engine.signal_axes`. The caller may fill in their values step by
        step.
    missing_mass : Tensor or None
        ``[L, H, T]`` or ``[R, L, H, T]``: attention mass of each row on a learned sink.
    """

    plan: EvictionPlan
    budgets: list[int]
    shape: Shape
    prefill: Prefill
    signals: Mapping[str, Tensor]
    missing_mass: Tensor | None

    @cached_property
    def first_eviction(self) -> int:
        """First step at whose end keys may be evicted."""
        return self.shape.prompt - 1 if self.prefill == "full" else 0

    def evicts_after(self, t: int) -> bool:
        """Return whether keys are evicted at the end of step `t`."""
        return t in self.evicting_steps

    @cached_property
    def evicting_steps(self) -> range:
        """All steps at whose end keys are evicted."""
        return self.plan.evicting_steps(self.shape.prompt, self.shape.length, self.prefill)


class Stepper(Protocol):
    """Takes every cache of a simulation through a block of rows. All implementations make the same decisions."""

    def step_block(self, block: Block) -> None:
        """Step through all queries of a block in order: each attends, then keys are scored and evicted.

        Parameters
        ----------
        block : Block
            The rows after those of the previous block, on the device of the state.
        """


class AppendingStepper:
    """Steps of a policy that never evicts: its scores have no effect, and a block is one operation on the state.

    Parameters
    ----------
    state : CacheState
        Changed in place.
    """

    def __init__(self, state: CacheState) -> None:
        self._state = state

    def step_block(self, block: Block) -> None:
        """Add the keys of all queries of a block."""
        self._state.append_block(block.start, block.start + block.rows.shape[-2])
