"""Verification of the closed loop: its decisions and logits, compared with those of real decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from kvscope.closed_loop.decode import DecodeJob
from kvscope.closed_loop.job import ClosedLoopJob, ForwardPass
from kvscope.closed_loop.passage import Passage
from kvscope.core.errors import UsageError
from kvscope.core.memory import memory_explained
from kvscope.core.options import Prefill
from kvscope.engine.runs import RunSpec
from kvscope.model.selfcheck import AttentionFacts
from kvscope.trace.reader import TokenSequence

TOLERANCE = 1e-9  # for logits in float64, where both computations differ only in the order of summation


@dataclass(frozen=True)
class Verdict:
    """The agreement of the closed loop and real decoding for one policy, budget and sequence.

    Attributes
    ----------
    label, budget, keys, sequence
        What was compared; `keys` is ``B``.
    tokens : int
        Number of tokens whose logits were compared.
    largest_cache : int
        Largest number of keys that any head of the decoder's cache held after a step that evicts.
    decisions, different : int
        Number of keys in all layers and heads, and of those that were evicted at different steps.
    first_difference : int or None
        First step after which both hold different keys.
    logit_difference : float
        Largest absolute difference of logits.
    decided : bool
        Whether the precision is float64, where any difference is a failure. In lower precisions rounding can change one
        decision, and with it all later ones, so differences are reported but are no failure.
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
        """Whether both hold the same keys at every step and compute the same logits."""
        return not self.different and self.logit_difference <= TOLERANCE


@dataclass(frozen=True)
class VerifyJob:
    """A comparison of real decoding with the closed loop, whose input has been checked.

    Attributes
    ----------
    closed : ClosedLoopJob
        The runs over the texts, without metrics.
    facts : AttentionFacts
        Facts about the model's attention.
    """

    closed: ClosedLoopJob
    facts: AttentionFacts

    @property
    def runs(self) -> Sequence[RunSpec]:
        """Every run."""
        return self.closed.runs

    @torch.inference_mode()
    def execute(self, progress_callback: Callable[[float], None] | None = None) -> list[Verdict]:
        """Execute the job and return a verdict for each sequence and run.

        Raises
        ------
        ModelError
            If a layer does not attend to the keys and values that it caches.
        ReplayError
            If a policy evicted nothing although it had to.
        """
        pairs = [(passage, run) for passage in self.closed.passages for run in self.closed.runs]
        verdicts = []
        for passage, run in pairs:
            with memory_explained(f" with {run.plan.label}", "Use --device cpu, --dtype float32, or fewer --tokens."):
                verdicts.append(self._compare(passage, run))
            if progress_callback is not None:
                progress_callback(len(verdicts) / len(pairs))
        return verdicts

    def _compare(self, passage: Passage, run: RunSpec) -> Verdict:
        sequence, job = passage.sequence, self.closed
        forward = ForwardPass(job, passage, [run])
        closed = forward.logits()[1]
        keys = run.keys(sequence, job.prefill)
        ids = passage.ids[None].to(closed.device)
        real = DecodeJob(
            job.model, ids, run.plan, keys, sequence.prompt, job.prefill, sequence.index, self.facts, job.rotary
        ).execute()
        by_layer = {result.layer: result.intervals.eviction_steps for result in forward.results[0].layers}
        simulated = np.stack([by_layer[layer] for layer in sorted(by_layer)])  # [L, G * T]
        decoded = np.stack([leave.reshape(-1).cpu().numpy() for leave in real.leave])
        different = simulated != decoded
        first = int(np.minimum(simulated, decoded)[different].min()) if different.any() else None
        start = sequence.prompt - 1 if job.prefill == "full" else 0
        logits = real.logits[torch.from_numpy(forward.scored - 1)]
        return Verdict(
            label=run.plan.label,
            budget=None if run.budget is None else str(run.budget),
            keys=keys,
            sequence=sequence.index,
            tokens=len(forward.scored),
            largest_cache=max(real.held[start:]),
            decisions=simulated.size,
            different=int(different.sum()),
            first_difference=first,
            logit_difference=float((logits.to(closed.dtype) - closed).abs().max()),
            decided=closed.dtype == torch.float64,
        )


def shortened(sequence: TokenSequence, tokens: int | None, prefill: Prefill) -> TokenSequence:
    """Return a sequence with at most `tokens` tokens to decode; raises UsageError if there is none."""
    most = sequence.length if tokens is None else tokens + (sequence.prompt if prefill == "full" else 0)
    length = min(sequence.length, most)
    prompt = min(sequence.prompt, length)
    if length <= (prompt if prefill == "full" else 1):
        raise UsageError(
            f"sequence {sequence.index} has no token to decode with {prefill} prefill",
            "Use --prefill stream, or a trace with tokens after the prompt.",
        )
    return replace(sequence, prompt=prompt, length=length)
