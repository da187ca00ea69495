"""Real decoding with a really shortened cache, beside the closed loop: the proof that the loop's numbers are true."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvscope.closed_loop.decode import decode
from kvscope.closed_loop.evaluate import ForwardPass, Passage, self_check
from kvscope.closed_loop.options import ClosedLoopOptions, require_closed
from kvscope.closed_loop.trace_loop import passages_of
from kvscope.core.budget import Budget, parse_budgets
from kvscope.core.errors import UsageError
from kvscope.core.options import Loop, Prefill
from kvscope.core.residency import ResidencyIntervals
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.runs import RunSpec, Tally, runs_of
from kvscope.policies.base import Policy
from kvscope.policies.spec import parse_policies
from kvscope.trace.reader import Trace

Array = NDArray[Any]
TOLERANCE = 1e-9  # of logits in float64, where both ways differ in the order of sums alone


@dataclass(frozen=True)
class Verdict:
    """How the closed loop and real decoding agree for one policy, budget and sequence.

    Attributes
    ----------
    label, budget, keys, sequence
        What was compared; `keys` is ``B``.
    tokens : int
        Tokens whose logits were compared.
    largest_cache : int
        Keys that the decoder's cache held at most after any step that evicts, of any head.
    decisions, different : int
        Keys of all layers and heads, and those that left at another step.
    first_difference : int or None
        First step at which both hold other keys.
    logit_difference : float
        Largest absolute difference of logits.
    decided : bool
        Whether this is float64, where any difference is a failure; in other precisions equal scores and rounding can
        make one decision differ, and all that follow from it, so that they are measured and not judged.
    """

    label: str
    budget: str | None
    keys: int
    sequence: int
    tokens: int
    largest_cache: int
    decisions: int
    different: int
    first_difference: int | None
    logit_difference: float
    decided: bool

    @property
    def agrees(self) -> bool:
        """Whether both hold the same keys at every step and give the same logits."""
        return not self.different and self.logit_difference <= TOLERANCE


def verify(
    trace: Trace,
    policies: Sequence[str | Policy],
    budgets: str | Sequence[str | int | Budget] = "20%",
    *,
    prefill: Prefill = Prefill.full,
    params: Mapping[str, str] | None = None,
    compress: str | None = None,
    allocate: str | None = None,
    options: ClosedLoopOptions | None = None,
    tokens: int | None = None,
    sequences: int = 1,
    device: str = "cpu",
    progress: Callable[[float], None] | None = None,
) -> list[Verdict]:
    """Decode a trace's tokens for real under each policy and budget, and compare with the closed loop.

    Parameters
    ----------
    trace : Trace
        Whose model and tokens are used.
    policies, budgets, prefill, params, compress, allocate, device, progress
        As in `replay`.
    options : ClosedLoopOptions, optional
        Positions, model, and dtype: float64 unless it says otherwise.
    tokens : int, optional
        Tokens to decode of each sequence at most; all by default.
    sequences : int
        How many of the trace's sequences, from the first.

    Raises
    ------
    UsageError
        If a policy holds every key (sparse readers), or cannot run in the closed loop.
    """
    chosen = options or ClosedLoopOptions()
    chosen = replace(chosen, dtype="float64") if chosen.dtype == "auto" else chosen
    plans = [EvictionPlan.make(policy, compress, allocate) for policy in parse_policies(policies, params)]
    if not plans:
        raise UsageError("no policy is named", "Name one or more: --policy h2o --policy tova")
    for plan in plans:
        plan.require(prefill)
        plan.policy.fit(trace.layers, trace.kv_heads, trace.header.n_layers)
        require_closed(plan, chosen.positions)
        _require_decodable(plan)
    runs = runs_of(plans, parse_budgets(budgets), loop=Loop.closed, positions=chosen.positions)
    model, passages = passages_of(trace, chosen, device)
    passages = [_cut(passage, tokens, prefill) for passage in passages[:sequences]]
    verdicts = []
    for passage in passages:
        with torch.inference_mode():
            layers = self_check(model, passage.ids, prefill)
            for run in runs:
                verdicts.append(_compared(model, passage, run, prefill, layers))
                if progress is not None:
                    progress(len(verdicts) / (len(runs) * len(passages)))
    return verdicts


def _require_decodable(plan: EvictionPlan) -> None:
    if plan.policy.traits.reads:
        raise UsageError(
            f"{plan.label} holds every key and reads some, so no cache is shortened", "Verify a policy that evicts."
        )


def _cut(passage: Passage, tokens: int | None, prefill: Prefill) -> Passage:
    sequence = passage.sequence
    most = sequence.length if tokens is None else tokens + (sequence.prompt if prefill == "full" else 0)
    length = min(sequence.length, most)
    prompt = min(sequence.prompt, length)
    if length <= (prompt if prefill == "full" else 1):
        raise UsageError(
            f"sequence {sequence.index} has nothing to decode under {prefill} prefill",
            "Use --prefill stream, or a trace with tokens after the prompt.",
        )
    return Passage(replace(sequence, prompt=prompt, length=length), passage.ids[:length])


class _Leaves:
    """Keeps when keys left, of one run."""

    def __init__(self) -> None:
        self.layers: dict[int, Array] = {}

    def residency(self, run: int, sequence: int, layer: int, intervals: ResidencyIntervals) -> None:
        """Keep the step at which every key of a layer was evicted, `NEVER` where it was not."""
        self.layers[layer] = intervals.eviction_steps

    def fidelity(self, *_: Any, **__: Any) -> None:
        """Take nothing of it."""

    def tokens(self, *_: Any, **__: Any) -> None:
        """Take nothing of it."""


def _compared(model: Any, passage: Passage, run: RunSpec, prefill: Prefill, layers: Sequence[int]) -> Verdict:
    sequence, found = passage.sequence, _Leaves()
    made = ForwardPass(model, passage, [run], [], prefill, layers, found, Tally())
    closed = made.logits()[1]
    keys = run.keys(sequence, prefill)
    real = decode(
        model,
        passage.ids.to(closed.device),
        run.plan,
        keys,
        prompt=sequence.prompt,
        prefill=prefill,
        positions=run.positions,
        sequence=sequence.index,
    )
    one = np.stack([found.layers[layer] for layer in sorted(found.layers)])  # [L, G * T]
    other = np.stack([leave.reshape(-1).cpu().numpy() for leave in real.leave])
    unlike = one != other
    first = int(np.minimum(one, other)[unlike].min()) if unlike.any() else None
    start = sequence.prompt - 1 if prefill == "full" else 0
    logits = real.logits[torch.from_numpy(made.scored - 1)]
    return Verdict(
        label=run.plan.label,
        budget=None if run.budget is None else str(run.budget),
        keys=keys,
        sequence=sequence.index,
        tokens=len(made.scored),
        largest_cache=max(real.held[start:]),
        decisions=one.size,
        different=int(unlike.sum()),
        first_difference=first,
        logit_difference=float((logits.to(closed.dtype) - closed).abs().max()),
        decided=closed.dtype == torch.float64,
    )
