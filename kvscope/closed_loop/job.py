"""Scoring tokens in the closed loop: one teacher-forced pass per text and batch of runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvscope.closed_loop.forward import ClosedLoop, PassShape, RunBatch, logits_of
from kvscope.closed_loop.losses import compare_logits
from kvscope.closed_loop.passage import Passage, scored_tokens
from kvscope.closed_loop.survey import surveyed
from kvscope.core.errors import ModelError, ReplayError
from kvscope.core.options import Prefill
from kvscope.engine.runs import RunSpec, Sink, Tally
from kvscope.engine.scoring import MetricSeries
from kvscope.engine.simulation import CacheSimulation
from kvscope.metrics import Metric
from kvscope.model.attention_hook import replace_attention
from kvscope.model.derotation import Derotation

Array = NDArray[Any]
PASS_BYTES = 2 * 2**30  # of the logits of one pass
SAME = {torch.float64: 1e-2, torch.float32: 1e-2, torch.float16: 0.1, torch.bfloat16: 0.3}  # mean loss, in nats


class TokenSink(Sink, Protocol):
    """Who takes what the closed loop found."""

    def tokens(self, run: int, sequence: int, position: Array, values: Mapping[str, Array]) -> None:
        """Take ``nll_full``, ``nll_policy``, ``kl``, ``top1_equal``, ``top1_correct`` of tokens, each ``[S]``."""


@dataclass(frozen=True)
class ClosedLoopJob:
    """Policies inside a model over texts, with nothing left to check.

    With full prefill the tokens after the prompt are scored, with streaming prefill all but the first.

    Attributes
    ----------
    model : transformers model
        In eval mode; its dtype decides the precision.
    passages : sequence of Passage
        What it reads.
    runs : sequence of RunSpec
        Policies and budgets, all with the same positions. As many as `PASS_BYTES` of logits allow share a pass.
    metrics : sequence of Metric
        Fidelity of each run to its own attention.
    prefill : Prefill
        What happens during the prompt.
    layers : list of int
        Layers whose attention is called.
    rotary : list of Derotation, or None
        Rotation of each layer, where positions are compacted.
    """

    model: Any
    passages: Sequence[Passage]
    runs: Sequence[RunSpec]
    metrics: Sequence[Metric]
    prefill: Prefill
    layers: list[int]
    rotary: list[Derotation] | None = None

    @torch.inference_mode()
    def execute(self, sink: TokenSink, progress_callback: Callable[[float], None] | None = None) -> Tally:
        """Return what was counted, once `sink` has the losses, residency and fidelity of every run.

        Raises
        ------
        ModelError
            If the model gives other losses than were recorded.
        ReplayError
            If a loss is not finite, or a layer does not attend to the whole text at once.
        """
        tally = Tally()
        passes = [(passage, part) for passage in self.passages for part in self._parts(passage)]
        for number, (passage, part) in enumerate(passes):
            ForwardPass(self, passage, part, sink, tally).score()
            if progress_callback is not None:
                progress_callback((number + 1) / len(passes))
        return tally

    def _parts(self, passage: Passage) -> Iterator[list[RunSpec]]:
        """Yield runs, those of one plan together, as many at a time as the logits of a pass may take."""
        scored = len(scored_tokens(passage.sequence, self.prefill))
        size = 4 if self.model.dtype != torch.float64 else 8
        per_run = scored * self.model.config.get_text_config(decoder=True).vocab_size * size
        most = max(1, PASS_BYTES // max(1, per_run) - 1)
        plans = list(dict.fromkeys(run.plan for run in self.runs))
        ordered = [run for plan in plans for run in self.runs if run.plan == plan]
        for start in range(0, len(ordered), most):
            yield ordered[start : start + most]


class ForwardPass:
    """One forward pass over one text with some runs.

    Parameters
    ----------
    job : ClosedLoopJob
        The model, metrics and prefill.
    passage : Passage
        The text.
    runs : sequence of RunSpec
        Those of the job that share the pass, those of one plan together.
    sink : TokenSink
        Takes residency, fidelity and losses.
    tally : Tally
        Counts the keys that are handed out.
    """

    def __init__(
        self, job: ClosedLoopJob, passage: Passage, runs: Sequence[RunSpec], sink: TokenSink, tally: Tally
    ) -> None:
        self.job, self.passage, self.sink, self.tally = job, passage, sink, tally
        sequence = passage.sequence
        self.scored = scored_tokens(sequence, job.prefill)
        self.text = PassShape(sequence.prompt, sequence.length, sequence.index, len(job.layers), job.prefill)
        self.ids = passage.ids.to(job.model.get_input_embeddings().weight.device)
        self.runs = [
            [run for run in runs if run.plan == plan] for plan in dict.fromkeys(run.plan for run in runs)
        ]  # of each batch
        self.batches = []
        for own in self.runs:
            batch = RunBatch(own[0].plan, [run.keys(sequence, job.prefill) for run in own])
            self.batches.append(surveyed(job.model, self.ids, batch, self.text) if batch.plan.looks_across else batch)

    def logits(self) -> Tensor:
        """Return logits ``[1 + R, S, V]`` for the scored tokens, row 0 of the full cache; hands on what was kept."""
        rows = 1 + sum(map(len, self.runs))
        loop = ClosedLoop(self.batches, self.text, self.job.metrics, self._found, self.job.rotary)
        with replace_attention(self.job.model, loop):
            logits = logits_of(self.job.model, self.ids.expand(rows, -1), slice(self.scored[0] - 1, self.scored[-1]))
        if sorted(loop.layers) != self.job.layers:
            raise ReplayError(
                f"attention was called in layers {sorted(loop.layers)}, not in {self.job.layers}",
                "The closed loop needs one call for each layer; please report the model.",
            )
        return logits

    def score(self) -> None:
        """Run, and hand on losses too."""
        logits = self.logits()
        targets = self.ids[torch.from_numpy(self.scored).to(self.ids.device)].to(logits.device)
        for row, run in enumerate((run for own in self.runs for run in own), start=1):
            losses = compare_logits(logits[:1], logits[row], targets)
            values = {name: value.cpu().numpy() for name, value in losses.items()}
            if not all(np.isfinite(value).all() for value in values.values()):
                raise ReplayError(f"{run.plan.label} gives losses that are not finite", "Try --dtype float32.")
            self._require_same_model(values["nll_full"])
            self.sink.tokens(run.number, self.text.sequence, self.scored, values)

    def _require_same_model(self, losses: Array) -> None:
        """Raise ModelError if these are not the losses that were recorded."""
        if self.passage.logprob is None:
            return
        away = float(np.abs(losses + self.passage.logprob[self.scored]).mean())
        if away > SAME[self.job.model.dtype]:
            raise ModelError(
                f"the model gives other losses than the trace, by {away:.3g} nats for each token",
                "Name the model that was traced with --model, and its --dtype.",
            )

    def _found(self, layer: int, number: int, simulation: CacheSimulation, series: MetricSeries) -> None:
        first = self.text.prompt if self.text.prefill == "full" else 0
        steps = np.arange(first, self.text.length)
        values = {name: value.cpu().numpy() for name, value in series.values().items()} if self.job.metrics else {}
        for place, run in enumerate(self.runs[number]):
            self.tally.add_budget(run.number, simulation, place)
            self.sink.residency(run.number, self.text.sequence, layer, simulation.residency(place, 0))
            one = {name: value[place, 0] for name, value in values.items()}
            self.sink.fidelity(run.number, self.text.sequence, layer, steps, one)
