"""Scores that are known when a key arrives, for the kernels that step through a block of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from kvscope.engine.cache_state import CacheState
from kvscope.engine.constants import constant
from kvscope.engine.draw import draws
from kvscope.engine.signal_axes import with_one_number
from kvscope.engine.stepper import StepInputs
from kvscope.policies.own import fixed_of
from kvscope.policies.recurrence import Arrivals, Recurrence


def fixed_scores(rule: Recurrence, inputs: StepInputs, state: CacheState, start: int, stop: int) -> Tensor | None:
    """Return the scores of the keys of steps `start` to `stop` - 1, or None if scores depend on rows.

    Returns
    -------
    Tensor or None
        ``[R or 1, L, S, b]``, in the precision of the scores.

    Raises
    ------
    ReplayError
        If an own policy returns anything but one score for each key.
    """
    if rule.weights != "none":
        return None
    device, heads, shape = state.score.device, state.score.shape[2], inputs.shape
    positions = torch.arange(start, stop, device=device)
    layers = constant(tuple(shape.layers), device)
    signals = {name: value[..., start:stop] for name, value in inputs.signals.items() if with_one_number(name)}
    keys = Arrivals(positions, signals, lambda seed: draws(seed, shape.sequence, layers, heads, positions))
    runs, *heads_of_layers, _ = state.score.shape
    scores = fixed_of(inputs.plan.policy, rule, keys, (runs, *heads_of_layers, len(positions))).detach()
    shared = scores if scores.ndim == 4 else scores.expand(1, *heads_of_layers, -1)
    return shared.expand(-1, *heads_of_layers, -1).to(state.score.dtype).contiguous()
