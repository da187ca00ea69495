"""Verification of the closed loop: its decisions and logits, compared with those of real decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kvscope.closed_loop.cache_changes import CacheChanges
from kvscope.closed_loop.decode import Decoded, DecodeJob
from kvscope.closed_loop.decoded_alone import decoded_alone
from kvscope.closed_loop.job import ClosedLoopJob, ForwardPass
from kvscope.closed_loop.lower_products import LowerProducts
from kvscope.closed_loop.passage import Passage
from kvscope.core.errors import UsageError
from kvscope.core.memory import memory_explained
from kvscope.core.options import Loop, Prefill
from kvscope.core.progress import Progress, part_of
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.runs import RunSpec
from kvscope.model.selfcheck import AttentionFacts
from kvscope.policies.full import Full
from kvscope.trace.reader import TokenSequence

TOLERANCE = 1e-9  # for logits in float64, where both computations differ only in the order of summation
# Some models compute a part in float32 whatever their dtype, such as a softmax or the choice of experts. What this
# changes is measured where nothing is evicted; an eviction makes it larger, since fewer keys average it out.
LARGER = 16
ALONE = 2  # decodings of a sequence in which nothing is evicted
IN_FLOAT64 = 1e-12  # where all of a model is computed in float64, its logits differ by less than this
SAME = 1e-4  # above this a difference where nothing is evicted is no rounding of float32


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
    rounding : float
        Largest absolute difference of logits where nothing is evicted, between one pass over the text and decoding.
    model_difference : float
        The part of it that is the model's own: its cached decoding beside its pass over the whole text.
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
    rounding: float = 0.0
    model_difference: float = 0.0

    @property
    def tolerance(self) -> float:
        """Difference of logits up to which they are the same: `TOLERANCE`, or what the model's own rounding gives."""
        return max(TOLERANCE, min(LARGER * self.rounding, SAME))

    @property
    def agrees(self) -> bool:
        """Whether both hold the same keys at every step and compute the same logits."""
        return not self.different and not self.model_differs and self.logit_difference <= self.tolerance

    @property
    def model_differs(self) -> bool:
        """Whether the model itself computes something else when it decodes with a cache than in one pass."""
        return self.model_difference > SAME


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
    def execute(self, progress_callback: Progress | None = None) -> list[Verdict]:
        """Execute the job and return a verdict for each sequence and run.

        The progress is that of decoding: of each sequence `ALONE` times with a full cache, and once for each run.

        Raises
        ------
        ModelError
            If a layer does not attend to the keys and values that it caches.
        ReplayError
            If a policy evicted nothing although it had to.
        """
        runs, done = self.closed.runs, 0
        verdicts: list[Verdict] = []
        decodings = len(self.closed.passages) * (ALONE + len(runs))
        for passage in self.closed.passages:
            for run in runs:
                with memory_explained(f" with {run.label}", "Use --device cpu, --dtype float32, or fewer --tokens."):
                    if run is runs[0]:
                        full = part_of(progress_callback, done, done + ALONE, decodings)
                        rounding, own = self._rounding(passage, full)
                        done += ALONE
                    part = part_of(progress_callback, done, done + 1, decodings)
                    verdict = self._compare(passage, run, part)
                    verdicts.append(replace(verdict, rounding=rounding, model_difference=own))
                    done += 1
        return verdicts

    def _rounding(self, passage: Passage, progress: Progress | None = None) -> tuple[float, float]:
        """Return the largest differences of logits where nothing is evicted: of all computations, and of the model's.

        The computations are the model's pass over the text and its cached decoding, and both with the attention that
        policies run in.
        """
        job, sequence = self.closed, passage.sequence
        eps = torch.finfo(torch.float32).eps
        full = RunSpec(0, EvictionPlan.published(Full()), None, Loop.closed, job.runs[0].positions)
        forward = ForwardPass(job, passage, [full])
        plain, closed = forward.logits()
        prompt = sequence.prompt if job.prefill == "full" else 0
        with LowerProducts() as lower:
            cached = decoded_alone(job.model, passage, prompt, part_of(progress, 0, 1, ALONE))[forward.scored - 1]
        shortened = self._decoded(passage, full, part_of(progress, 1, 2, ALONE)).logits[forward.scored - 1]

        def apart(one: Tensor, other: Tensor) -> float:
            return float((one.to(closed.dtype) - other.to(closed.dtype)).abs().max())

        own = apart(plain, cached)
        rounding = max(own, apart(plain, closed), apart(cached, shortened))
        # At least one unit in the last place of float32, which may not have shown here.
        if rounding > IN_FLOAT64 or (lower.found and closed.dtype is torch.float64):
            rounding = max(rounding, eps * float(plain.abs().max()))
        return rounding, own

    def _decoded(self, passage: Passage, run: RunSpec, progress: Progress | None = None) -> Decoded:
        """Return what decoding with a shortened cache computes."""
        job, sequence = self.closed, passage.sequence
        ids = passage.ids[None].to(job.model.get_input_embeddings().weight.device)
        keys, facts = run.keys(sequence, job.prefill), self.facts
        about = sequence.prompt, job.prefill, sequence.index, facts, job.rotary, passage, job.given
        changes = CacheChanges.of(run, job.unrotated)
        return DecodeJob(job.model, ids, run.plan, [keys], *about, changes).execute(progress)

    def _compare(self, passage: Passage, run: RunSpec, progress: Progress | None = None) -> Verdict:
        sequence, job = passage.sequence, self.closed
        forward = ForwardPass(job, passage, [run])
        closed = forward.logits()[1]
        keys = run.keys(sequence, job.prefill)
        real = self._decoded(passage, run, progress)
        by_layer = {result.layer: result.intervals.eviction_steps for result in forward.results[0].layers}
        owners = [layer for layer in sorted(by_layer) if layer not in job.shared]  # a shared cache counts once
        simulated = np.concatenate([by_layer[layer] for layer in owners])  # [sum of G, times T]
        kept = dict(zip(sorted(by_layer), real.leave, strict=True))
        decoded = np.concatenate([kept[layer].reshape(-1).cpu().numpy() for layer in owners])
        different = simulated != decoded
        first = int(np.minimum(simulated, decoded)[different].min()) if different.any() else None
        start = sequence.prompt - 1 if job.prefill == "full" else 0
        logits = real.logits[torch.from_numpy(forward.scored - 1)]
        return Verdict(
            label=run.label,
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
