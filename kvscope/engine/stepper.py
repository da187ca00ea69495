"""What moves the caches of a simulation from step to step, and which way of doing it is taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from torch import Tensor

from kvscope.core.options import Prefill
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.rows import Block, Shape


@dataclass(frozen=True)
class StepInputs:
    """What the steps of a simulation depend on, besides the state of its caches and the rows.

    Attributes
    ----------
    plan : EvictionPlan
        The policy, and how it is run.
    budgets : list of int
        ``B`` of each run.
    shape : Shape
        Sizes.
    prefill : {"full", "stream"}
        Whether the prompt's rows see everything.
    signals : mapping of str to Tensor
        Each with a leading axis of runs, see `kvscope.engine.signal_axes`. Their content may be filled in as steps
        come.
    missing_mass : Tensor or None
        ``[L, H, T]`` or ``[R, L, H, T]``: what a learned sink takes from each row.
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
        """Return whether the plan evicts at the end of step `t`."""
        return self.plan.compresses(t, self.shape.prompt, self.prefill)


class Stepper(Protocol):
    """Moves every cache of a simulation through a block of rows: all ways of doing it make the same decisions."""

    def step_block(self, block: Block) -> None:
        """Let all queries of a block attend, be scored and evict, in order of their position.

        Parameters
        ----------
        block : Block
            The rows that follow those of the block before, on the device of the state.
        """
