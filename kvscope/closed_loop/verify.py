"""Real decoding with a really shortened cache, beside the closed loop: the proof that the loop's numbers are true."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvscope.closed_loop.decode import DecodeJob
from kvscope.closed_loop.job import ClosedLoopJob, ForwardPass
from kvscope.closed_loop.passage import Passage
from kvscope.core.errors import UsageError
from kvscope.core.options import Prefill
from kvscope.core.residency import ResidencyIntervals
from kvscope.engine.runs import RunSpec, Tally
from kvscope.model.selfcheck import AttentionFacts
from kvscope.trace.reader import TokenSequence

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


@dataclass(frozen=True)
class VerifyJob:
    """A comparison of real decoding with the closed loop, in which nothing is left to check.

    Attributes
    ----------
    closed : ClosedLoopJob
        The runs over the texts, without metrics.
    facts : AttentionFacts
        Of the model's attention.
    """

    closed: ClosedLoopJob
    facts: AttentionFacts

    @property
    def runs(self) -> Sequence[RunSpec]:
        """Every run."""
        return self.closed.runs

    @torch.inference_mode()
    def execute(self, progress_callback: Callable[[float], None] | None = None) -> list[Verdict]:
        """Return how both agree, for each sequence and run.

        Raises
        ------
        ModelError
            If a layer does not attend to the keys and values that it caches.
        ReplayError
            If a policy that should have evicted did not.
        """
        pairs = [(passage, run) for passage in self.closed.passages for run in self.closed.runs]
        verdicts = []
        for passage, run in pairs:
            verdicts.append(self._compare(passage, run))
            if progress_callback is not None:
                progress_callback(len(verdicts) / len(pairs))
        return verdicts

    def _compare(self, passage: Passage, run: RunSpec) -> Verdict:
        sequence, found, job = passage.sequence, _Leaves(), self.closed
        made = ForwardPass(job, passage, [run], found, Tally())
        closed = made.logits()[1]
        keys = run.keys(sequence, job.prefill)
        ids = passage.ids[None].to(closed.device)
        real = DecodeJob(
            job.model, ids, run.plan, keys, sequence.prompt, job.prefill, sequence.index, self.facts, job.rotary
        ).execute()
        one = np.stack([found.layers[layer] for layer in sorted(found.layers)])  # [L, G * T]
        other = np.stack([leave.reshape(-1).cpu().numpy() for leave in real.leave])
        unlike = one != other
        first = int(np.minimum(one, other)[unlike].min()) if unlike.any() else None
        start = sequence.prompt - 1 if job.prefill == "full" else 0
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


def shortened(sequence: TokenSequence, tokens: int | None, prefill: Prefill) -> TokenSequence:
    """Return a sequence with at most so many tokens to decode; raises UsageError if there is none."""
    most = sequence.length if tokens is None else tokens + (sequence.prompt if prefill == "full" else 0)
    length = min(sequence.length, most)
    prompt = min(sequence.prompt, length)
    if length <= (prompt if prefill == "full" else 1):
        raise UsageError(
            f"sequence {sequence.index} has nothing to decode under {prefill} prefill",
            "Use --prefill stream, or a trace with tokens after the prompt.",
        )
    return replace(sequence, prompt=prompt, length=length)


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
