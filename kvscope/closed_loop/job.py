"""Scoring of tokens in the closed loop: one teacher-forced pass for each text and batch of runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvscope.closed_loop.forward import ClosedLoop, logits_of
from kvscope.closed_loop.losses import compare_logits
from kvscope.closed_loop.model_signals import ModelSignals
from kvscope.closed_loop.pass_shape import PassShape, RunBatch
from kvscope.closed_loop.passage import Passage, scored_tokens
from kvscope.closed_loop.survey import surveyed
from kvscope.core.errors import ModelError, ReplayError
from kvscope.core.model_types import CausalModel
from kvscope.core.options import Prefill
from kvscope.core.progress import Progress, part_of
from kvscope.engine.parts import RunParts
from kvscope.engine.runs import LayerResult, RunSpec, Sink, Tally, by_plan
from kvscope.engine.scoring import MetricSeries
from kvscope.engine.simulation import CacheSimulation
from kvscope.metrics import Metric
from kvscope.model.attention_hook import replace_attention
from kvscope.model.derotation import Derotation

Array = NDArray[np.generic]
PASS_BYTES = 2 * 2**30  # limit for the logits of one pass
# Largest mean difference, in nats per token, between losses of the same model.
SAME = {torch.float64: 1e-2, torch.float32: 1e-2, torch.float16: 0.1, torch.bfloat16: 0.3}


class TokenSink(Sink, Protocol):
    """Receives the results of the closed loop."""

    def tokens(self, run: int, sequence: int, position: Array, values: Mapping[str, Array]) -> None:
        """Receive ``nll_full``, ``nll_policy``, ``kl``, ``top1_equal``, ``top1_correct`` of tokens, each ``[S]``."""


@dataclass(frozen=True)
class ClosedLoopJob:
    """Runs of policies inside a model over texts, all checked.

    With full prefill the tokens after the prompt are scored, with streaming prefill all but the first; those that the
    tokenizer puts before a text never are.

    Attributes
    ----------
    model : transformers model
        In eval mode; its dtype is the precision of the pass.
    passages : sequence of Passage
        The texts.
    runs : sequence of RunSpec
        Plans and budgets, all with the same positions. A pass takes as many runs as `PASS_BYTES` of logits allow.
    metrics : sequence of Metric
        Computed from each run's own full rows.
    prefill : Prefill
        What happens during the prompt.
    layers : list of int
        Layers whose attention must be called.
    rotary : mapping of int to Derotation, or None
        Rotation of each layer with attention if positions are compacted.
    kv_heads_of : tuple of int
        ``G`` of each of `layers`, where layers differ; otherwise empty.
    shared : mapping of int to int
        For each layer that reads the cache of an earlier one, that layer, whose rows decide.
    given : ModelSignals
        What the policies read of the model's parameters.
    unrotated : mapping of int to Derotation
        Rotation of each layer with attention if a cache quantises keys without their position.
    """

    model: CausalModel
    passages: Sequence[Passage]
    runs: Sequence[RunSpec]
    metrics: Sequence[Metric]
    prefill: Prefill
    layers: list[int]
    rotary: Mapping[int, Derotation] | None = None
    kv_heads_of: tuple[int, ...] = ()
    shared: Mapping[int, int] = field(default_factory=dict)
    given: ModelSignals = field(default_factory=ModelSignals)
    unrotated: Mapping[int, Derotation] = field(default_factory=dict)

    @torch.inference_mode()
    def execute(self, sink: TokenSink, progress_callback: Progress | None = None) -> Tally:
        """Execute the job and return its counts; `sink` gets the losses, residency and fidelity of every run.

        Raises
        ------
        ModelError
            If the model's losses differ from the recorded ones.
        ReplayError
            If a loss is not finite, or a layer does not attend to the whole text at once.
        """
        tally, parts = Tally(), RunParts()
        passes = [(passage, part) for passage in self.passages for part in self._parts(passage)]
        for number, (passage, part) in enumerate(passes):
            share = part_of(progress_callback, number, number + 1, len(passes))
            for result in parts.results(part, partial(self._scored, passage, share)):
                result.write(sink, passage.sequence.index)
                tally.add(result.counts)
            if share is not None:
                share(1)
        return tally

    def _scored(self, passage: Passage, progress: Progress | None, runs: list[RunSpec]) -> Iterator[PassResult]:
        """Yield the results of some runs over one text, after one forward pass."""
        yield from ForwardPass(self, passage, runs, progress).score()

    def _parts(self, passage: Passage) -> Iterator[list[RunSpec]]:
        """Yield the runs of each pass, as many as `PASS_BYTES` allow; runs of one plan are consecutive."""
        scored = len(scored_tokens(passage, self.prefill))
        size = 4 if self.model.dtype != torch.float64 else 8
        per_run = scored * self.model.config.get_text_config(decoder=True).vocab_size * size
        most = max(1, PASS_BYTES // max(1, per_run) - 1)
        ordered = [run for of_plan in by_plan(self.runs) for run in of_plan]
        for start in range(0, len(ordered), most):
            yield ordered[start : start + most]


@dataclass
class PassResult:
    """The result of one run in one pass, on the host.

    All of it is held until the pass is complete: a pass that runs out of memory has written nothing. It is smaller than
    the logits of the run.

    Attributes
    ----------
    run : int
        Number of the run.
    layers : list of LayerResult
        Residency and fidelity, in the order in which the layers were called.
    counts : Tally
        Keys allocated.
    position, losses
        The scored tokens ``[S]``, and their losses (see `TokenSink.tokens`).
    """

    run: int
    layers: list[LayerResult] = field(default_factory=list)
    counts: Tally = field(default_factory=Tally)
    position: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    losses: Mapping[str, Array] = field(default_factory=dict)

    def write(self, sink: TokenSink, sequence: int) -> None:
        """Give everything to `sink`."""
        for layer in self.layers:
            layer.write(sink, self.run, sequence)
        sink.tokens(self.run, sequence, self.position, self.losses)


class ForwardPass:
    """One forward pass over one text with some of the runs.

    Parameters
    ----------
    job : ClosedLoopJob
        The model, metrics and prefill.
    passage : Passage
        The text.
    runs : sequence of RunSpec
        The runs of the pass; those of one plan are consecutive.
    progress : callable, optional
        Called with the completed share of the pass, from 0 to 1, whenever a layer has been computed.

    Attributes
    ----------
    results : list of PassResult
        The result of each run; filled in by the pass.
    """

    def __init__(
        self, job: ClosedLoopJob, passage: Passage, runs: Sequence[RunSpec], progress: Progress | None = None
    ) -> None:
        self.job, self.passage, self._progress, self._done = job, passage, progress, 0
        sequence = passage.sequence
        self.scored = scored_tokens(passage, job.prefill)
        self.text = PassShape(
            sequence.prompt,
            sequence.length,
            sequence.index,
            tuple(job.layers),
            job.prefill,
            job.kv_heads_of,
            job.shared,
            job.given,
        )
        self.ids = passage.ids.to(job.model.get_input_embeddings().weight.device)
        self.runs = by_plan(runs)  # by batch
        self.results = [PassResult(run.number) for run in runs]
        self.batches = []
        for batch_runs in self.runs:
            keys = [run.keys(sequence, job.prefill) for run in batch_runs]
            batch = RunBatch(batch_runs[0].plan, keys, cache=batch_runs[0].cache, merge=batch_runs[0].merge)
            self.batches.append(surveyed(job.model, passage, batch, self.text) if batch.plan.looks_across else batch)

    def logits(self) -> Tensor:
        """Return logits ``[1 + R, S, V]`` for the scored tokens, row 0 with the full cache, and fill in `results`."""
        rows = 1 + sum(map(len, self.runs))
        loop = ClosedLoop(self.batches, self.text, self.job.metrics, self._found, self.job.rotary, self.job.unrotated)
        inputs = any(batch.plan.reads_inputs for batch in self.batches)
        with replace_attention(self.job.model, loop, inputs=inputs):
            keep, beside = slice(self.scored[0] - 1, self.scored[-1]), self.passage.beside(len(self.ids))
            logits = logits_of(self.job.model, self.ids.expand(rows, -1), keep, beside)
        if sorted(loop.layers) != self.job.layers:
            raise ReplayError(
                f"attention was called in layers {sorted(loop.layers)}, not in {self.job.layers}",
                "The closed loop needs one call for each layer: please report the model.",
            )
        return logits

    def score(self) -> list[PassResult]:
        """Run the pass and return the result of each run."""
        logits = self.logits()
        targets = self.ids[torch.from_numpy(self.scored).to(self.ids.device)].to(logits.device)
        for row, run in enumerate((run for batch_runs in self.runs for run in batch_runs), start=1):
            losses = compare_logits(logits[:1], logits[row], targets)
            values = {name: value.cpu().numpy() for name, value in losses.items()}
            if not all(np.isfinite(value).all() for value in values.values()):
                raise ReplayError(f"{run.label} gives losses that are not finite", "Try --dtype float32.")
            self._require_same_model(values["nll_full"])
            self.results[row - 1].position, self.results[row - 1].losses = self.scored, values
        return self.results

    def _require_same_model(self, losses: NDArray[np.floating]) -> None:
        """Raise ModelError if these full-cache losses differ from the recorded ones."""
        if self.passage.logprob is None:
            return
        difference = float(np.abs(losses + self.passage.logprob[self.scored]).mean())
        if difference > SAME[self.job.model.dtype]:
            raise ModelError(
                f"the model's losses differ from those in the trace by {difference:.3g} nats per token",
                "Give the model that was traced with --model, and its --dtype; kvscope verify measures whether "
                "decoding gives other losses than one pass.",
            )

    def _found(self, layer: int, number: int, simulation: CacheSimulation, series: MetricSeries) -> None:
        first = self.text.prompt if self.text.prefill == "full" else 0
        steps = np.arange(first, self.text.length)
        values = {name: value.cpu().numpy() for name, value in series.values().items()} if self.job.metrics else {}
        start = sum(map(len, self.runs[:number]))
        for place, result in enumerate(self.results[start : start + len(self.runs[number])]):
            if simulation.shape.layers == (layer,):  # a cache that several layers read is counted once
                result.counts.add_budget(result.run, simulation, place)
            run_values = {name: value[place, 0] for name, value in values.items()}
            result.layers.append(LayerResult(layer, simulation.residency(place, 0), steps, run_values))
        self._done += 1
        if self._progress is not None:
            self._progress(self._done / (len(self.runs) * len(self.job.layers)))
