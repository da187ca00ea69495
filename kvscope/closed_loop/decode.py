"""Real decoding under a policy: token by token, with evicted keys physically removed from the cache.

This is the slow reference of the closed loop. Nothing is masked: the row that the policy observes at a step is what the
model computed at that step from the shortened cache. The decisions are made by the same simulation.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvscope.closed_loop.cache_changes import CacheChanges
from kvscope.closed_loop.decoded_rows import exact_dtype
from kvscope.closed_loop.decoder import Decoder
from kvscope.closed_loop.feasible import require_decodable
from kvscope.closed_loop.gates import require_gates
from kvscope.closed_loop.model_signals import ModelSignals
from kvscope.closed_loop.pass_shape import PassShape, RunBatch
from kvscope.closed_loop.passage import Passage
from kvscope.closed_loop.prompt_pass import PromptPass
from kvscope.closed_loop.survey import surveyed_shares
from kvscope.core.errors import ModelError, UsageError
from kvscope.core.model_types import CausalModel
from kvscope.core.options import Positions, Prefill, choice
from kvscope.core.progress import Progress
from kvscope.engine.plan import EvictionPlan, require_room
from kvscope.engine.rows import Shape, own_counts
from kvscope.engine.signal_axes import BEFOREHAND, time_axis
from kvscope.engine.signals import ROWS
from kvscope.engine.simulation import CacheSimulation
from kvscope.engine.survey import Given
from kvscope.model.derotation import Derotation, derotations
from kvscope.model.image_check import forget_positions
from kvscope.model.selfcheck import AttentionFacts, self_check
from kvscope.model.short_cache import short_cache
from kvscope.trace.layer_records import LayerHeads
from kvscope.trace.reader import TokenSequence

# Layer types in which all keys, or a window of them, are visible to the attention of the layer;
# of `chunked_attention` those of a chunk are.
KINDS = {"full_attention", "sliding_attention", "attention", "hybrid", "hybrid_sliding"}


@dataclass(frozen=True)
class Decoded:
    """The result of decoding.

    Attributes
    ----------
    logits : Tensor
        ``[T, V]`` for every position, in float32 or the model's precision if that is higher. With full prefill those of
        the prompt come from one ordinary forward pass.
    leave : list of Tensor
        For each layer int32 ``[G, T]``: the step at whose end the key was evicted, `NEVER` if it was not. A key that
        slides out of a sliding-window layer is evicted at the end of the last step that sees it.
    held : list of int
        For each step how many keys are physically in the cache after it, in the layer and head that holds the most.
        With full prefill the whole prompt is held until its last step.
    """

    logits: Tensor
    leave: list[Tensor]
    held: list[int]


@dataclass(frozen=True)
class DecodeJob:
    """One text to decode under one plan and one or several budgets, all checked.

    Attributes
    ----------
    model : PreTrainedModel
        A causal language model of transformers, in eval mode.
    ids : Tensor
        int64 ``[R, T]``: the tokens of the text, once for each budget; decoding follows them and samples nothing.
    plan, budgets
        The policy, how it is run, and for each of ``R`` runs ``B`` in keys per key/value head.
    prompt : int
        ``P``.
    prefill : Prefill
        With ``full`` the prompt goes through one ordinary forward pass, and keys are evicted at its end; with
        ``stream`` every token is decoded.
    sequence : int
        Number of the sequence, on which random draws depend.
    facts : AttentionFacts
        Facts about the model's attention.
    rotary : mapping of int to Derotation, or None
        Rotation of each layer with attention if positions are compacted: the keys in the cache have rotary positions 0
        to n - 1, oldest first, and the query n - 1. A policy still sees keys and queries at their original positions.
    passage : Passage or None
        The text, where its prompt has images; with full prefill the model reads them with the prompt.
    given : ModelSignals
        What the policy reads of the model's parameters.
    changes : CacheChanges
        How the cache is quantised, or what is merged in it.
    """

    model: CausalModel
    ids: Tensor
    plan: EvictionPlan
    budgets: Sequence[int]
    prompt: int
    prefill: Prefill
    sequence: int
    facts: AttentionFacts
    rotary: Mapping[int, Derotation] | None = None
    passage: Passage | None = None
    given: ModelSignals = field(default_factory=ModelSignals)
    changes: CacheChanges = field(default_factory=CacheChanges)

    @torch.inference_mode()
    def execute(self, progress: Progress | None = None) -> Decoded:
        """Decode under a single budget; raises ReplayError if a policy evicted nothing although it had to."""
        assert len(self.budgets) == 1, "what is decoded along given tokens has one result"
        decoder, simulations = self._begun()
        logits = decoder.run(progress)
        leave: dict[int, Tensor] = {}
        for simulation in simulations:
            simulation.check()
            of_layers = zip(simulation.shape.layers, simulation.state.leave[0], strict=True)
            leave |= {layer: steps.expand(simulation.shape.kv_heads, -1) for layer, steps in of_layers}
        owners = [self.facts.shared.get(layer, layer) for layer in self.facts.windows]
        return Decoded(logits, [leave[owner] for owner in owners], decoder.held)

    @torch.inference_mode()
    def generate(
        self, stops: Collection[int], read: PromptPass | None = None, progress: Progress | None = None
    ) -> list[list[int]]:
        """Return for each budget the tokens generated greedily after the prompt, as many as `ids` has room for.

        Raises as `execute`. A token of `stops` ends the text, and is not returned. What `ids` has after the prompt is
        overwritten. `read` is shared by jobs with the same prompt, of which only the first then runs the model over it.
        """
        decoder, simulations = self._begun(read)
        made = decoder.generate(stops, progress)
        for simulation in simulations:
            simulation.check()
        return made

    def _begun(self, read: PromptPass | None = None) -> tuple[Decoder, list[CacheSimulation]]:
        """Return a decoder that has decoded nothing yet, and the simulations that decide for it."""
        kinds: dict[LayerHeads, list[int]] = {}
        for layer in self._owners:
            kinds.setdefault(self.facts.sizes[layer], []).append(layer)
        given = self._surveyed() if len(kinds) > 1 and self.plan.looks_across else {}
        simulations = [self._empty_simulation(own, layers, given) for own, layers in kinds.items()]
        cache, layers = short_cache(self.model, self._owners, self.rotary)
        forget_positions(self.model)
        decoder = Decoder(
            self.model,
            self.ids,
            simulations,
            cache,
            layers,
            self._beside,
            self.facts.shared,
            self.given,
            read,
            self.changes,
        )
        return decoder, simulations

    def _surveyed(self) -> Mapping[int, Given]:
        """Return the allocator of each layer where those that one simulation steps do not suffice to decide."""
        layers, length = tuple(self.facts.windows), self.ids.shape[1]
        kv_heads = own_counts(self.facts.sizes[layer].kv_heads for layer in layers)
        text = PassShape(
            self.prompt, length, self.sequence, layers, self.prefill, kv_heads, self.facts.shared, self.given
        )
        return surveyed_shares(self.model, self.ids[0], RunBatch(self.plan, list(self.budgets)), text, self._beside)

    def _known(self, name: str, layer: int) -> Tensor:
        """Return a signal of a layer that does not depend on what is decoded."""
        if name == "rotary":
            return self.given.rotary[layer]
        return self.given.reconstruction(self.sequence, layer, self.ids.shape[1], self.model.device)

    @property
    def _beside(self) -> Mapping[str, Tensor]:
        """What the model reads of the images of the prompt, with a prompt that goes through in one pass."""
        return {} if self.passage is None or self.prefill != Prefill.full else self.passage.beside(self.prompt)

    @property
    def _owners(self) -> list[int]:
        """The layers that own a cache, in order: they decide."""
        return [layer for layer in self.facts.windows if layer not in self.facts.shared]

    def _empty_simulation(self, own: LayerHeads, numbers: Sequence[int], given: Mapping[int, Given]) -> CacheSimulation:
        """Return a simulation over layers with the same heads, which own a cache.

        Its signals are zero until the decoder fills them in token by token.
        """
        facts, length, order = self.facts, self.ids.shape[1], self._owners
        runs, layers = len(self.budgets), len(numbers)
        made = {"dtype": exact_dtype(self.model), "device": self.model.device}
        shape = Shape(
            layers=tuple(numbers),
            heads=own.heads,
            kv_heads=own.kv_heads,
            prompt=self.prompt,
            length=length,
            sequence=self.sequence,
            windows=tuple(facts.windows[layer] for layer in numbers),
            n_layers=len(order),
            places=tuple(order.index(layer) for layer in numbers),
            chunks=tuple(facts.chunks.get(layer) for layer in numbers) if facts.chunks else (),
            kv_heads_of=own_counts(facts.sizes[layer].kv_heads for layer in order),
        )
        signals = {}
        for name in self.plan.needs - ROWS:
            if name in BEFOREHAND:
                signals[name] = torch.stack([self._known(name, layer) for layer in numbers])
                continue
            heads = {"queries": (own.heads,), "mean_query": ()}.get(name, (own.kv_heads,))
            dim = own.value_size if name == "values" else own.head_dim
            size = (dim,) if time_axis(name) == -2 else ()
            signals[name] = torch.zeros(runs, layers, *heads, length, *size, **made)
        missing = torch.zeros(runs, layers, own.heads, length, **made) if facts.learned_sinks else None
        together = Given.joined([given[layer] for layer in numbers]) if given else None
        return CacheSimulation(
            self.plan,
            list(self.budgets),
            shape,
            self.prefill,
            signals,
            missing_mass=missing,
            allocator=together,
            **made,
        )


def decode(
    model: CausalModel,
    ids: Tensor,
    plan: EvictionPlan,
    budget: int,
    *,
    prompt: int,
    prefill: str = Prefill.full,
    positions: str = Positions.original,
    sequence: int = 0,
    kinds: Tensor | None = None,
) -> Decoded:
    """Return what a model computes on given tokens while a policy evicts keys from its cache.

    Parameters
    ----------
    model, plan, budget, prompt, prefill, sequence
        As in `DecodeJob`.
    ids : Tensor
        int64 ``[T]`` or ``[1, T]``.
    positions : {"original", "compacted"}
        Whether the rotary position of a key is its position in the text or in the cache.
    kinds : Tensor or None
        Classes of the tokens, as in `Passage`, for policies that read them.

    Raises
    ------
    UsageError
        For a policy that needs more than the shortened cache holds, or an impossible prompt length or budget.
    ModelError
        For a model in which some layer's attention is not softmax over its cache.
    ReplayError
        If a policy evicted nothing although it had to.
    """
    how, placing = choice(Prefill, prefill, "prefill"), choice(Positions, positions, "positions")
    require_decodable(plan)
    ids = ids if ids.ndim == 2 else ids[None]
    if ids.ndim != 2 or ids.shape[0] != 1 or not 1 <= prompt <= ids.shape[1] or budget < 1:
        raise UsageError(
            f"ids of shape {tuple(ids.shape)} with a prompt of {prompt} and a budget of {budget} cannot be decoded",
            "Use one sequence of T tokens, a prompt of 1 to T tokens, and a budget of at least 1.",
        )
    plan.require(how)
    require_room(plan.policy, budget, prompt)
    with torch.inference_mode():
        facts = attention_facts(model, ids)
        require_gates(plan, model, [own.kv_heads for own in facts.sizes.values()])
        rotary = derotations(model, ids[:, :1]) if placing is Positions.compacted else None
        passage = Passage(TokenSequence(sequence, prompt, ids.shape[1]), ids[0], kinds=kinds)
        given = ModelSignals.of(model, [plan], ids, [passage])
    return DecodeJob(model, ids, plan, [budget], prompt, how, sequence, facts, rotary, given=given).execute()


def attention_facts(model: CausalModel, ids: Tensor) -> AttentionFacts:
    """Return facts about the model's attention; raises ModelError if it has layers that cannot be decoded here."""
    facts = self_check(model, ids)
    types = getattr(model.config.get_text_config(decoder=True), "layer_types", None)
    other = {types[layer] for layer in facts.windows if layer not in facts.chunks} - KINDS if types else set()
    if other:
        raise ModelError(
            f"{type(model).__name__} has {sorted(other)[0]} layers, in which a query does not see all earlier keys or "
            "a window of them",
            "Replay its trace in the open loop: kvscope replay without --perplexity.",
        )
    return facts
