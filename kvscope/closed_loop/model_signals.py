"""Signals that come from the parameters of a model, and not from what its attention is called with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional

from kvscope.closed_loop.passage import Passage
from kvscope.core.errors import ModelError, UsageError
from kvscope.core.model_types import CausalModel
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.signals import rotary_signal
from kvscope.gates.filters import load_filters
from kvscope.model.attention_hook import Call, observe_attention
from kvscope.model.outputs import OutputProjection, output_projections
from kvscope.model.rotary import rotary_records
from kvscope.model.sample import sample
from kvscope.model.selfcheck import PROBE


@dataclass(frozen=True)
class ModelSignals:
    """Parameters of a model that policies read, as far as some plans need them.

    Attributes
    ----------
    rotary : mapping of int to Tensor
        Of each layer the signal ``rotary``, float64 ``[4, D]``.
    projections : mapping of int to OutputProjection
        Of each layer the output projection.
    readings : mapping of int to mapping of int to Tensor
        Of each sequence and layer the largest weights in a second reading of the prompt, ``[G, T]``.
    kinds : mapping of int to Tensor
        Of each sequence the classes of its tokens, ``[T]``.
    kinds_of_ids : Tensor or None
        The class of every token by its number, ``[V]``, where tokens are generated: of those that `kinds` has not.
    """

    rotary: Mapping[int, Tensor] = field(default_factory=dict)
    projections: Mapping[int, OutputProjection] = field(default_factory=dict)
    readings: Mapping[int, Mapping[int, Tensor]] = field(default_factory=dict)
    kinds: Mapping[int, Tensor] = field(default_factory=dict)
    kinds_of_ids: Tensor | None = None

    @classmethod
    @torch.no_grad()
    def of(
        cls, model: CausalModel, plans: Sequence[EvictionPlan], ids: Tensor, passages: Sequence[Passage] = ()
    ) -> ModelSignals:
        """Return what some plans need of a model and of passages; `ids` are the first tokens of a text, ``[1, n]``.

        Raises
        ------
        UsageError
            If filters that a plan uses are for another model; if it needs a second reading, or classes of tokens, and a
            passage has none.
        ModelError
            If the model has no rotary embedding that numbers describe, and a plan reads it; if it has no output
            projection that can be read, and a plan needs norms of values after it.
        """
        for plan in plans:
            _require_filters(model, plan, ids)
        reads = [plan for plan in plans if "rotary" in plan.needs]
        projected = any("value_out_l1" in plan.needs for plan in plans)
        return cls(
            _rotary(model, reads[0], ids[:, :1]) if reads else {},
            output_projections(model, ids[:, :PROBE]) if projected else {},
            _readings(plans, passages),
            _kinds(plans, passages),
        )

    def token_kinds(self, sequence: int, length: int, device: torch.device) -> Tensor:
        """Return the classes of the first tokens of a text, ``[T]``."""
        return self.kinds[sequence][:length].to(device)

    def kinds_at(self, sequence: int, start: int, ids: Tensor) -> Tensor:
        """Return the classes of the tokens at `start` and after it, of ids ``[R, q]`` if generated: ``[., 1, q]``."""
        given = self.kinds[sequence]
        if start < len(given) or self.kinds_of_ids is None:
            return given[None, None, start : start + ids.shape[1]].to(ids.device)
        return self.kinds_of_ids.to(ids.device)[ids][:, None]

    def generating(self, sequence: int, prompt: int, kinds_of_ids: Tensor) -> ModelSignals:
        """Return the signals for a text of which the prompt is given, and what follows is generated."""
        return replace(self, kinds={sequence: self.kinds[sequence][:prompt]}, kinds_of_ids=kinds_of_ids)

    def reconstruction(self, sequence: int, layer: int, length: int, device: torch.device) -> Tensor:
        """Return the signal of that name for a text of ``T`` tokens with a prompt that was read again, ``[G, T]``."""
        known = self.readings[sequence][layer][:, :length].to(device)
        return functional.pad(known, (0, length - known.shape[-1]))

    def value_out_l1(self, layer: int, values: Tensor) -> Tensor:
        """Return the L1 norm of values ``[R, G, n, D]`` after the projection, ``[R, G, n]``; see `OutputProjection`."""
        return self.projections[layer].norms(values)


def _readings(plans: Sequence[EvictionPlan], passages: Sequence[Passage]) -> dict[int, Mapping[int, Tensor]]:
    """Return the second readings of passages, if a plan needs them."""
    reads = [plan for plan in plans if "reconstruction" in plan.needs]
    if reads and not (passages and all(passage.readings for passage in passages)):
        raise UsageError(
            f"{reads[0].policy.label} needs a second reading of each prompt, but only the tokens are given",
            "Use kvscope perplexity, or record a trace with kvscope trace --reread and replay it.",
        )
    return {passage.sequence.index: passage.readings for passage in passages} if reads else {}


def _kinds(plans: Sequence[EvictionPlan], passages: Sequence[Passage]) -> dict[int, Tensor]:
    """Return the classes of the tokens of passages, if a plan needs them."""
    reads = [plan for plan in plans if "token_kinds" in plan.needs]
    if not reads:
        return {}
    found = {passage.sequence.index: passage.kinds for passage in passages if passage.kinds is not None}
    if not passages or len(found) < len(passages):
        raise UsageError(
            f"{reads[0].policy.label} needs the classes of tokens, but the ids do not show which tokens are special",
            "Record a trace with kvscope trace and replay it, or use kvscope perplexity with text files.",
        )
    return found


def _require_filters(model: CausalModel, plan: EvictionPlan, ids: Tensor) -> None:
    """Raise an error unless the filters that a plan uses are for this model, whose layers have the same heads."""
    if not plan.filters:
        return
    calls: list[Call] = []
    with observe_attention(model, calls.append):
        model(input_ids=ids[:, :2], use_cache=False)
    sizes = {(call.key.shape[1], call.key.shape[3]) for call in calls}
    if len(sizes) > 1:
        raise ModelError(
            f"{plan.policy.label} uses filters, which need the same heads in every layer, but the layers of "
            f"{type(model).__name__} differ in their heads",
            "Use policies without filters.",
        )
    ((kv_heads, size),) = sizes
    for name in plan.filters:
        load_filters(name).require(name, layers=len(calls), kv_heads=kv_heads, size=size, weights=sample(model))


def _rotary(model: CausalModel, plan: EvictionPlan, token: Tensor) -> dict[int, Tensor]:
    """Return the signal ``rotary`` of each layer."""
    try:
        found = rotary_records(model, token)
    except ModelError as error:
        raise ModelError(
            f"{plan.policy.label} needs a rotary embedding with fixed frequencies, which a layer of "
            f"{type(model).__name__} does not have",
            "Use another policy for this model.",
        ) from error
    signals = {layer: torch.from_numpy(rotary_signal(record)) for record in found for layer in record.layers}
    return {layer: signal.to(token.device) for layer, signal in signals.items()}
