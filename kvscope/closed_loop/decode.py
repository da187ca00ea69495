"""Real decoding under a policy: token by token, with a cache from which evicted keys are physically gone.

The slow and plain twin of the closed loop: no row of evicted keys exists, nothing is masked, and what the policy sees
at a step is what the model computed at that step from the shortened cache. It decides live, through the same step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvscope.closed_loop.gates import margins, require_gates
from kvscope.core.errors import ModelError, UsageError
from kvscope.core.options import Positions, Prefill
from kvscope.engine.plan import GATE, EvictionPlan
from kvscope.engine.rows import Shape
from kvscope.engine.scan import VECTORS, Scan
from kvscope.engine.signals import ROWS
from kvscope.model.attention_hook import Call, Kernel, answering
from kvscope.model.derotation import derotations
from kvscope.model.selfcheck import AttentionFacts, self_check
from kvscope.model.short_cache import ShortLayer, short_cache
from kvscope.policies.base import Step

SIGNALS = frozenset({*VECTORS, "mean_query", "value_l1", "value_l2", "key_l2"})
KINDS = {"full_attention", "sliding_attention"}  # layer types whose visible keys a window describes


@dataclass(frozen=True)
class Decoded:
    """What decoding gave.

    Attributes
    ----------
    logits : Tensor
        ``[T, V]`` of every position, float32 or the model's precision if that is higher; with full prefill those of
        the prompt are from one ordinary forward pass.
    leave : list of Tensor
        For each layer int32 ``[G, T]``: the step at whose end the key went, `NEVER` if it stays. A key that a
        sliding-window layer can no longer see goes at the end of the last step that sees it.
    held : list of int
        For each step the keys physically in the cache after it, of the layer and head that holds most. The prompt of a
        full prefill is there as a whole until its last step cuts it.
    """

    logits: Tensor
    leave: list[Tensor]
    held: list[int]


def decode(
    model: Any,
    ids: Tensor,
    plan: EvictionPlan,
    budget: int,
    *,
    prompt: int,
    prefill: Prefill = Prefill.full,
    positions: Positions = Positions.original,
    sequence: int = 0,
) -> Decoded:
    """Return what a model computes along given tokens when a policy really shortens its cache.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model of transformers, in eval mode.
    ids : Tensor
        int64 ``[T]`` or ``[1, T]``: the text; every token is given, none is chosen.
    plan : EvictionPlan
        The policy, and how it is run.
    budget : int
        ``B``, in keys per key/value head.
    prompt : int
        ``P``.
    prefill : {"full", "stream"}
        Whether the prompt goes through one ordinary forward pass and the cache is cut at its end, or every token is
        decoded, from the first.
    positions : {"original", "compacted"}
        Whether a key keeps the rotary position of its place in the text, or has that of its place in the cache:
        0 to n - 1, oldest first, the query n - 1. A policy is shown keys and queries at their original positions.
    sequence : int
        Number of the sequence, on which draws depend.

    Raises
    ------
    UsageError
        For a policy that needs more than the shortened cache holds, or sizes that make no sense.
    ModelError
        For a model whose attention is not softmax over its cache in every layer.
    ReplayError
        If a policy that should have evicted did not.
    """
    _require(plan, positions)
    require_gates(plan, model)
    ids = ids if ids.ndim == 2 else ids[None]
    if ids.ndim != 2 or ids.shape[0] != 1 or not 1 <= prompt <= ids.shape[1] or budget < 1:
        raise UsageError(
            f"ids of shape {tuple(ids.shape)} with a prompt of {prompt} and a budget of {budget} cannot be decoded",
            "Give one sequence, a prompt of 1 to T of its tokens, and a budget of at least 1.",
        )
    with torch.no_grad():
        facts = _facts(model, ids)
        shape = Shape(
            layers=tuple(facts.windows),
            heads=facts.heads,
            kv_heads=facts.kv_heads,
            prompt=prompt,
            length=ids.shape[1],
            sequence=sequence,
            windows=tuple(facts.windows.values()),
        )
        scan = _scan(plan, budget, shape, prefill, facts, model)
        rotary = derotations(model, ids[:, :1]) if positions == "compacted" else None
        decoder = _Decoder(model, ids, scan, short_cache(len(shape.layers), rotary), facts.head_dim)
        logits = decoder.run()
    scan.check()
    return Decoded(logits, [layer.expand(shape.kv_heads, -1) for layer in scan.leave[0]], decoder.held)


class _Decoder:
    """One sequence on its way through the model: `scan` decides for all layers, `cache` holds what is left."""

    def __init__(self, model: Any, ids: Tensor, scan: Scan, cache: Any, head_dim: int) -> None:
        self.model, self.ids, self.scan, self.cache, self.head_dim = model, ids, scan, cache, head_dim
        self.exact = _exact(model)
        self.held: list[int] = []
        self._calls: list[Call] = []  # of the prompt, one for each layer
        self._hidden: dict[int, list[Tensor]] = {}  # inputs of each layer so far, for gates
        self._row = torch.empty(0)  # [L, H, t + 1], of the step being made

    def run(self) -> Tensor:
        """Return the logits ``[T, V]``."""
        logits = []
        prompt = self.scan.shape.prompt if self.scan.prefill == "full" else 0  # tokens that are not decoded
        if prompt:
            with answering(self.model, self._prefill):
                logits.append(self._forward(0, prompt))
            self._observe_prompt(prompt)
        with answering(self.model, self._attend):
            for t in range(prompt, self.ids.shape[1]):
                step = self.scan.see(t)
                self._cut(self.scan.visible(t, t + 1)[..., :t])  # a sliding window forgets before the query comes
                self._begin_row(t)
                logits.append(self._forward(t, t + 1))
                self._end_step(step)
                self._cut(self.scan.held(t, t + 1))
                self.held.append(self._longest())
        return torch.cat(logits).to(self.exact)

    def _forward(self, start: int, stop: int) -> Tensor:
        output = self.model(
            input_ids=self.ids[:, start:stop],
            position_ids=torch.arange(start, stop, device=self.ids.device)[None],
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.logits[0]  # type: ignore[no-any-return]

    def _prefill(self, call: Call, kernel: Kernel) -> Tensor:
        """Note a layer's queries and keys of the whole prompt; the output is the model's own."""
        self._take(call)
        self._calls.append(call)
        return kernel()

    def _observe_prompt(self, prompt: int) -> None:
        """Show the policy every row of the prompt, then cut the cache to what it keeps."""
        for t in range(prompt):
            step = self.scan.see(t)
            visible = self.scan.visible(t, t + 1)[0, :, :, 0]  # [L, G, t + 1]
            self._begin_row(t)
            for call in self._calls:
                queries, rows = self._by_kv_head(call.query[0, :, t]), self._by_kv_head(self._row[call.layer])
                for head, seen in enumerate(visible[call.layer]):
                    rows[head][:, seen] = weights(call, head, queries[head], call.key[0, head, : t + 1][seen])
            self._end_step(step)
        self._calls.clear()
        self._cut(self.scan.held(prompt - 1, prompt))
        self.held += [prompt] * (prompt - 1) + [self._longest()]

    def _attend(self, call: Call, kernel: Kernel) -> Tensor:
        """Return the attention of one query over what its layer's cache holds, and note its row."""
        layer = self._take(call)
        output = []
        queries, rows = self._by_kv_head(call.query[0, :, 0]), self._by_kv_head(self._row[call.layer])
        for head, positions in enumerate(layer.positions):
            count = len(positions)
            own = weights(call, head, _moved(layer, queries[head], count - 1), call.key[0, head, :count])  # [Q, n]
            rows[head][:, positions] = own
            output.append(own @ call.value[0, head, :count].to(self.exact))
        return torch.cat(output)[None, None].to(call.query.dtype)  # [1, 1, H, D]

    def _take(self, call: Call) -> ShortLayer:
        """Return the cache of the layer that attends, once its newest tokens' signals are noted."""
        layer: ShortLayer = self.cache.layers[call.layer]
        queries, keys = call.query.shape[2], call.key.shape[2]
        size = (1, self.scan.shape.kv_heads, queries, self.head_dim)
        if not layer.came or any(came.shape != size for came in layer.came) or keys != layer.longest():
            raise ModelError(
                f"layer {call.layer} of {type(self.model).__name__} does not attend to the keys and values it caches",
                "Decode a model whose layers each cache their own keys and values.",
            )
        key, value = (came[0].to(self.exact) for came in layer.came)
        if self.scan.plan.gates and call.hidden is not None:
            self._hidden.setdefault(call.layer, []).append(call.hidden)
        for name, buffer in self.scan.signals.items():
            if name.startswith(GATE):
                fresh = self._margins(name.removeprefix(GATE), call)[:, -queries:]
            else:
                fresh = signal(name, call.query[0].to(self.exact), key, value)
            buffer[0, call.layer].narrow(_over_time(name), layer.seen - queries, queries).copy_(fresh)
        return layer

    def _margins(self, gate: str, call: Call) -> Tensor:
        """Return what a gate says of all tokens so far, ``[G, n]``: it looks back at every input of the layer."""
        inputs = self._hidden.get(call.layer)
        return margins(gate, call, torch.cat(inputs, 1) if inputs else None, self.scan.shape.prompt)[0]

    def _begin_row(self, t: int) -> None:
        size = (len(self.scan.shape.layers), self.scan.shape.heads, t + 1)
        self._row = torch.zeros(size, dtype=self.exact, device=self.ids.device)

    def _end_step(self, step: Step) -> None:
        if self.scan.missing_mass is not None:
            self.scan.missing_mass[..., step.t] = (1 - self._row.sum(-1)).clamp(min=0)
        self.scan.attend(step, self._row)

    def _cut(self, stays: Tensor) -> None:
        """Leave in the cache what `stays` says, bool ``[1, L, G, 1, n]``."""
        for layer, own in zip(self.cache.layers, stays[0, :, :, 0], strict=True):
            if layer.seen:
                layer.cut(own)

    def _longest(self) -> int:
        lengths: list[int] = [layer.longest() for layer in self.cache.layers]
        return max(lengths)

    def _by_kv_head(self, values: Tensor) -> Tensor:
        """Return ``[H, .]`` as ``[G, Q, .]``, a view."""
        return values.view(self.scan.shape.kv_heads, -1, values.shape[-1])


def _scan(plan: EvictionPlan, budget: int, shape: Shape, prefill: Prefill, facts: AttentionFacts, model: Any) -> Scan:
    """Return a scan over all layers whose signals are still empty: they are filled in as tokens come."""
    layers, length = len(shape.layers), shape.length
    made = {"dtype": _exact(model), "device": model.device}
    signals = {}
    for name in plan.needs - ROWS:
        heads = {"queries": (shape.heads,), "mean_query": ()}.get(name, (shape.kv_heads,))
        size = (facts.head_dim,) if _over_time(name) == -2 else ()
        signals[name] = torch.zeros(layers, *heads, length, *size, **made)
    missing = torch.zeros(layers, shape.heads, length, **made) if facts.learned_sinks else None
    return Scan(plan, [budget], shape, prefill, signals, missing_mass=missing, **made)


def _exact(model: Any) -> torch.dtype:
    """Return the precision of rows and scores: float32, or that of the model if it is higher."""
    return torch.promote_types(model.dtype, torch.float32)


def weights(call: Call, head: int, query: Tensor, keys: Tensor) -> Tensor:
    """Return the attention of the query heads ``[Q, D]`` of key/value head `head` on keys ``[n, D]``: ``[Q, n]``.

    Scaled, capped, and divided by what a learned sink takes too, in float32 or better.
    """
    logits = query.to(call.exact) @ keys.to(call.exact).T * call.scaling
    if call.softcap is not None:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    if call.sinks is None:
        return torch.softmax(logits, -1)
    sink = call.sinks.to(logits.dtype).view(call.key.shape[1], -1, 1)[head]  # [Q, 1]
    return torch.softmax(torch.cat([logits, sink], -1), -1)[:, :-1]


def signal(name: str, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Return what a signal is for new tokens, from ``[H, q, D]`` and ``[G, q, D]``; the axes are those of `Scan`."""
    if name == "mean_query":
        return queries.mean(0)
    if name in VECTORS:
        return {"queries": queries, "keys": keys, "values": values}[name]
    of, order = {"value_l1": (values, 1), "value_l2": (values, 2), "key_l2": (keys, 2)}[name]
    norm: Tensor = of.norm(p=order, dim=-1)
    return norm


def _over_time(name: str) -> int:
    """Return which axis of a signal is time."""
    return -2 if name in (*VECTORS, "mean_query") else -1


def _moved(layer: ShortLayer, query: Tensor, place: int) -> Tensor:
    """Return the newest query, ``[Q, D]``, at its place in the cache, if that is where keys have theirs."""
    if layer.rotary is None:
        return query
    here, there = (torch.tensor([position], device=query.device) for position in (layer.seen - 1, place))
    return layer.rotary.on(layer.rotary.off(query[None, :, None], here), there)[0, :, 0]


def _require(plan: EvictionPlan, positions: str) -> None:
    if positions not in list(Positions):
        raise UsageError(f"positions {positions!r} are unknown", f"Use one of: {', '.join(Positions)}.")
    if plan.policy.traits.reads or "full_weights" in plan.needs:
        why = "reads" if plan.policy.traits.reads else "looks at the attention on"
        raise UsageError(
            f"{plan.policy.label} {why} keys that a shortened cache does not hold, so it cannot be decoded with one",
            "Use another policy, or replay it: the closed loop computes what it would do.",
        )
    unknown = {name for name in plan.needs - ROWS - SIGNALS if not name.startswith(GATE)}
    if unknown:
        raise UsageError(
            f"{plan.policy.label} needs a signal called {sorted(unknown)[0]!r}, which decoding does not give",
            f"Signals: {', '.join(sorted(ROWS | SIGNALS))}.",
        )


def _facts(model: Any, ids: Tensor) -> AttentionFacts:
    """Return the facts of the model's attention; raises ModelError if some of it is not decoded here."""
    facts = self_check(model, ids)
    config = model.config.get_text_config(decoder=True)
    other = set(getattr(config, "layer_types", None) or ()) - KINDS
    if other or list(facts.windows) != list(range(config.num_hidden_layers)):
        raise ModelError(
            f"{type(model).__name__} has layers that are not softmax attention over all keys or a sliding window",
            "Decode a model that has nothing else.",
        )
    return facts
