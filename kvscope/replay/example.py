"""A policy on one head and a few tokens, for worked examples and notebooks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvscope.bounds.schedules import schedules
from kvscope.core.options import Prefill
from kvscope.engine.rows import Shape
from kvscope.engine.signal_axes import WITHOUT_HEADS
from kvscope.engine.simulation import CacheSimulation
from kvscope.policies.base import Policy
from kvscope.policies.spec import parse_policies


def held(
    policy: str | Policy,
    rows: Sequence[Sequence[float]],
    budget: int,
    *,
    prompt: int = 1,
    prefill: Prefill = Prefill.full,
    **signals: Sequence[float] | Sequence[Sequence[float]],
) -> list[list[int]]:
    """Return the keys held after each step by one layer with one head; for a sparse reader, the keys read at each step.

    Parameters
    ----------
    policy : str or Policy
        A name as on the command line, or a policy object.
    rows : sequence of sequences of float
        Full-cache attention: row ``t`` has ``t + 1`` weights.
    budget : int
        ``B``, in keys.
    prompt : int
        ``P``; with full prefill the first eviction is at the end of step ``P - 1``.
    prefill : {"full", "stream"}
        What happens during the prompt.
    **signals
        Other signals that the policy needs: ``value_l1=[...]``, ``keys=[[...], ...]``.

    Examples
    --------
    >>> held("window", [[1], [.5, .5], [.4, .3, .3]], budget=2)
    [[0], [0, 1], [1, 2]]
    """
    length = len(rows)
    shape = Shape(layers=(0,), heads=1, kv_heads=1, prompt=prompt, length=length)
    given = {}
    for name, values in signals.items():
        tensor = torch.tensor(values, dtype=torch.float64)
        given[name] = tensor[None] if name in WITHOUT_HEADS else tensor[None, None]
    made = parse_policies([policy])[0]
    if "schedule" in made.traits.needs:
        full = torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.float64) for row in rows], True)
        best = schedules(lambda _, start, stop: full[None, start:stop], shape, [budget], prefill, made.traits.scope)
        given["schedule"] = best.leaves
    simulation = CacheSimulation(made, [budget], shape, prefill, given, dtype=torch.float64)
    for t, row in enumerate(rows):
        simulation.step(t, torch.tensor(row, dtype=torch.float64)[None, None])
    shown = simulation.visible(0, length) if simulation.plan.policy.traits.reads else simulation.held(0, length)
    return [mask.nonzero().flatten().tolist() for mask in shown[0, 0, 0]]
