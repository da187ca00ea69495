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
from kvscope.closed_loop.gates import require_gates
from kvscope.closed_loop.options import require_closed
from kvscope.closed_loop.survey import surveyed
from kvscope.core.errors import ModelError, ReplayError
from kvscope.core.options import Prefill
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.runs import RunSpec, Sink, Tally
from kvscope.engine.scan import Scan
from kvscope.engine.scoring import Scorer
from kvscope.metrics import Metric
from kvscope.model.attention_hook import answering, require_registry
from kvscope.model.derotation import derotations
from kvscope.policies.full import Full
from kvscope.policies.window import Window
from kvscope.trace.reader import TokenSequence

Array = NDArray[Any]
PASS_BYTES = 2 * 2**30  # of the logits of one pass
BLOCK_BYTES = 64 * 2**20  # of the distributions that are compared at a time
PROBE = 128  # tokens of the self-check
# Largest mean KL, in nats, between the model's own kernel and a run that evicts nothing.
SAME = {torch.float64: 1e-2, torch.float32: 1e-2, torch.float16: 0.1, torch.bfloat16: 0.3}  # mean loss, in nats
CLOSE = {torch.float64: 1e-15, torch.float32: 1e-7, torch.float16: 1e-3, torch.bfloat16: 1e-2}


class TokenSink(Sink, Protocol):
    """Who takes what the closed loop found."""

    def tokens(self, run: int, sequence: int, position: Array, values: Mapping[str, Array]) -> None:
        """Take ``nll_full``, ``nll_policy``, ``kl``, ``top1_equal``, ``top1_correct`` of tokens, each ``[S]``."""


@dataclass(frozen=True)
class Passage:
    """Token ids ``[T]``, how they are divided, and their log-probabilities ``[T]`` where these are known."""

    sequence: TokenSequence
    ids: Tensor
    logprob: Array | None = None


def evaluate(
    model: Any,
    passages: Sequence[Passage],
    runs: Sequence[RunSpec],
    metrics: Sequence[Metric],
    prefill: Prefill,
    sink: TokenSink,
    *,
    progress: Callable[[float], None] | None = None,
) -> Tally:
    """Run policies inside a model over texts; `sink` gets losses, residency and fidelity.

    With full prefill the tokens after the prompt are scored, with streaming prefill all but the first.

    Parameters
    ----------
    model : transformers model
        In eval mode; its dtype decides the precision.
    passages : sequence of Passage
        What it reads.
    runs : sequence of RunSpec
        Policies and budgets, all with the same positions: those of the text, or in the cache. As many as `PASS_BYTES`
        of logits allow ride in one pass.
    progress : callable, optional
        Called with the share that is done.

    Raises
    ------
    UsageError
        If a policy cannot run in the closed loop.
    ModelError
        If the model cannot be watched.
    ReplayError
        If a self-check fails.
    """
    for run in runs:
        require_closed(run.plan, run.positions)
    tally = Tally()
    with torch.inference_mode():
        layers = self_check(model, passages[0].ids, prefill)
        plans = [(passage, part) for passage in passages for part in _parts(model, passage, runs, prefill)]
        for number, (passage, part) in enumerate(plans):
            ForwardPass(model, passage, part, metrics, prefill, layers, sink, tally).score()
            if progress is not None:
                progress((number + 1) / len(plans))
    return tally


def self_check(model: Any, ids: Tensor, prefill: Prefill) -> list[int]:
    """Return the layers whose attention was called, after a pass over the first tokens of ids ``[T]``.

    A run that evicts nothing must give the model's own logits, and one that does must not leave layers out.

    Raises
    ------
    ReplayError
        If it does not.
    ModelError
        If the model has layers without attention, or its attention cannot be watched.
    """
    require_registry(model)
    ids = ids[:PROBE]
    count = len(ids)
    text = PassShape(max(1, count // 2), count, 0, 0, prefill)
    batches = [RunBatch(EvictionPlan.published(Full()), [count])]
    if count > 2:
        batches.append(RunBatch(EvictionPlan.published(Window()), [max(1, count // 4)]))
    loop = ClosedLoop(batches, text, [], lambda *_: None)
    with answering(model, loop):
        logits = logits_of(model, ids.expand(1 + len(batches), -1), slice(None))
    wanted = model.config.get_text_config(decoder=True).num_hidden_layers
    if sorted(loop.layers) != list(range(wanted)):
        raise ModelError(
            f"{type(model).__name__} has {wanted} layers, and attention was called in {sorted(loop.layers)}",
            "The closed loop needs a model whose every layer has attention.",
        )
    difference = _compared(logits[:1], logits[1], ids.new_zeros(count))["kl"].mean().item()
    if not difference <= CLOSE[model.dtype]:
        raise ReplayError(
            f"a cache that evicts nothing differs from {type(model).__name__}'s own attention by {difference:.3g} nats",
            "Try --dtype float32; if it stays, please report the model.",
        )
    return sorted(loop.layers)


def _parts(model: Any, passage: Passage, runs: Sequence[RunSpec], prefill: Prefill) -> Iterator[list[RunSpec]]:
    """Yield runs, those of one plan together, as many at a time as the logits of a pass may take."""
    scored = len(scored_tokens(passage.sequence, prefill))
    size = 4 if model.dtype != torch.float64 else 8
    per_run = scored * model.config.get_text_config(decoder=True).vocab_size * size
    most = max(1, PASS_BYTES // max(1, per_run) - 1)
    ordered = [run for plan in dict.fromkeys(run.plan for run in runs) for run in runs if run.plan == plan]
    for start in range(0, len(ordered), most):
        yield ordered[start : start + most]


def scored_tokens(sequence: TokenSequence, prefill: Prefill) -> Array:
    """Return the positions of the tokens that are scored: each is predicted by the one before it."""
    return np.arange(sequence.prompt if prefill == "full" else 1, sequence.length)


class ForwardPass:
    """One forward pass over one text with some runs.

    Parameters
    ----------
    model, passage, metrics, prefill, sink
        As in `evaluate`.
    runs : sequence of RunSpec
        What rides in it, those of one plan together.
    layers : sequence of int
        Layers that must be called, from `self_check`.
    tally : Tally
        Counts the keys that are handed out.
    """

    def __init__(
        self,
        model: Any,
        passage: Passage,
        runs: Sequence[RunSpec],
        metrics: Sequence[Metric],
        prefill: Prefill,
        layers: Sequence[int],
        sink: TokenSink,
        tally: Tally,
    ) -> None:
        self.model, self.passage, self.metrics, self.positions = model, passage, metrics, runs[0].positions
        self.layers, self.sink, self.tally = list(layers), sink, tally
        sequence = passage.sequence
        self.scored = scored_tokens(sequence, prefill)
        self.text = PassShape(sequence.prompt, sequence.length, sequence.index, len(layers), prefill)
        self.ids = passage.ids.to(model.get_input_embeddings().weight.device)
        self.runs = [
            [run for run in runs if run.plan == plan] for plan in dict.fromkeys(run.plan for run in runs)
        ]  # of each batch
        self.batches = []
        for own in self.runs:
            require_gates(own[0].plan, model)
            batch = RunBatch(own[0].plan, [run.keys(sequence, prefill) for run in own])
            self.batches.append(surveyed(model, self.ids, batch, self.text) if batch.plan.looks_across else batch)

    def logits(self) -> Tensor:
        """Return logits ``[1 + R, S, V]`` for the scored tokens, row 0 of the full cache; hands on what was kept."""
        rows = 1 + sum(map(len, self.runs))
        rotary = derotations(self.model, self.ids[None, :1]) if self.positions == "compacted" else None
        loop = ClosedLoop(self.batches, self.text, self.metrics, self._found, rotary)
        with answering(self.model, loop):
            logits = logits_of(self.model, self.ids.expand(rows, -1), slice(self.scored[0] - 1, self.scored[-1]))
        if sorted(loop.layers) != self.layers:
            raise ReplayError(
                f"attention was called in layers {sorted(loop.layers)}, not in {self.layers}",
                "The closed loop needs one call for each layer; please report the model.",
            )
        return logits

    def score(self) -> None:
        """Run, and hand on losses too."""
        logits = self.logits()
        targets = self.ids[torch.from_numpy(self.scored).to(self.ids.device)].to(logits.device)
        for row, run in enumerate((run for own in self.runs for run in own), start=1):
            values = {name: value.cpu().numpy() for name, value in _compared(logits[:1], logits[row], targets).items()}
            if not all(np.isfinite(value).all() for value in values.values()):
                raise ReplayError(f"{run.plan.label} gives losses that are not finite", "Try --dtype float32.")
            self._require_same_model(values["nll_full"])
            self.sink.tokens(run.number, self.text.sequence, self.scored, values)

    def _require_same_model(self, losses: Array) -> None:
        """Raise ModelError if these are not the losses that were recorded."""
        if self.passage.logprob is None:
            return
        away = float(np.abs(losses + self.passage.logprob[self.scored]).mean())
        if away > SAME[self.model.dtype]:
            raise ModelError(
                f"the model gives other losses than the trace, by {away:.3g} nats for each token",
                "Name the model that was traced with --model, and its --dtype.",
            )

    def _found(self, layer: int, number: int, scan: Scan, scorer: Scorer) -> None:
        first = self.text.prompt if self.text.prefill == "full" else 0
        steps = np.arange(first, self.text.length)
        values = {name: value.cpu().numpy() for name, value in scorer.values().items()} if self.metrics else {}
        for place, run in enumerate(self.runs[number]):
            self.tally.add_budget(run.number, scan, place)
            self.sink.residency(run.number, self.text.sequence, layer, scan.residency(place, 0))
            one = {name: value[place, 0] for name, value in values.items()}
            self.sink.fidelity(run.number, self.text.sequence, layer, steps, one)


def _compared(full: Tensor, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Return losses of targets ``[S]`` under full logits ``[1, S, V]`` and a run's ``[S, V]``, nats, block by block."""
    size = max(1, BLOCK_BYTES // (logits.shape[-1] * 8))
    parts = []
    for start in range(0, len(targets), size):
        block = slice(start, start + size)
        exact = torch.promote_types(logits.dtype, torch.float32)
        both = torch.log_softmax(torch.stack([full[0, block], logits[block]]).to(exact), -1)  # [2, b, V]
        losses = -both.gather(-1, targets[block, None].expand(2, -1, -1))[..., 0]
        share = torch.where(both[0].isneginf(), 0.0, both[0].exp() * (both[0] - both[1]))
        first = both.argmax(-1)  # [2, b]
        equal, correct = first[0] == first[1], first[1] == targets[block]
        parts.append((losses[0], losses[1], share.sum(-1).clamp(min=0), equal, correct))
    names = ("nll_full", "nll_policy", "kl", "top1_equal", "top1_correct")
    return {name: torch.cat(column) for name, column in zip(names, zip(*parts, strict=True), strict=True)}
