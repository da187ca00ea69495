"""What a gate learns from: texts that a model reads through it, or recorded attention without the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from kvscope.core.errors import TraceError, UsageError
from kvscope.core.model_types import CausalModel
from kvscope.gates.module import LearnedGate
from kvscope.model.attention_hook import answering
from kvscope.trace.reader import Trace
from kvscope.training.objective import Gated, language_loss, straight_through

ROWS = 256  # queries whose rows are read at a time
HELD_OUT = 5  # of so many recorded sequences one is not trained on
Found = tuple[Tensor, list[Tensor]]  # loss of the task, and decisions of every layer ``[batch, G, keys]``


class Task(Protocol):
    """Gives losses of a gate."""

    def step(self, gate: LearnedGate, number: int) -> Found:
        """Return the loss on what step `number` trains on, and the decisions."""

    def held_out(self, gate: LearnedGate) -> Iterator[Found]:
        """Yield losses and decisions on what is not trained on, the same every time."""


@dataclass(frozen=True)
class Texts:
    """Token ids ``[batch, T]``, how much each token counts in the loss ``[batch, T]``, and ``P`` for all of them."""

    ids: Tensor
    weights: Tensor
    prompt: int


class TextReading:
    """Language modelling through the gate: gradients pass the frozen model and reach the gates alone.

    Gates serve both prefills, which take turns: the inputs of later layers differ in what earlier gates have done to
    them, and a gate that has seen those of one prefill alone keeps another share of its keys under the other. Those of
    bidirectional gates are read with full prefill alone.

    Parameters
    ----------
    model : transformers model
        In eval mode, without gradients for its parameters.
    draw : callable
        ``draw(step)`` gives the texts of a step, which depend on its number alone.
    held_out : sequence of Texts
        What is not trained on.
    """

    def __init__(self, model: CausalModel, draw: Callable[[int], Texts], held_out: Sequence[Texts]) -> None:
        self._model, self._draw, self._held_out = model, draw, held_out

    def step(self, gate: LearnedGate, number: int) -> Found:
        """Return the loss on the texts of a step."""
        return self.loss(gate, self._draw(number), _turn(gate, number))

    def held_out(self, gate: LearnedGate) -> Iterator[Found]:
        """Yield losses on the texts that are not trained on."""
        return (self.loss(gate, texts, _turn(gate, number)) for number, texts in enumerate(self._held_out))

    def loss(self, gate: LearnedGate, texts: Texts, prefill: str) -> Found:
        """Return the loss of the tokens of texts that a gate can change, and its decisions."""
        device = self._model.get_input_embeddings().weight.device
        ids, weights = texts.ids.to(device), texts.weights.to(device)
        answer = Gated(gate, texts.prompt, prefill)
        with answering(self._model, answer):
            logits = self._model(input_ids=ids, use_cache=False).logits
        if prefill == "full":
            weights = torch.where(torch.arange(ids.shape[1], device=device) > texts.prompt, weights, 0.0)
        return language_loss(logits, ids, weights.to(logits.device)), answer.flags


def _turn(gate: LearnedGate, number: int) -> str:
    return "full" if number % 2 or gate.facts.form == "bidirectional" else "stream"


class RecordedMass:
    """Distillation from traces: a gate should keep the keys that the best possible gate would.

    A gate decides on a key once, when it comes, so the choice that retains most attention with a share of a layer's
    keys is the keys with the largest mass still to come, which recorded rows tell. The loss is the cross-entropy of
    that choice. The model does not run: layer inputs are recorded too.

    Parameters
    ----------
    traces : sequence of Trace
        Of one model; with hidden states.
    share : float
        Of the keys of a layer, that the best gate keeps.
    form : str
        Of the gate: with ``bidirectional`` the keys and the choice are the prompt's, and mass is that of later rows.
    seed : int
        Of the order in which sequences are taken.

    Raises
    ------
    TraceError
        If a trace lacks hidden states or layers, or belongs to another model.
    UsageError
        If there are fewer than two sequences.
    """

    def __init__(self, traces: Sequence[Trace], share: float, form: str, seed: int, device: str = "cpu") -> None:
        for trace in traces:
            _require_like(trace, traces[0])
        every = [(trace, sequence.index) for trace in traces for sequence in trace.sequences]
        if len(every) < 2:
            raise UsageError("one sequence leaves none to judge the gate by", "Name traces with two or more in all.")
        self._form, self._seed, self._device = form, seed, device
        self._best = {place: best_keys(*one, share, form) for place, one in enumerate(every)}
        self._every = every
        self._kept = [place for place in range(len(every)) if place % HELD_OUT == 1]
        self._trained = [place for place in range(len(every)) if place % HELD_OUT != 1]

    def step(self, gate: LearnedGate, number: int) -> Found:
        """Return the loss on one sequence; every one comes once before any comes again."""
        turn, place = divmod(number, len(self._trained))
        order = torch.randperm(len(self._trained), generator=torch.Generator().manual_seed(self._seed + turn))
        return self._loss(gate, self._trained[int(order[place])])

    def held_out(self, gate: LearnedGate) -> Iterator[Found]:
        """Yield losses on the sequences that are not trained on."""
        return (self._loss(gate, place) for place in self._kept)

    def _loss(self, gate: LearnedGate, place: int) -> Found:
        trace, sequence = self._every[place]
        prompt = trace.sequences[sequence].prompt
        losses, flags = [], []
        for layer, labels in zip(trace.layers, self._best[place], strict=True):
            hidden = torch.from_numpy(trace.hidden(sequence, layer))[None].to(self._device)
            values = gate.values(layer, hidden, prompt)[..., : labels.shape[-1]]
            certain = values.clamp(1e-6, 1 - 1e-6)  # the gates of protected tokens are one
            losses.append(functional.binary_cross_entropy(certain, labels[None].to(values)))
            flags.append(straight_through(values, gate.facts.tau))
        return torch.stack(losses).mean(), flags


def best_keys(trace: Trace, sequence: int, share: float, form: str) -> list[Tensor]:
    """Return for each layer which keys the best gate keeps, bool ``[G, keys]``: the largest masses of the layer."""
    found = []
    for layer in trace.layers:
        mass = mass_to_come(trace, sequence, layer, form)
        most = max(1, round(share * mass.numel()))
        chosen = torch.zeros(mass.numel(), dtype=torch.bool)
        chosen[mass.flatten().argsort(descending=True, stable=True)[:most]] = True
        found.append(chosen.view_as(mass))
    return found


def mass_to_come(trace: Trace, sequence: int, layer: int, form: str) -> Tensor:
    """Return the attention that later queries pay to each key, mean over the query heads of a group, ``[G, keys]``.

    Of all keys by all later queries; with ``form="bidirectional"`` of the prompt's keys by the queries after it.
    """
    about = trace.sequences[sequence]
    prompt = form == "bidirectional"
    first, keys = (about.prompt, about.prompt) if prompt else (0, about.length)
    mass = torch.zeros(trace.kv_heads, keys)
    for start in range(first, about.length, ROWS):
        stop = min(start + ROWS, about.length)
        rows = torch.from_numpy(trace.attention(sequence, layer, start, stop))  # [H, b, stop]
        own = torch.arange(start, stop)
        rows[:, own - start, own] = 0
        grouped = rows.view(trace.kv_heads, -1, stop - start, stop).mean(1).sum(1)
        mass[:, : min(stop, keys)] += grouped[:, :keys]
    return mass


def _require_like(trace: Trace, other: Trace) -> None:
    """Raise TraceError unless a trace can be learned from, and belongs to the model of another."""
    if "hidden" not in trace.stored or "maps" not in trace.stored:
        lacking = "hidden states" if "maps" in trace.stored else "attention"
        raise TraceError(f"{trace.path} holds no {lacking}, which a gate learns from", "Record it again with --hidden.")
    if len(trace.layers) != trace.header.n_layers:
        raise TraceError(
            f"{trace.path} holds {len(trace.layers)} of {trace.header.n_layers} layers, and every layer has gates",
            "Record it again without --layers.",
        )
    if trace.header.model.weights != other.header.model.weights:
        raise TraceError(f"{trace.path} and {other.path} are of different models", "Name traces of one model.")
