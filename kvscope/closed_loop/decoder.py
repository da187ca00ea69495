"""One sequence on its way through a model, token by token, with a cache that is really shortened."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvscope.closed_loop.gates import margins
from kvscope.core.errors import ModelError
from kvscope.engine.plan import GATE
from kvscope.engine.signal_axes import VECTORS, time_axis
from kvscope.engine.simulation import CacheSimulation
from kvscope.model.attention_hook import Call, Kernel, replace_attention
from kvscope.model.short_cache import ShortLayer
from kvscope.policies.base import Step


class Decoder:
    """One sequence on its way through the model: `simulation` decides for all layers, `cache` holds what is left."""

    def __init__(self, model: Any, ids: Tensor, simulation: CacheSimulation, cache: Any, head_dim: int) -> None:
        self.model, self.ids, self.simulation, self.cache, self.head_dim = model, ids, simulation, cache, head_dim
        self.exact = exact_dtype(model)
        self.held: list[int] = []
        self._calls: list[Call] = []  # of the prompt, one for each layer
        self._hidden: dict[int, list[Tensor]] = {}  # inputs of each layer so far, for gates
        self._row = torch.empty(0)  # [L, H, t + 1], of the step being made

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
                self._cut(self.simulation.visible(t, t + 1)[..., :t])  # a sliding window forgets before the query comes
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
        """Note a layer's queries and keys of the whole prompt; the output is the model's own."""
        self._take(call)
        self._calls.append(call)
        return kernel()

    def _observe_prompt(self, prompt: int) -> None:
        """Show the policy every row of the prompt, then cut the cache to what it keeps."""
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
        size = (1, self.simulation.shape.kv_heads, queries, self.head_dim)
        if not layer.newest or any(came.shape != size for came in layer.newest) or keys != layer.longest():
            raise ModelError(
                f"layer {call.layer} of {type(self.model).__name__} does not attend to the keys and values it caches",
                "Decode a model whose layers each cache their own keys and values.",
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
        """Return what a gate says of all tokens so far, ``[G, n]``: it looks back at every input of the layer."""
        inputs = self._hidden.get(call.layer)
        return margins(gate, call, torch.cat(inputs, 1) if inputs else None, self.simulation.shape.prompt)[0]

    def _begin_row(self, t: int) -> None:
        size = (len(self.simulation.shape.layers), self.simulation.shape.heads, t + 1)
        self._row = torch.zeros(size, dtype=self.exact, device=self.ids.device)

    def _end_step(self, step: Step) -> None:
        if self.simulation.inputs.missing_mass is not None:
            self.simulation.inputs.missing_mass[..., step.t] = (1 - self._row.sum(-1)).clamp(min=0)
        self.simulation.attend(step, self._row)

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
        return values.view(self.simulation.shape.kv_heads, -1, values.shape[-1])


def exact_dtype(model: Any) -> torch.dtype:
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
    """Return a signal of new tokens from their ``[H, q, D]`` and ``[G, q, D]``, with the axes of `CacheSimulation`."""
    if name == "mean_query":
        return queries.mean(0)
    if name in VECTORS:
        return {"queries": queries, "keys": keys, "values": values}[name]
    of, order = {"value_l1": (values, 1), "value_l2": (values, 2), "key_l2": (keys, 2)}[name]
    norm: Tensor = of.norm(p=order, dim=-1)
    return norm


def _moved(layer: ShortLayer, query: Tensor, place: int) -> Tensor:
    """Return the newest query, ``[Q, D]``, at its place in the cache, if that is where keys have theirs."""
    if layer.rotary is None:
        return query
    here, there = (torch.tensor([position], device=query.device) for position in (layer.seen - 1, place))
    return layer.rotary.on(layer.rotary.off(query[None, :, None], here), there)[0, :, 0]
