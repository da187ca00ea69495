"""Tasks that a gate is trained on: language modelling of texts, or recorded attention without running the model."""

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
from kvscope.model.attention_hook import replace_attention
from kvscope.trace.reader import Trace
from kvscope.training.objective import Gated, language_loss, straight_through

ROWS = 256  # queries whose rows are read at a time
HELD_OUT = 5  # one of this many recorded sequences is held out
LossAndFlags = tuple[Tensor, list[Tensor]]  # task loss, and decisions of each layer [batch, G, keys]


class Task(Protocol):
    """Computes the loss of a gate on training data and on held-out data."""

    def step(self, gate: LearnedGate, number: int) -> LossAndFlags:
        """Return the loss on the training data of step `number`, and the decisions of the gate."""

    def held_out(self, gate: LearnedGate) -> Iterator[LossAndFlags]:
        """Yield losses and decisions on the held-out data, which is the same in every call."""


@dataclass(frozen=True)
class Texts:
    """Token ids ``[batch, T]``, weights of the tokens in the loss ``[batch, T]``, and ``P`` of all sequences."""

    ids: Tensor
    weights: Tensor
    prompt: int


class TextReading:
    """Language modelling with gated attention: the model is frozen, and only the gates are trained.

    Steps alternate between the two prefill modes. Which keys earlier layers evict changes the inputs of later layers,
    so a gate trained with one mode only would retain a different share of keys in the other. Bidirectional gates are
    trained with full prefill only.

    Parameters
    ----------
    model : transformers model
        In eval mode, without gradients for its parameters.
    draw : callable
        ``draw(step)`` returns the texts of a step, which depend only on its number.
    held_out : sequence of Texts
        Texts for evaluation.
    """

    def __init__(self, model: CausalModel, draw: Callable[[int], Texts], held_out: Sequence[Texts]) -> None:
        self._model, self._draw, self._held_out = model, draw, held_out

    def step(self, gate: LearnedGate, number: int) -> LossAndFlags:
        """Return the loss on the texts of a step."""
        return self.loss(gate, self._draw(number), _prefill(gate, number))

    def held_out(self, gate: LearnedGate) -> Iterator[LossAndFlags]:
        """Yield losses on the held-out texts."""
        return (self.loss(gate, texts, _prefill(gate, number)) for number, texts in enumerate(self._held_out))

    def loss(self, gate: LearnedGate, texts: Texts, prefill: str) -> LossAndFlags:
        """Return the mean loss of the tokens whose prediction the gate can change, and its decisions."""
        device = self._model.get_input_embeddings().weight.device
        ids, weights = texts.ids.to(device), texts.weights.to(device)
        attention = Gated(gate, texts.prompt, prefill)
        with replace_attention(self._model, attention):
            logits = self._model(input_ids=ids, use_cache=False).logits
        if prefill == "full":
            weights = torch.where(torch.arange(ids.shape[1], device=device) > texts.prompt, weights, 0.0)
        return language_loss(logits, ids, weights.to(logits.device)), attention.flags


def _prefill(gate: LearnedGate, number: int) -> str:
    return "full" if number % 2 or gate.facts.form == "bidirectional" else "stream"


class RecordedMass:
    """Distillation from traces: the gate learns to retain the keys that an optimal gate would retain.

    A gate decides on each key once, on arrival. For a given share of a layer's keys, the choice that retains the most
    attention is therefore the keys with the largest future attention mass, which is computed from recorded rows. The
    loss is the cross-entropy between the gate values and that choice. The model does not run: the traces contain the
    layer inputs.

    Parameters
    ----------
    traces : sequence of Trace
        Traces of one model, with layer inputs.
    share : float
        Share of the keys of a layer that the optimal gate retains.
    form : str
        Form of the gate: for ``bidirectional``, only keys of the prompt are decided on, by the mass of later rows.
    seed : int
        Seed of the order of sequences.

    Raises
    ------
    TraceError
        If a trace has no layer inputs, not all layers, or is of another model than the first.
    UsageError
        If there are fewer than two sequences.
    """

    def __init__(self, traces: Sequence[Trace], share: float, form: str, seed: int, device: str = "cpu") -> None:
        for trace in traces:
            _require_like(trace, traces[0])
        every = [(trace, sequence.index) for trace in traces for sequence in trace.sequences]
        if len(every) < 2:
            raise UsageError(
                "one sequence is too few to train and evaluate a gate", "Name traces with two or more in all."
            )
        self._form, self._seed, self._device = form, seed, device
        self._best = {place: best_keys(*one, share, form) for place, one in enumerate(every)}
        self._every = every
        self._held_out = [place for place in range(len(every)) if place % HELD_OUT == 1]
        self._trained = [place for place in range(len(every)) if place % HELD_OUT != 1]

    def step(self, gate: LearnedGate, number: int) -> LossAndFlags:
        """Return the loss on one sequence; each epoch uses every training sequence once, in random order."""
        epoch, place = divmod(number, len(self._trained))
        order = torch.randperm(len(self._trained), generator=torch.Generator().manual_seed(self._seed + epoch))
        return self._loss(gate, self._trained[int(order[place])])

    def held_out(self, gate: LearnedGate) -> Iterator[LossAndFlags]:
        """Yield losses on the held-out sequences."""
        return (self._loss(gate, place) for place in self._held_out)

    def _loss(self, gate: LearnedGate, place: int) -> LossAndFlags:
        trace, sequence = self._every[place]
        prompt = trace.sequences[sequence].prompt
        losses, flags = [], []
        for layer, labels in zip(trace.layers, self._best[place], strict=True):
            hidden = torch.from_numpy(trace.hidden(sequence, layer))[None].to(self._device)
            values = gate.values(layer, hidden, prompt)[..., : labels.shape[-1]]
            clamped = values.clamp(1e-6, 1 - 1e-6)  # the gate values of protected tokens are exactly 1
            losses.append(functional.binary_cross_entropy(clamped, labels[None].to(values)))
            flags.append(straight_through(values, gate.facts.tau))
        return torch.stack(losses).mean(), flags


def best_keys(trace: Trace, sequence: int, share: float, form: str) -> list[Tensor]:
    """Return for each layer the keys that an optimal gate retains, bool ``[G, keys]``: those of most future mass."""
    found = []
    for layer in trace.layers:
        mass = future_mass(trace, sequence, layer, form)
        most = max(1, round(share * mass.numel()))
        selected = torch.zeros(mass.numel(), dtype=torch.bool)
        selected[mass.flatten().argsort(descending=True, stable=True)[:most]] = True
        found.append(selected.view_as(mass))
    return found


def future_mass(trace: Trace, sequence: int, layer: int, form: str) -> Tensor:
    """Return the attention mass of later queries on each key, mean over the query heads of a group, ``[G, keys]``.

    All keys and all later queries count; with ``form="bidirectional"``, keys of the prompt and queries after it.
    """
    about = trace.sequences[sequence]
    prompt = form == "bidirectional"
    first, keys = (about.prompt, about.prompt) if prompt else (0, about.length)
    mass = torch.zeros(trace.kv_heads, keys)
    for start in range(first, about.length, ROWS):
        stop = min(start + ROWS, about.length)
        rows = torch.from_numpy(trace.attention(sequence, layer, start, stop))  # [H, b, stop]
        position = torch.arange(start, stop)
        rows[:, position - start, position] = 0  # a query always sees its own key
        grouped = rows.view(trace.kv_heads, -1, stop - start, stop).mean(1).sum(1)
        mass[:, : min(stop, keys)] += grouped[:, :keys]
    return mass


def _require_like(trace: Trace, other: Trace) -> None:
    """Raise TraceError unless a trace has what training needs, and is of the same model as `other`."""
    if "hidden" not in trace.stored or "maps" not in trace.stored:
        lacking = "layer inputs" if "maps" in trace.stored else "attention"
        raise TraceError(f"{trace.path} has no {lacking}, which training needs", "Record it again with --hidden.")
    if len(trace.layers) != trace.header.n_layers:
        raise TraceError(
            f"{trace.path} has {len(trace.layers)} of {trace.header.n_layers} layers, and training needs all",
            "Record it again without --layers.",
        )
    if trace.header.model.weights != other.header.model.weights:
        raise TraceError(f"{trace.path} and {other.path} are of different models", "Name traces of one model.")
