"""The open loop of a replay: runs over the recorded attention of a trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from kvscope.core.options import Prefill
from kvscope.engine.runs import RunSpec
from kvscope.metrics import Metric
from kvscope.replay.footprint import Footprint, footprint
from kvscope.replay.survey import Survey
from kvscope.trace.reader import Trace


@dataclass(frozen=True)
class OpenLoop:
    """Runs that `step_through` steps over a trace; all of them have been checked against it.

    Attributes
    ----------
    trace : Trace
        Recorded attention.
    runs : sequence of RunSpec
        Plans and budgets.
    metrics : sequence of Metric
        The metrics to compute for each run.
    prefill : Prefill
        What happens during the prompt.
    device : torch.device
        The device to compute on.
    """

    trace: Trace
    runs: Sequence[RunSpec]
    metrics: Sequence[Metric]
    prefill: Prefill
    device: torch.device

    @cached_property
    def survey(self) -> Survey:
        """What decides a budget from layers that are not stepped together."""
        return Survey(self.trace, self.prefill, self.device)

    @cached_property
    def footprints(self) -> Mapping[int, Footprint]:
        """The footprint of each sequence, by its number."""
        plans = [run.plan for run in self.runs]
        return {
            sequence.index: footprint(self.trace, sequence, plans, len(self.metrics))
            for sequence in self.trace.sequences
        }
