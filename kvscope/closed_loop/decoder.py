"""Decoding of one sequence, token by token, with a cache from which keys are physically removed."""

from __future__ import annotations

import torch
from torch import Tensor

from kvscope.closed_loop.gates import margins
from kvscope.core.errors import ModelError
from kvscope.core.model_types import CausalModel, KeyValueCache
from kvscope.engine.plan import GATE
from kvscope.engine.signal_axes import VECTORS, time_axis
from kvscope.engine.simulation import CacheSimulation
from kvscope.model.attention_hook import Call, Kernel, replace_attention
from kvscope.model.short_cache import ShortLayer
from kvscope.policies.base import Step


class Decoder:
    """Decodes one sequence: `simulation` decides for all layers, and `cache` holds the keys that are not evicted."""

    def __init__(
        self, model: CausalModel, ids: Tensor, simulation: CacheSimulation, cache: KeyValueCache, head_dim: int
    ) -> None:
        self.model, self.ids, self.simulation, self.cache, self.head_dim = model, ids, simulation, cache, head_dim
        self.exact = exact_dtype(model)
        self.held: list[int] = []
        self._calls: list[Call] = []  # the calls of the prompt, one for each layer
        self._hidden: dict[int, list[Tensor]] = {}  # inputs of each layer so far, for gates
        self._row = torch.empty(0)  # row of the current step, [L, H, t + 1]

    def run(self) -> Tensor:
        """Return the logits ``[T, V]``."""
        logits = []
        inputs = self.simulation.inputs
        prompt = inputs.shape.prompt if inputs.prefill == "full" else 0  # tokens that are not decoded
        if prompt:
            with replace_attention(self.model, self._prefill):
                logits.append(self._forward(0, prompt))
            self._observe_prompt(prompt)
        with replace_attention(self.model, self._attend):
            for t in range(prompt, self.ids.shape[1]):
                step = self.simulation.see(t)
                self._cut(self.simulation.visible(t, t + 1)[..., :t])  # keys slide out of a window before the query
                self._begin_row(t)
                logits.append(self._forward(t, t + 1))
                self._end_step(step)
                self._cut(self.simulation.held(t, t + 1))
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
        """Store a layer's call for the whole prompt, and return the output of the model's own kernel."""
        self._record_signals(call)
        self._calls.append(call)
        return kernel()

    def _observe_prompt(self, prompt: int) -> None:
        """Let the policy observe every row of the prompt, then cut the cache to the keys that it holds."""
        for t in range(prompt):
            step = self.simulation.see(t)
            visible = self.simulation.visible(t, t + 1)[0, :, :, 0]  # [L, G, t + 1]
            self._begin_row(t)
            for call in self._calls:
                queries, rows = self._by_kv_head(call.query[0, :, t]), self._by_kv_head(self._row[call.layer])
                for head, seen in enumerate(visible[call.layer]):
                    rows[head][:, seen] = weights(call, head, queries[head], call.key[0, head, : t + 1][seen])
            self._end_step(step)
        self._calls.clear()
        self._cut(self.simulation.held(prompt - 1, prompt))
        self.held += [prompt] * (prompt - 1) + [self._longest()]

    def _attend(self, call: Call, kernel: Kernel) -> Tensor:
        """Return the attention output of one query over the keys in its layer's cache, and store its row."""
        layer = self._record_signals(call)
        output = []
        queries, rows = self._by_kv_head(call.query[0, :, 0]), self._by_kv_head(self._row[call.layer])
        for head, positions in enumerate(layer.positions):
            count = len(positions)
            query = _at_cache_position(layer, queries[head], count - 1)
            row = weights(call, head, query, call.key[0, head, :count])  # [Q, n]
            rows[head][:, positions] = row
            output.append(row @ call.value[0, head, :count].to(self.exact))
        return torch.cat(output)[None, None].to(call.query.dtype)  # [1, 1, H, D]

    def _record_signals(self, call: Call) -> ShortLayer:
        """Write the signals of a call's new tokens to the simulation, and return the cache of the layer."""
        layer: ShortLayer = self.cache.layers[call.layer]
        queries, keys = call.query.shape[2], call.key.shape[2]
        size = (1, self.simulation.shape.kv_heads, queries, self.head_dim)
        if not layer.newest or any(came.shape != size for came in layer.newest) or keys != layer.longest():
            raise ModelError(
                f"layer {call.layer} of {type(self.model).__name__} does not attend to the keys and values it caches",
                "Use a model in which every layer caches its own keys and values.",
            )
        key, value = (came[0].to(self.exact) for came in layer.newest)
        if self.simulation.plan.gates and call.hidden is not None:
            self._hidden.setdefault(call.layer, []).append(call.hidden)
        for name, buffer in self.simulation.inputs.signals.items():
            if name.startswith(GATE):
                fresh = self._margins(name.removeprefix(GATE), call)[:, -queries:]
            else:
                fresh = signal(name, call.query[0].to(self.exact), key, value)
            buffer[0, call.layer].narrow(time_axis(name), layer.seen - queries, queries).copy_(fresh)
        return layer

    def _margins(self, gate: str, call: Call) -> Tensor:
        """Return the margins of a gate for all tokens so far, ``[G, n]``; it needs every past input of the layer."""
        inputs = self._hidden.get(call.layer)
        return margins(gate, call, torch.cat(inputs, 1) if inputs else None, self.simulation.shape.prompt)[0]

    def _begin_row(self, t: int) -> None:
        size = (len(self.simulation.shape.layers), self.simulation.shape.heads, t + 1)
        self._row = torch.zeros(size, dtype=self.exact, device=self.ids.device)

    def _end_step(self, step: Step) -> None:
        if self.simulation.inputs.missing_mass is not None:
            self.simulation.inputs.missing_mass[..., step.t] = (1 - self._row.sum(-1)).clamp(min=0)
        self.simulation.attend(step, self._row)

    def _cut(self, retained: Tensor) -> None:
        """Remove all keys from the cache but the `retained` ones, bool ``[1, L, G, 1, n]``."""
        for layer, mask in zip(self.cache.layers, retained[0, :, :, 0], strict=True):
            if layer.seen:
                layer.cut(mask)

    def _longest(self) -> int:
        lengths: list[int] = [layer.longest() for layer in self.cache.layers]
        return max(lengths)

    def _by_kv_head(self, values: Tensor) -> Tensor:
        """Return a view ``[G, Q, .]`` of ``[H, .]``."""
        return values.view(self.simulation.shape.kv_heads, -1, values.shape[-1])


def exact_dtype(model: CausalModel) -> torch.dtype:
    """Return the precision of rows and scores: float32, or that of the model if it is higher."""
    return torch.promote_types(model.dtype, torch.float32)


def weights(call: Call, head: int, query: Tensor, keys: Tensor) -> Tensor:
    """Return the weights ``[Q, n]`` of the query heads ``[Q, D]`` of key/value head `head` on keys ``[n, D]``.

    Computed in float32 or better, with scaling, soft cap and learned sink.
    """
    logits = query.to(call.exact) @ keys.to(call.exact).T * call.scaling
    if call.softcap is not None:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    if call.sinks is None:
        return torch.softmax(logits, -1)
    sink = call.sinks.to(logits.dtype).view(call.key.shape[1], -1, 1)[head]  # [Q, 1]
    return torch.softmax(torch.cat([logits, sink], -1), -1)[:, :-1]


def signal(name: str, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Return a signal of new tokens from queries ``[H, q, D]``, keys and values ``[G, q, D]``, without a layer axis."""
    if name == "mean_query":
        return queries.mean(0)
    if name in VECTORS:
        return {"queries": queries, "keys": keys, "values": values}[name]
    vectors, order = {"value_l1": (values, 1), "value_l2": (values, 2), "key_l2": (keys, 2)}[name]
    norm: Tensor = vectors.norm(p=order, dim=-1)
    return norm


def _at_cache_position(layer: ShortLayer, query: Tensor, position: int) -> Tensor:
    """Return the newest query, ``[Q, D]``, rotated to `position` if positions are compacted, otherwise unchanged."""
    if layer.rotary is None:
        return query
    original, compacted = (torch.tensor([number], device=query.device) for number in (layer.seen - 1, position))
    return layer.rotary.on(layer.rotary.off(query[None, :, None], original), compacted)[0, :, 0]
